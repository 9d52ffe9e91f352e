# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""ResNet and BiT, to compare a ViT with: transformers' own models, and with a stem for small images.

Source: ResNet paper (arXiv 1512.03385); BiT, the ResNet of the ViT paper (section 4.1), with group normalisation and
weight standardisation (arXiv 1912.11370).

This module must not know about presets of the ViT, data or training.
"""

from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d, make_div
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from .losses import classification_loss
from .saving import ReadsStock, SavesAsStock
from .stems import BatchNorm


class _BaselineConfig(ReadsStock):
    """What both configurations add to transformers' own.

    stock_config_class: the configuration of transformers with the same model.
    """

    stock_config_class = None  # without annotation: not a field of the configuration

    def __post_init__(self, **kwargs):
        for name in ("depths", "hidden_sizes"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a list of numbers of 1 or more")
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError(f"depths has {len(self.depths)} stages, hidden_sizes {len(self.hidden_sizes)}")
        for name in ("num_channels", "embedding_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range, allowed is 1 or more")
        sides = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image_size: {self.image_size} is neither a side nor [height, width], of 1 or more")
        if self.layer_type not in self.layer_types:  # transformers' own check does not run for a subclass
            raise ValueError(f"layer_type: {self.layer_type!r} is not one of {', '.join(self.layer_types)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: {self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}")
        super().__post_init__(**kwargs)

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own class is the same model."""
        return not self.cifar_stem

    def to_stock(self) -> transformers.PreTrainedConfig:
        """The same model as transformers' own configuration. `image_size`, which that does not have, stays in it as
        an entry that transformers keeps and does not use. Raises ValueError where there is none."""
        if not self.is_stock:
            raise ValueError(f"transformers' {self.stock_config_class.model_type} has no cifar_stem")
        drop = {"cifar_stem", "model_type", "auto_map", "architectures"}
        return self.stock_config_class(**{k: v for k, v in self.to_dict().items() if k not in drop})


@strict
class ResNetConfig(_BaselineConfig, transformers.ResNetConfig):
    """transformers' ResNetConfig with a size and a stem for small images.

    Args:
        image_size: what the model is meant for; it takes any size.
        cifar_stem: a 3x3 convolution of stride 1 and no pooling where the stock model has a 7x7 of stride 2 and a
            pooling of stride 2 (ResNet paper, section 4.2). The stages stay those of the stock model.

    Raises:
        ValueError: a field value that does not exist or is out of range.
    """

    model_type = "vit_hf_resnet"
    stock_type = "resnet"
    stock_config_class = transformers.ResNetConfig

    image_size: int | list[int] = 224
    cifar_stem: bool = False


@strict
class BitConfig(_BaselineConfig, transformers.BitConfig):
    """transformers' BitConfig with a size and a stem for small images.

    Args:
        image_size: what the model is meant for; it takes any size.
        cifar_stem: as in ResNetConfig, with a weight-standardised convolution. The BiT paper has no such stem: it
            enlarges small images instead.

    Raises:
        ValueError: a field value that does not exist or is out of range, or channels that num_groups does not divide.
    """

    model_type = "vit_hf_bit"
    stock_type = "bit"
    stock_config_class = transformers.BitConfig

    image_size: int | list[int] = 224
    cifar_stem: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: {self.drop_path_rate} is out of range, allowed is 0 to below 1")
        # transformers accepts these, and its model then fails in the first forward pass
        if self.width_factor != 1:
            raise ValueError(f"width_factor: {self.width_factor} does not fit the head, widen hidden_sizes instead")
        if self.global_padding not in (None, "SAME"):
            raise ValueError(f"global_padding: {self.global_padding!r} is not one of None, 'SAME'")
        if any(size % 8 for size in self.hidden_sizes):  # its stages are rounded to multiples of 8, its head is not
            raise ValueError(f"hidden_sizes: {self.hidden_sizes} are not multiples of 8")
        if self.num_groups < 1:
            raise ValueError(f"num_groups: {self.num_groups} is out of range, allowed is 1 or more")
        inner = [make_div(size * 0.25) for size in self.hidden_sizes]  # inside the bottlenecks
        for channels in (self.embedding_size, *self.hidden_sizes, *inner):
            if channels % self.num_groups:
                raise ValueError(f"num_groups {self.num_groups} does not divide {channels} channels of this model")


def _code(family: str) -> dict[str, str]:
    return {
        "AutoConfig": f"baselines.{family}Config",
        "AutoModel": f"baselines.{family}Model",
        "AutoModelForImageClassification": f"baselines.{family}ForImageClassification",
    }


