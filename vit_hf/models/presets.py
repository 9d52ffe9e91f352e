"""Architectures by name, and models with random weights. Knows no data and no training."""

import dataclasses
import difflib
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from .baselines import BASELINES, BitForImageClassification, ResNetForImageClassification
from .configuration_vit import CHOICES, ViTConfig
from .modeling_vit import ViTForImageClassification

# The classifier of each model_type that can be trained: transformers' own types are read by the class that extends them.
FAMILIES: dict[str, type[transformers.PreTrainedModel]] = {
    stored: model_class
    for model_class in (ViTForImageClassification, ResNetForImageClassification, BitForImageClassification)
    for stored in (model_class.config_class.stock_type, model_class.config_class.model_type)
}

# Ti: DeiT (arXiv 2012.12877), table 1; S: the same; B, L, H: ViT paper (arXiv 2010.11929), table 1; g, G: "Scaling Vision
# Transformers" (arXiv 2106.04560), table 2. width, layers, heads, width of the MLP
SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
# The patch sizes of each and their usual image sizes, as published weights have them.
USUAL = {
    "tiny": {16: (224, 384)},
    "small": {8: (224,), 14: (224,), 16: (224, 384), 32: (224, 384)},
    "base": {8: (224,), 14: (224,), 16: (224, 384), 32: (224, 384)},
    "large": {14: (224,), 16: (224, 384), 32: (224, 384)},
    "huge": {14: (224, 336, 518), 16: (224,), 32: (224,)},
    "giant": {14: (224, 518)},
    "gigantic": {14: (224, 518)},
}


def _vit(size: str, patch_size: int, image_size: int, **changes: Any) -> tuple[type, dict[str, Any]]:
    """layer_norm_eps 1e-6: google-research/vision_transformer (flax's LayerNorm) and timm; transformers has 1e-12."""
    width, layers, heads, mlp_width = SIZES[size]
    fields = dict(
        image_size=image_size, patch_size=patch_size, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=mlp_width, layer_norm_eps=1e-6,
    )  # fmt: skip
    return ViTConfig, fields | changes


def _hybrid(size: str, image_size: int, stem_depths: list[int]) -> tuple[type, dict[str, Any]]:
    return _vit(size, 1, image_size, stem="hybrid_resnet", stem_depths=stem_depths)


# name -> (class of the configuration, its fields)
PRESETS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    # 16 tokens: trains about a thousand images a second on a laptop's two cores. initializer_range is about
    # 1/sqrt(hidden_size): with transformers' 0.02, meant for width 768, so narrow a model learns slowly at first
    "vit-demo-patch8-32": _vit(
        "tiny", 8, 32, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        initializer_range=0.09,
    ),
    # 10.7 M parameters: the small variant usual for CIFAR-10 from scratch
    "vit-small-patch4-32": _vit("small", 4, 32, num_hidden_layers=6),
    **{
        f"vit-{size}-patch{patch}-{image}": _vit(size, patch, image)
        for size, patches in USUAL.items()
        for patch, images in patches.items()
        for image in images
    },
    # "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580)
    "vit-small-patch16-224-better-baseline": _vit(
        "small", 16, 224, pooling="mean", position_embedding="sincos_2d", head_hidden_size=384, initializer="paper"
    ),
    # Hybrids. r50 with 3-4-9 blocks (stride 16) and with stage 4 (stride 32): ViT paper, section 4.1; r26: AugReg (arXiv
    # 2106.10270), table 2
    "r26-vit-small-patch1-224": _hybrid("small", 224, [2, 2, 2, 2]),
    "r26-vit-small-patch1-384": _hybrid("small", 384, [2, 2, 2, 2]),
    "r50-vit-base-patch1-224": _hybrid("base", 224, [3, 4, 9]),
    "r50-vit-base-patch1-384": _hybrid("base", 384, [3, 4, 9]),
    "r50-stage4-vit-base-patch1-224": _hybrid("base", 224, [3, 4, 6, 3]),
    "r50-stage4-vit-large-patch1-224": _hybrid("large", 224, [3, 4, 6, 3]),
    "r50-stage4-vit-large-patch1-384": _hybrid("large", 384, [3, 4, 6, 3]),
    **BASELINES,
}  # fmt: skip


def preset_config(name: str, changes: dict[str, Any] | None = None, **labels: Any) -> transformers.PreTrainedConfig:
    """The configuration of a preset with some fields changed, and with these labels.

    Raises:
        ValueError: an unknown preset or field, or values that do not go together.
    """
    if name not in PRESETS:
        close = [key for key in PRESETS if key.startswith(name)][:6]
        close = close or difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"no such preset; {hint}`vit-hf models` lists them")
    config_class, fields = PRESETS[name]
    return make_config(config_class, {**fields, **checked_overrides(config_class, changes or {}), **labels})


def make_config(config_class: type, fields: dict[str, Any]) -> transformers.PreTrainedConfig:
    """A configuration; raises ValueError for a value of the wrong type too, which its base class does in its own way."""
    if isinstance(fields.get("image_size"), tuple):
        fields = {**fields, "image_size": list(fields["image_size"])}  # as JSON has it
    try:
        return config_class(**fields)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split("TypeError:")[-1].split())) from None


def checked_overrides(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides as this configuration takes them. Raises ValueError for a name that is none of its fields."""
    common = {item.name for item in dataclasses.fields(transformers.PreTrainedConfig)}
    fields = {item.name for item in dataclasses.fields(config_class) if not item.name.startswith("_")} - common
    for name in overrides:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=3, cutoff=0.6) or sorted(fields)
            kind = config_class.__name__
            raise ValueError(f"--config_overrides: {name!r} is no field of {kind}, nearest: {', '.join(close)}")
    named_none = {name for name in overrides if overrides[name] is None and "none" in CHOICES.get(name, ())}
    return overrides | dict.fromkeys(named_none, "none")


def from_preset(name: str, class_names: list[str], changes: dict[str, Any]) -> transformers.PreTrainedModel:
    """A preset with random weights for these classes. Raises ValueError for an unknown preset or wrong changes."""
    return build(preset_config(name, changes, **labels_of(class_names)))


def build(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The classifier that a configuration of the family describes, with random weights."""
    return FAMILIES[config.model_type](config)


def labels_of(class_names: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
