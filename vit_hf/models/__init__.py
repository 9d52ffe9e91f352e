"""The model family. Importing it registers its model types with the Auto classes of transformers.

This folder imports nothing of vit_hf but its own files: the Hub copies them as the code of a repository.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .baselines import (
    BitConfig,
    BitForImageClassification,
    BitModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)
from .configuration_vit import ViTConfig
from .modeling_vit import ViTForImageClassification, ViTModel

for config_class, encoder, classifier in (
    (ViTConfig, ViTModel, ViTForImageClassification),
    (ResNetConfig, ResNetModel, ResNetForImageClassification),
    (BitConfig, BitModel, BitForImageClassification),
):
    AutoConfig.register(config_class.model_type, config_class)
    # exist_ok: transformers compares configurations by class name, and its own have the same; this adds ours
    AutoModel.register(config_class, encoder, exist_ok=True)
    AutoModelForImageClassification.register(config_class, classifier, exist_ok=True)

__all__ = [
    "BitConfig",
    "BitForImageClassification",
    "BitModel",
    "ResNetConfig",
    "ResNetForImageClassification",
    "ResNetModel",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
]


def __getattr__(name: str):
    """What scripts use of this folder beside the classes."""
    if name in ("ModelSettings", "make_model", "published_image_size"):
        from . import transfer

        return getattr(transfer, name)
    if name == "training_flops":
        from .summary import training_flops

        return training_flops
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
