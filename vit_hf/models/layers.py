# Copyright 2021 Google AI, Ross Wightman and The HuggingFace Inc. team (the structure of the stock ViT layers).
# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of a Vision Transformer, in the order in which an image meets them.

B batch, C channels, H W pixels, P patch side, N tokens, D hidden size. Tensor names are those of transformers' ViT,
so that a stock checkpoint fits as it is. This module must not know about heads, labels or files.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vit import ViTConfig, _pair


class PatchEmbeddings(nn.Module):
    """Cuts an image into patches and projects each: (B, C, H, W) -> (B, N, D).

    Source: ViT paper (arXiv 2010.11929), equation 1; the projection as a convolution with stride P.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        patch_size = _pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # DeepSpeed keeps the weights in 16 bits and does not cast the input; autocast does its own casting
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    """Patch embeddings, a class token where the pooling reads one, and learned positions: (B, C, H, W) -> (B, N, D).

    Source: ViT paper, equation 1 and section 3.1.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.image_size = _pair(config.image_size)
        self.patch_size = _pair(config.patch_size)
        self.grid_size = config.grid_size
        self.patch_embeddings = PatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.pooling == "cls" else None
        num_tokens = self.grid_size[0] * self.grid_size[1] + (self.cls_token is not None)
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        height, width = pixel_values.shape[-2:]
        positions = self.position_embeddings
        if (height, width) != self.image_size:
            if not interpolate_pos_encoding:
                expected = "x".join(map(str, self.image_size))
                raise ValueError(f"the input is {height}x{width} pixels, the model takes {expected}")
            grid_size = (height // self.patch_size[0], width // self.patch_size[1])
            positions = resize_position_embeddings(positions, self.grid_size, grid_size)
        tokens = self.patch_embeddings(pixel_values)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return self.dropout(tokens + positions)


def resize_position_embeddings(
    positions: Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> Tensor:
    """Resizes learned positions to another grid: (1, k + h*w, D) -> (1, k + new_h*new_w, D); the first k rows (class
    token) stay. Bicubic, and antialiased, which matters when the grid shrinks.

    Source: ViT paper, section 3.2 ("2D interpolation of the pre-trained position embeddings").
    """
    if grid_size == new_grid_size:
        return positions
    num_patches = grid_size[0] * grid_size[1]
    extra, grid = positions[:, :-num_patches], positions[:, -num_patches:]
    grid = grid.transpose(1, 2).reshape(1, -1, *grid_size).float()
    grid = nn.functional.interpolate(grid, size=new_grid_size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((extra, grid.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention written out: query, key, value (B, heads, N, D/heads) -> (B, N, heads, D/heads), weights (B, heads, N, N).

    Source: ViT paper, appendix A, equations 5 to 8.
    """
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D). Source: ViT paper, appendix A."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = eager_attention_forward  # the only form that has the weights to show
        if not output_attentions:
            name = self.config._attn_implementation
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class MLP(nn.Module):
    """Two linear layers with an activation between: (B, N, D) -> (B, N, D). Source: ViT paper, section 3.1."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class DropPath(nn.Module):
    """Leaves a residual branch out for a random share `rate` of the samples of a training batch, and scales the rest
    by 1 / (1 - rate): (B, N, D) -> (B, N, D). Source: arXiv 1603.09382."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return hidden_states
        shape = (len(hidden_states),) + (1,) * (hidden_states.ndim - 1)
        keep = torch.empty(shape, device=hidden_states.device).bernoulli_(1 - self.rate).div_(1 - self.rate)
        return hidden_states * keep.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Layer(GradientCheckpointingLayer):
    """One encoder layer, normalised before each branch: (B, N, D) -> (B, N, D), attention weights or None.

    Source: ViT paper, equations 2 and 3; dropout after each dense layer as in its appendix B.1.
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        attention, weights = self.attention(self.layernorm_before(hidden_states), output_attentions)
        hidden_states = hidden_states + self.drop_path(self.dropout(attention))
        mlp = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(mlp)), weights
