"""Architectures by name, and models built from a preset or from weights. Knows no data and no training."""

import copy
import dataclasses
import difflib
import os
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from .configuration_vit import ViTConfig
from .layers import resize_position_embeddings
from .modeling_vit import ViTForImageClassification

# layer_norm_eps 1e-6: google-research/vision_transformer (flax's LayerNorm) and timm; transformers' default is 1e-12.
PRESETS: dict[str, dict[str, Any]] = {
    # 16 tokens: trains about a thousand images a second on a laptop's two cores. initializer_range is about
    # 1/sqrt(hidden_size): with transformers' 0.02, meant for width 768, so narrow a model learns slowly at first
    "vit-demo-patch8-32": dict(
        image_size=32, patch_size=8, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=512, layer_norm_eps=1e-6, initializer_range=0.09,
    ),
    # 10.7 M parameters: the small variant usual for CIFAR-10 from scratch
    "vit-small-patch4-32": dict(
        image_size=32, patch_size=4, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
        intermediate_size=1536, layer_norm_eps=1e-6,
    ),
    # ViT-B/16: ViT paper, table 1
    "vit-base-patch16-224": dict(
        image_size=224, patch_size=16, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, layer_norm_eps=1e-6,
    ),
}  # fmt: skip


def preset_config(name: str, **changes: Any) -> ViTConfig:
    """The configuration of a preset with some fields changed. Raises ValueError for an unknown preset."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"no such preset; {hint}presets: {', '.join(PRESETS)}")
    return make_config({**PRESETS[name], **changes})


def make_config(fields: dict[str, Any]) -> ViTConfig:
    """A configuration; raises ValueError for a value of the wrong type too, which its base class does in its own way."""
    try:
        return ViTConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`"drop_path_rate=0.1,pooling=mean"` -> {field: value}, values as YAML reads them.

    Raises:
        ValueError: a part that is not NAME=VALUE, or a name that is no field of ViTConfig.
    """
    fields = {item.name for item in dataclasses.fields(ViTConfig)}
    architecture = fields - {item.name for item in dataclasses.fields(transformers.PreTrainedConfig)}
    overrides = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise ValueError(f"--config_overrides: {part!r} is not NAME=VALUE")
        if name not in architecture:
            close = difflib.get_close_matches(name, architecture, n=3, cutoff=0.6) or sorted(architecture)
            raise ValueError(f"--config_overrides: {name!r} is no field of ViTConfig, nearest: {', '.join(close)}")
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):  # YAML reads 1e-6 as text
            try:
                parsed = float(parsed)
            except ValueError:
                parsed = None if parsed.lower() == "none" else parsed
        overrides[name] = parsed
    return overrides


def load_pretrained(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False, need_head: bool = False
) -> transformers.PreTrainedModel:
    """An image classifier from a Hub id or a folder, in fp32. `vit` and `vit_hf` become our class; any other model
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
    model_class = transformers.AutoModelForImageClassification
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if config.get("model_type") in ("vit", ViTConfig.model_type):
        model_class, extra = ViTForImageClassification, {}
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


def from_preset(name: str, class_names: list[str], changes: dict[str, Any]) -> ViTForImageClassification:
    """A preset with random weights for these classes. Raises ValueError for an unknown preset or wrong changes."""
    return ViTForImageClassification(preset_config(name, **changes, **_labels(class_names)))


def _labels(class_names: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }


def for_new_labels(
    model: ViTForImageClassification, class_names: list[str], changes: dict[str, Any], *, keep_head: bool = False
) -> ViTForImageClassification:
    """The same encoder under a zero-initialised linear head for `class_names`, with the fields in `changes` changed
    (another `image_size` resizes the position embeddings, `pooling=mean` drops the class token).

    Args:
        keep_head: keep the head as it is; the class names must then be the model's own.

    Raises:
        ValueError: changes that make another encoder, or a model that is none of ours.

    Source: ViT paper, section 3.2 (zero-initialised D x K layer, interpolated position embeddings).
    """
    if not isinstance(model, ViTForImageClassification):
        raise ValueError(f"its model_type is {model.config.model_type}; vit and vit_hf can be trained")
    fields = model.config.to_dict()
    for name in ("num_labels", "model_type", "auto_map", "architectures"):
        fields.pop(name, None)
    if not keep_head:
        fields["head_hidden_size"] = None
    fields.update(changes, **_labels(class_names))
    target = ViTForImageClassification(make_config(fields))
    weights = copy.copy(model.state_dict())
    positions = "vit.embeddings.position_embeddings"
    if model.config.pooling == "cls" != target.config.pooling:
        weights[positions] = weights[positions][:, 1:]
        weights.pop("vit.embeddings.cls_token")
    weights[positions] = resize_position_embeddings(
        weights[positions], model.config.grid_size, target.config.grid_size
    )
    if not keep_head:
        weights = {key: value for key, value in weights.items() if key.startswith("vit.")}
        nn.init.zeros_(target.classifier.weight)
        nn.init.zeros_(target.classifier.bias)
    try:
        missing, unexpected = target.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise ValueError(f"--config_overrides makes another encoder than the weights are for: {reason[0]}") from None
    left_out = [key for key in missing if key.startswith("vit.") or keep_head] + unexpected
    if left_out:
        raise ValueError(
            f"--config_overrides makes another encoder than the weights are for: {', '.join(left_out[:5])}"
        )
    return target
