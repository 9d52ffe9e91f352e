"""Models from given weights: loaded, and fitted to other classes, another image size, another pooling. Knows no data
and no training."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .configuration_vit import ViTConfig, pair
from .modeling_vit import ViTForImageClassification
from .positions import resize_position_embeddings, resize_relative_table
from .presets import FAMILIES, PRESETS, checked_overrides, from_preset, labels_of, make_config, preset_config


@dataclass(frozen=True)
class ModelSettings:
    """Which model, as the flags of the same names say: a preset with random weights, or given weights."""

    preset: str | None = None
    model_name_or_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = field(default_factory=dict)
    image_size: int | tuple[int, int] | None = None
    seed: int = 0

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the configuration that are asked for."""
        if self.image_size is None:
            return self.config_overrides
        size = self.image_size if isinstance(self.image_size, int) else list(self.image_size)
        return {**self.config_overrides, "image_size": size}


def make_model(
    class_names: list[str], settings: ModelSettings, *, keep_head: bool = False
) -> transformers.PreTrainedModel:
    """The model that a run trains, in fp32 on the CPU: a preset with random weights, or given weights under a linear head
    for these classes. The same on every process.

    Args:
        keep_head: keep the head of weights whose class names are these, to go on training the same model.

    Raises:
        ValueError: what cannot be built, loaded or trained, and why.
        OSError: no such folder or repository.
    """
    torch.manual_seed(settings.seed)
    if settings.preset is not None:
        model = from_preset(settings.preset, class_names, settings.changes)
    else:
        given = load_pretrained(
            settings.model_name_or_path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        same_classes = list(given.config.id2label.values()) == class_names
        model = for_new_labels(given, class_names, settings.changes, keep_head=keep_head and same_classes)
    check_channels(model.config)
    return model


def check_channels(config: transformers.PreTrainedConfig) -> None:
    """Raises ValueError for a model of other images than RGB ones."""
    if config.num_channels != 3:
        raise ValueError(f"num_channels is {config.num_channels}, and images are read as RGB: allowed is 3")


def published_image_size(settings: ModelSettings) -> tuple[int, int]:
    """The input, (height, width) in pixels, that a preset or given weights have of themselves; 224 where neither is named
    or none is said."""
    if settings.preset is not None:
        return pair(preset_config(settings.preset).image_size)
    if settings.model_name_or_path is None:
        return pair(224)
    config = transformers.AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.revision)
    return pair(getattr(config, "image_size", None) or 224)


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
    if os.path.isdir(name_or_path):
        if not os.path.isfile(os.path.join(name_or_path, "config.json")):
            raise OSError(no_model(name_or_path))
    elif name_or_path in PRESETS:
        raise ValueError("it is a preset, which has no weights; name a folder or a Hub id")
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
    if missing and not misshaped and all(key.startswith("classifier.") for key in missing):
        raise ValueError(
            f"it has no head ({', '.join(sorted(missing)[:5])}), so its answers would be chance: fine-tune it, "
            f"run_finetune.py --model_name_or_path {name_or_path}, or judge its features, vit-hf probe {name_or_path}"
        )
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


def no_model(folder: str) -> str:
    """Says of a folder without config.json that it is no model, and which right below it are."""
    found = sorted(one for one in os.listdir(folder) if os.path.isfile(os.path.join(folder, one, "config.json")))
    below = ", ".join(os.path.join(folder, one) for one in found[:8]) + (", ..." if len(found) > 8 else "")
    return "it holds no config.json, so it is no model folder" + (f"; below it are {below}" if found else "")


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
    changes = checked_overrides(type(model.config), changes)
    fields = model.config.to_dict()
    if isinstance(model, ViTForImageClassification):
        _refuse_new_parts(model.config, changes)
    other = [f"{name} {fields[name]}" for name in changes if name not in FREE and changes[name] != fields[name]]
    if other:
        raise ValueError(
            f"--config_overrides makes another encoder than the weights are for, which has {', '.join(other)}; "
            f"allowed are {', '.join(FREE)}"
        )
    fields = _new_fields(model.config, keep_head) | changes | labels_of(class_names)
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


def _new_fields(config: transformers.PreTrainedConfig, keep_head: bool) -> dict[str, Any]:
    """Those of a configuration that stay under other labels, and at another size."""
    fields = config.to_dict()
    for name in ("num_labels", "model_type", "auto_map", "architectures"):
        fields.pop(name, None)
    if not keep_head and "head_hidden_size" in fields:
        fields["head_hidden_size"] = None
    if fields.get("position_embedding") == "sincos_2d":  # the places of another size lie between those of the weights
        fields["learned_grid_size"] = fields["learned_grid_size"] or list(config.grid_size)
    return fields


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
