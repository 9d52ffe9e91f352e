"""The model family. Importing it registers its model types with the Auto classes of transformers.

This folder imports nothing of vit_hf but its own files: the Hub copies them as the code of a repository.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .baselines import BitConfig, BitForImageClassification, ResNetConfig, ResNetForImageClassification
from .configuration_vit import ViTConfig
from .modeling_vit import ViTForImageClassification, ViTModel

# exist_ok: transformers compares configurations by class name, and its own have the same; this adds ours
AutoModel.register(ViTConfig, ViTModel, exist_ok=True)
for model_class in (ViTForImageClassification, ResNetForImageClassification, BitForImageClassification):
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    AutoModelForImageClassification.register(model_class.config_class, model_class, exist_ok=True)

__all__ = [
    "BitConfig",
    "BitForImageClassification",
    "ResNetConfig",
    "ResNetForImageClassification",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
]
