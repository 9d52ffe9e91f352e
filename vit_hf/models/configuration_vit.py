# Copyright 2021 Google AI and The HuggingFace Inc. team (the structure of the stock ViT configuration).
# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""The fields of a Vision Transformer: those of transformers' ViTConfig and the paper's switches that it lacks."""

import dataclasses
from typing import Any

import transformers
from transformers.activations import ACT2FN

POSITIVE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")


class ViTConfig(transformers.ViTConfig):
    """transformers' ViTConfig with the paper's switches.

    A configuration whose own fields all have their defaults `is_stock`: it describes a plain transformers ViT, and
    the model is saved as one (`model_type: vit`).

    Args:
        pooling: what the head reads. `cls`: the output of a class token (ViT paper, section 3.1). `mean`: the mean of
            the patch tokens, without a class token (ViT paper, appendix D.3; arXiv 2205.01580).
        head_hidden_size: width of the tanh layer before the classifier, the paper's pretraining head (section 3.1);
            None is the linear head of fine-tuning.
        drop_path_rate: chance that the last layer's residual branches are left out for a sample, growing linearly
            from 0 at the first layer (arXiv 1603.09382).

    Raises:
        ValueError: a field value that does not exist, or sizes that do not divide.
    """

    model_type = "vit_hf"

    pooling: str = "cls"
    head_hidden_size: int | None = None
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling: {self.pooling!r} is not one of cls, mean")
        sizes = {name: getattr(self, name) for name in POSITIVE} | {"head_hidden_size": self.head_hidden_size}
        sizes |= {"image_size": min(_pair(self.image_size)), "patch_size": min(_pair(self.patch_size))}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: {size} is out of range, allowed is 1 or more")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: {self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}")
        for name in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range, allowed is 0 to below 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        for size, patch in zip(_pair(self.image_size), _pair(self.patch_size), strict=True):
            if size % patch or size < patch:
                raise ValueError(f"image_size {size} is not divisible by patch_size {patch}")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches along the height and the width."""
        (height, width), (patch_height, patch_width) = _pair(self.image_size), _pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass, two for each multiply-add; norms, activations and
        softmax are not counted. A training step takes about three times as many."""
        patches = self.grid_size[0] * self.grid_size[1]
        tokens = patches + (self.pooling == "cls")
        width, head = self.hidden_size, self.head_hidden_size
        patch_values = self.num_channels * _pair(self.patch_size)[0] * _pair(self.patch_size)[1]
        layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * self.intermediate_size
        head_macs = width * self.num_labels if head is None else (width + self.num_labels) * head
        return 2 * (patches * patch_values * width + self.num_hidden_layers * layer + head_macs)

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own ViT is the same model."""
        return all(getattr(self, item.name) == item.default for item in own_fields())

    def to_stock(self) -> transformers.ViTConfig:
        """The same model as transformers' own configuration. Raises ValueError where there is none."""
        if not self.is_stock:
            changed = [item.name for item in own_fields() if getattr(self, item.name) != item.default]
            raise ValueError(f"transformers' ViT has no {', '.join(changed)}")
        drop = {item.name for item in own_fields()} | {"model_type", "auto_map", "architectures"}
        return transformers.ViTConfig(**{k: v for k, v in self.to_dict().items() if k not in drop})

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a stock `vit` configuration as what it is here: this one with its own fields at their defaults."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == "vit":
            config["model_type"] = cls.model_type
        return config, kwargs


def own_fields() -> list[dataclasses.Field]:
    """The fields that transformers' ViTConfig does not have."""
    stock = {item.name for item in dataclasses.fields(transformers.ViTConfig)}
    return [item for item in dataclasses.fields(ViTConfig) if item.name not in stock]


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


ViTConfig.register_for_auto_class()
