"""vit_hf: train Vision Transformers with the Hugging Face stack. Imports nothing heavy until a model is asked for."""

__version__ = "0.4.0"


def __getattr__(name: str):
    if name in ("ViTConfig", "ViTModel", "ViTForImageClassification"):
        from vit_hf import models

        return getattr(models, name)
    raise AttributeError(f"module 'vit_hf' has no attribute {name!r}")
