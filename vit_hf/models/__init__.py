"""The model family. Importing it registers the `vit_hf` model type with the Auto classes of transformers.

This folder imports nothing of vit_hf but its own files: the Hub copies them as the code of a repository.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_vit import ViTConfig
from .modeling_vit import ViTForImageClassification, ViTModel

AutoConfig.register(ViTConfig.model_type, ViTConfig)
# exist_ok: transformers compares configurations by class name, and its own is called ViTConfig too; this adds ours
AutoModel.register(ViTConfig, ViTModel, exist_ok=True)
AutoModelForImageClassification.register(ViTConfig, ViTForImageClassification, exist_ok=True)

__all__ = ["ViTConfig", "ViTForImageClassification", "ViTModel"]
