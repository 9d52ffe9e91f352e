"""Architectures by name, and models built from a preset or from weights. Knows no data and no training."""

import dataclasses
import difflib
import os
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from .baselines import BASELINES, BitForImageClassification, ResNetForImageClassification
from .configuration_vit import CHOICES, ViTConfig
from .modeling_vit import ViTForImageClassification
from .positions import resize_position_embeddings, resize_relative_table

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
    return make_config(config_class, {**fields, **_checked(config_class, changes or {}), **labels})


def make_config(config_class: type, fields: dict[str, Any]) -> transformers.PreTrainedConfig:
    """A configuration; raises ValueError for a value of the wrong type too, which its base class does in its own way."""
    if isinstance(fields.get("image_size"), tuple):
        fields = {**fields, "image_size": list(fields["image_size"])}  # as JSON has it
    try:
        return config_class(**fields)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split("TypeError:")[-1].split())) from None


def _checked(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
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


def load_pretrained(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False, need_head: bool = False
) -> transformers.PreTrainedModel:
    """An image classifier from a Hub id or a folder, in fp32. The types in FAMILIES become our classes; any other model
    type is the repository's own class and needs `trust_remote_code` where it comes with code.

    Args:
        need_head: refuse a checkpoint without a classifier, whose logits would be random.

    Raises:
        ValueError: not an image classification model, or weights that do not fit their configuration.
        OSError: no such folder or repository.
    """
    looks_local = name_or_path.startswith(("/", ".", "~")) or os.path.isdir(name_or_path.partition("/")[0])
    if looks_local and not os.path.isdir(name_or_path):
        raise OSError("no such folder")
    config, _ = transformers.PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    if "model_type" not in config and {"architecture", "pretrained_cfg"} & set(config):
        raise ValueError(
            f"its config.json is timm's: make a model folder of it first, vit-hf convert {name_or_path} DIR"
        )
    model_class = FAMILIES.get(config.get("model_type"))
    extra: dict[str, Any] = {}
    if model_class is None:
        model_class, extra = transformers.AutoModelForImageClassification, {"trust_remote_code": trust_remote_code}
    extra["ignore_mismatched_sizes"] = True  # they are named below; transformers' own error names none
    model, report = model_class.from_pretrained(
        name_or_path, revision=revision, dtype=torch.float32, output_loading_info=True, **extra
    )
    missing = [key for key in report["missing_keys"] if need_head or not key.startswith("classifier.")]
    misshaped = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    if missing or misshaped:
        raise ValueError(
            f"the weights of {name_or_path} do not fit its config.json: "
            + "; ".join(
                f"{what} {', '.join(sorted(keys)[:5])}"
                for what, keys in (("missing", missing), ("misshaped", misshaped))
                if keys
            )
        )
    return model


def from_preset(name: str, class_names: list[str], changes: dict[str, Any]) -> transformers.PreTrainedModel:
    """A preset with random weights for these classes. Raises ValueError for an unknown preset or wrong changes."""
    return build(preset_config(name, changes, **_labels(class_names)))


def build(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The classifier that a configuration of the family describes, with random weights."""
    return FAMILIES[config.model_type](config)


def _labels(class_names: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }


# What may be changed of a model with weights: no weight is another one's afterwards.
FREE = (
    "image_size", "pooling", "fc_norm", "head_hidden_size", "head_bias_init", "drop_path_rate", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "hidden_act", "layer_norm_eps", "initializer", "initializer_range",
)  # fmt: skip


def for_new_labels(
    model: transformers.PreTrainedModel, class_names: list[str], changes: dict[str, Any], *, keep_head: bool = False
) -> transformers.PreTrainedModel:
    """The same encoder under a zero-initialised linear head for `class_names`, with the fields in `changes` changed
    (another `image_size` resizes the position embeddings, `pooling=mean` drops the class token).

    Args:
        keep_head: keep the head as it is; the class names must then be the model's own.

    Raises:
        ValueError: changes that make another encoder, or a model of a family that is not trained here.

    Source: ViT paper, section 3.2 (zero-initialised D x K layer, interpolated position embeddings).
    """
    if type(model) not in FAMILIES.values():
        raise ValueError(f"its family (model_type) is {model.config.model_type}; trained are {', '.join(FAMILIES)}")
    changes = _checked(type(model.config), changes)
    fields = model.config.to_dict()
    if isinstance(model, ViTForImageClassification):
        _refuse_new_parts(model.config, changes)
    other = [f"{name} {fields[name]}" for name in changes if name not in FREE and changes[name] != fields[name]]
    if other:
        raise ValueError(
            f"--config_overrides makes another encoder than the weights are for, which has {', '.join(other)}; "
            f"allowed are {', '.join(FREE)}"
        )
    for name in ("num_labels", "model_type", "auto_map", "architectures"):
        fields.pop(name, None)
    if not keep_head and "head_hidden_size" in fields:
        fields["head_hidden_size"] = None
    fields.update(changes, **_labels(class_names))
    target = type(model)(make_config(type(model.config), fields))
    weights = dict(model.state_dict())
    if isinstance(model, ViTForImageClassification):
        _fit_positions(weights, model.config, target.config)
    encoder = model.base_model_prefix + "."
    if not keep_head:
        weights = {key: value for key, value in weights.items() if key.startswith(encoder)}
        for parameter in target.classifier.parameters():
            nn.init.constant_(parameter, changes.get("head_bias_init", 0.0) if parameter.ndim == 1 else 0.0)
    try:
        missing, unexpected = target.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise ValueError(f"--config_overrides makes another encoder than the weights are for: {reason[0]}") from None
    left_out = [key for key in missing if key.startswith(encoder) or keep_head] + unexpected
    if left_out:
        raise ValueError(
            f"--config_overrides makes another encoder than the weights are for: {', '.join(left_out[:5])}"
        )
    return target


def _refuse_new_parts(config: ViTConfig, changes: dict[str, Any]) -> None:
    """Raises ValueError where a change asks for weights that nothing can be made of."""
    pooling = changes.get("pooling", config.pooling)
    if pooling != config.pooling and (config.pooling, pooling) != ("cls", "mean"):
        raise ValueError(
            f"--config_overrides makes another encoder: pooling {config.pooling} cannot become {pooling} (cls can become "
            "mean); leave pooling out, or train from scratch with --preset"
        )
    kind = changes.get("position_embedding", config.position_embedding)
    if kind != config.position_embedding:
        raise ValueError(
            f"position_embedding: the weights have {config.position_embedding}, which cannot become {kind}; leave "
            "position_embedding out of --config_overrides, or train from scratch with --preset"
        )


def _fit_positions(weights: dict[str, Tensor], old: ViTConfig, new: ViTConfig) -> None:
    """Changes the weights of an `old` ViT to the class token and the grid of a `new` one, in place."""
    embeddings = "vit.embeddings."
    if old.has_class_token and not new.has_class_token:
        weights.pop(embeddings + "cls_token")
        if old.position_embedding == "learned_1d":
            weights[embeddings + "position_embeddings"] = weights[embeddings + "position_embeddings"][:, 1:]
    (rows, columns), (new_rows, new_columns) = old.grid_size, new.grid_size
    for name, grid_size, new_grid_size in (
        ("position_embeddings", old.grid_size, new.grid_size),
        ("row_position_embeddings", (rows, 1), (new_rows, 1)),
        ("column_position_embeddings", (columns, 1), (new_columns, 1)),
    ):
        if embeddings + name in weights:
            resized = resize_position_embeddings(weights[embeddings + name], grid_size, new_grid_size)
            weights[embeddings + name] = resized
    for key in weights:
        if key.endswith("relative_position_bias_table"):
            table = resize_relative_table(weights[key], old.grid_size, new.grid_size)
            weights[key] = table[:-3] if old.num_prefix_tokens and not new.num_prefix_tokens else table
