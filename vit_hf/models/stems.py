# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""What makes tokens of pixels: (B, C, H, W) -> (B, N, D). One class a stem; each ends in a `projection` to D.

B batch, C channels, H W pixels, P patch side, N patch tokens, D hidden size. This module must not know about positions,
attention, heads or files.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_vit import ViTConfig, pair


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product over the patches:
    (B, C, H, W) -> (B, N, D). The weight keeps a convolution's name and shape.

    One class with its own forward, because ZeRO-3 gathers a module's weights when the module is called.
    """

    def __init__(self, num_channels: int, hidden_size: int, patch_size: tuple[int, int]):
        super().__init__(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, channels, height, width = pixel_values.shape
        patch_height, patch_width = self.kernel_size
        rows, columns = height // patch_height, width // patch_width
        patches = pixel_values.reshape(batch, channels, rows, patch_height, columns, patch_width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbeddings(nn.Module):
    """Cuts an image into patches and projects each: (B, C, H, W) -> (B, N, D).

    Source: ViT paper (arXiv 2010.11929), equation 1.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.projection = PatchProjection(config.num_channels, config.hidden_size, pair(config.patch_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm (B, C, H, W) -> (B, C, H, W) that also takes weights of another precision than its statistics: DeepSpeed
    turns parameters into 16 bits and leaves buffers in fp32, where running averages belong."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight.dtype == self.running_mean.dtype:
            return super().forward(hidden_states)
        if self.training:
            self.num_batches_tracked.add_(1)
        weight, bias = (parameter.to(self.running_mean.dtype) for parameter in (self.weight, self.bias))
        return nn.functional.batch_norm(
            hidden_states, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )


class ConvStem(nn.Module):
    """Early convolutions: 3x3 of stride 2, each with BatchNorm and ReLU, until a position is one patch apart from the
    next, then a 1x1: (B, C, H, W) -> (B, N, D). Channels double from one to the next, and the last two have D.

    Source: arXiv 2106.14881, section 4 and appendix ("ViT_C").
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        steps = int(math.log2(pair(config.patch_size)[0]))
        channels = [config.num_channels, *(config.hidden_size // 2 ** (steps - 1 - step) for step in range(steps))]
        self.convolutions = nn.Sequential()
        for inputs, outputs in zip(channels, channels[1:]):
            self.convolutions.append(nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False))
            self.convolutions.append(BatchNorm(outputs))
            self.convolutions.append(nn.ReLU())
        self.projection = PatchProjection(config.hidden_size, config.hidden_size, (1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.convolutions(pixel_values))


class StandardisedConv(nn.Conv2d):
    """A convolution without bias, whose weight has mean 0 and standard deviation 1 for each output channel, padded as
    TensorFlow's SAME pads an even input. Source: arXiv 1903.10520; google-research/vision_transformer, StdConv."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel_size, stride, bias=False)
        total = kernel_size - stride if kernel_size > 1 else 0
        self.pad = (total // 2, total - total // 2) * 2

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        deviation, mean = weight.std(dim=(1, 2, 3), keepdim=True, correction=0), weight.mean((1, 2, 3), keepdim=True)
        weight = ((weight - mean) / (deviation + 1e-5)).to(self.weight.dtype)
        return nn.functional.conv2d(nn.functional.pad(hidden_states, self.pad), weight, stride=self.stride)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups; eps as in flax."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResNetUnit(nn.Module):
    """A bottleneck unit: 1x1, 3x3 (with the stride), 1x1 to four times the width, a shortcut, ReLU at the end.

    Source: google-research/vision_transformer, models_resnet.py, ResidualUnit.
    """

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = StandardisedConv(inputs, width, 1), group_norm(width)
        self.conv2, self.norm2 = StandardisedConv(width, width, 3, stride), group_norm(width)
        self.conv3, self.norm3 = StandardisedConv(width, 4 * width, 1), group_norm(4 * width)
        self.conv_shortcut = self.norm_shortcut = nn.Identity()
        if inputs != 4 * width or stride != 1:
            self.conv_shortcut = StandardisedConv(inputs, 4 * width, 1, stride)
            self.norm_shortcut = group_norm(4 * width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shortcut = self.norm_shortcut(self.conv_shortcut(hidden_states))
        hidden_states = self.norm1(self.conv1(hidden_states)).relu()
        hidden_states = self.norm2(self.conv2(hidden_states)).relu()
        return (shortcut + self.norm3(self.conv3(hidden_states))).relu()


class ResNetBackbone(nn.Module):
    """A ResNet with GroupNorm and standardised convolutions: (B, C, H, W) -> (B, C', H/stride, W/stride), a stride of
    4 in the root and 2 in each stage after the first. Source: ViT paper, section 3.1; BiT, arXiv 1912.11370."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.conv, self.norm = (
            StandardisedConv(config.num_channels, config.stem_width, 7, 2),
            group_norm(config.stem_width),
        )
        self.stages, inputs = nn.ModuleList(), config.stem_width
        for stage, depth in enumerate(config.stem_depths):
            width = config.stem_width * 2**stage
            units = [ResNetUnit(inputs, width, 2 if stage else 1)]
            units += [ResNetUnit(4 * width, width, 1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*units))
            inputs = 4 * width
        self.num_channels = inputs

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden_states = self.norm(self.conv(pixel_values)).relu()
        hidden_states = nn.functional.pad(hidden_states, (0, 1, 0, 1))  # SAME; zero is the least after a ReLU
        hidden_states = nn.functional.max_pool2d(hidden_states, kernel_size=3, stride=2)
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return hidden_states


class HybridResNetStem(nn.Module):
    """A ResNet's feature map cut into patches, each projected: (B, C, H, W) -> (B, N, D).

    Source: ViT paper, section 3.1, "hybrid architecture".
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.backbone = ResNetBackbone(config)
        self.projection = PatchProjection(self.backbone.num_channels, config.hidden_size, pair(config.patch_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.backbone(pixel_values))


STEMS = {"patch": PatchEmbeddings, "conv": ConvStem, "hybrid_resnet": HybridResNetStem}