class _Classifier(SavesAsStock):
    """The forward pass of both classifiers around transformers' own."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """(B, C, H, W) -> logits (B, K).

        labels: by config.problem_type, see classification_loss; where that is None, class indices int64 (B,) or
        probabilities float (B, K), with cross-entropy for both.
        """
        # DeepSpeed keeps the weights in 16 bits and hands the images over as they are; autocast does its own casts
        pixel_values = pixel_values.to(next(self.parameters()).dtype)
        output = super().forward(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        if labels is not None:  # here, because transformers' own keeps the problem type that it guesses of the labels
            output = ImageClassifierOutputWithNoAttention(
                loss=classification_loss(self.loss_function, labels, output.logits, self.config),
                logits=output.logits,
                hidden_states=output.hidden_states,
            )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def _change_resnet(resnet: transformers.ResNetModel) -> None:
    """Puts into transformers' encoder what is different in ours; the names of its tensors stay."""
    config, stem = resnet.config, resnet.embedder
    if config.cifar_stem:
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, activation=config.hidden_act
        )
        stem.pooler = nn.Identity()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = BatchNorm  # the same tensors, a forward pass that takes 16-bit weights too


class ResNetModel(SavesAsStock, transformers.ResNetModel):
    """transformers' ResNet without its head, with config.cifar_stem for small images."""

    config_class = ResNetConfig
    config: ResNetConfig
    stock_class = transformers.ResNetModel
    code = _code("ResNet")

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        _change_resnet(self)
        self.post_init()  # initialises what is new


class ResNetForImageClassification(_Classifier, transformers.ResNetForImageClassification):
    """transformers' ResNet: (B, C, H, W) -> logits (B, K), with config.cifar_stem for small images."""

    config_class = ResNetConfig
    config: ResNetConfig
    stock_class = transformers.ResNetForImageClassification
    code = _code("ResNet")

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        _change_resnet(self.resnet)
        self.post_init()  # initialises what is new


def _change_bit(bit: transformers.BitModel) -> None:
    """As _change_resnet."""
    config, stem = bit.config, bit.embedder
    if config.cifar_stem:
        stem.convolution = WeightStandardizedConv2d(
            config.num_channels, config.embedding_size, kernel_size=3, eps=1e-8, padding=config.global_padding
        )
        stem.pad, stem.pooler = nn.Identity(), nn.Identity()  # the padding is the pooling's
    elif not isinstance(stem.pad, nn.Identity):
        stem.pad = ZeroBorder()


class BitModel(SavesAsStock, transformers.BitModel):
    """transformers' BiT without its head, with config.cifar_stem for small images."""

    config_class = BitConfig
    config: BitConfig
    stock_class = transformers.BitModel
    code = _code("Bit")

    def __init__(self, config: BitConfig):
        super().__init__(config)
        _change_bit(self)
        self.post_init()  # initialises what is new


class BitForImageClassification(_Classifier, transformers.BitForImageClassification):
    """transformers' BiT: (B, C, H, W) -> logits (B, K), with config.cifar_stem for small images."""

    config_class = BitConfig
    config: BitConfig
    stock_class = transformers.BitForImageClassification
    code = _code("Bit")

    def __init__(self, config: BitConfig):
        super().__init__(config)
        _change_bit(self.bit)
        self.post_init()  # initialises what is new


class ZeroBorder(nn.Module):
    """A border of zeros around a feature map, as transformers' BiT pads its max pooling: (B, C, H, W) -> (B, C, H+2, W+2).

    Put on piece by piece: onnxruntime takes a padding before a max pooling for the pooling's own, which is of minus
    infinity, and the logits of an exported model are then others.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        column = torch.zeros_like(hidden_states[..., :1])
        hidden_states = torch.cat((column, hidden_states, column), dim=3)
        row = torch.zeros_like(hidden_states[..., :1, :])
        return torch.cat((row, hidden_states, row), dim=2)


_RESNET_50 = dict(layer_type="bottleneck", hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3])
_RESNET_18 = dict(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
_BIT_50 = _RESNET_50 | dict(layer_type="preactivation")
_CIFAR = dict(image_size=32, cifar_stem=True)

# Name -> configuration class and its fields. ResNet: ResNet paper, table 1; BiT: the R50x1 of its paper.
BASELINES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "resnet-50": (ResNetConfig, _RESNET_50 | dict(image_size=224)),
    "resnet-18": (ResNetConfig, _RESNET_18 | dict(image_size=224)),
    "bit-resnet-50": (BitConfig, _BIT_50 | dict(image_size=224)),
    "resnet-50-cifar": (ResNetConfig, _RESNET_50 | _CIFAR),
    "resnet-18-cifar": (ResNetConfig, _RESNET_18 | _CIFAR),
    "bit-resnet-50-cifar": (BitConfig, _BIT_50 | _CIFAR),
}

ResNetConfig.register_for_auto_class()
BitConfig.register_for_auto_class()
ResNetModel.register_for_auto_class("AutoModel")
BitModel.register_for_auto_class("AutoModel")
ResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
BitForImageClassification.register_for_auto_class("AutoModelForImageClassification")
