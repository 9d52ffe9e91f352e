# Copyright 2021 Google AI, Ross Wightman and The HuggingFace Inc. team (the structure of the stock ViT layers).
# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of a Vision Transformer after its stem, in the order in which a token meets them.

B batch, C channels, H W pixels, N tokens, D hidden size, h w rows and columns of patches. Tensor names are those of
transformers' ViT, so that a stock checkpoint fits as it is. This module must not know about heads, labels or files.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vit import ViTConfig
from .positions import (
    Grid,
    join_axes,
    relative_table_rows,
    resize_position_embeddings,
    resize_relative_table,
    sincos_position_embeddings,
)
from .stems import STEMS

# what a layer with relative positions needs of the image at hand: the index of relative_position_index, and its grid
RelativePositions = tuple[Tensor, Grid]


class Embeddings(nn.Module):
    """Patch tokens with their positions, behind a class token and registers where there are any:
    (B, C, H, W) -> (B, k + h*w, D).

    Source: ViT paper (arXiv 2010.11929), equation 1, section 3.1 and appendix D.4.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.kind, self.grid_size, width = config.position_embedding, config.grid_size, config.hidden_size
        rows, columns = self.grid_size
        self.patch_embeddings = STEMS[config.stem](config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.has_class_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        if self.kind == "learned_1d":
            self.position_embeddings = nn.Parameter(torch.zeros(1, config.has_class_token + rows * columns, width))
        elif self.kind == "learned_2d":
            self.row_position_embeddings = nn.Parameter(torch.zeros(1, rows, width // 2))
            self.column_position_embeddings = nn.Parameter(torch.zeros(1, columns, width // 2))
        elif self.kind == "sincos_2d":  # computed, so no part of the saved weights
            self.width, self.learned_grid_size = width, config.learned_grid_size or config.grid_size
            self.register_buffer("sincos_position_embeddings", self.sincos(self.grid_size), persistent=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, grid_size: Grid) -> Tensor:
        # DeepSpeed keeps the weights in 16 bits and does not cast the input; autocast does its own casting, and leaves
        # the sums of the residual stream in the weights' precision
        dtype = self.patch_embeddings.projection.weight.dtype
        tokens = self.patch_embeddings(pixel_values.to(dtype)).to(dtype)
        positions = self.positions(grid_size)
        first = self.cls_token
        if self.kind == "learned_1d" and first is not None:
            first, positions = first + positions[:, :1], positions[:, 1:]
        if positions is not None:
            tokens = tokens + positions.to(dtype)  # a buffer may have kept another one
        prefix = [part.expand(tokens.shape[0], -1, -1) for part in (first, self.register_tokens) if part is not None]
        return self.dropout(torch.cat((*prefix, tokens), dim=1) if prefix else tokens)

    def positions(self, grid_size: Grid) -> Tensor | None:
        """What is added to the tokens of this grid: (1, h*w, D), with a row for the class token before them where it
        has a position (`learned_1d`); None where nothing is added."""
        if self.kind == "learned_1d":
            return resize_position_embeddings(self.position_embeddings, self.grid_size, grid_size)
        if self.kind == "learned_2d":
            (rows, columns), (new_rows, new_columns) = self.grid_size, grid_size
            return join_axes(
                resize_position_embeddings(self.row_position_embeddings, (rows, 1), (new_rows, 1)),
                resize_position_embeddings(self.column_position_embeddings, (columns, 1), (new_columns, 1)),
            )
        if self.kind == "sincos_2d":
            table = self.sincos_position_embeddings
            if grid_size == self.grid_size:
                return table
            return self.sincos(grid_size).to(table)
        return None

    def sincos(self, grid_size: Grid) -> Tensor:
        """The fixed positions of this grid, in the places that the model has learned: (1, h*w, D)."""
        return sincos_position_embeddings(grid_size, self.width, tuple(self.learned_grid_size))


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention written out: query (B, heads, M, D/heads), key, value (B, heads, N, D/heads) -> (B, M, heads, D/heads),
    weights (B, heads, M, N).

    Args:
        position_bias: added to the logits, (1, heads, M, N).

    Source: ViT paper, appendix A, equations 5 to 8.
    """
    logits = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        logits = logits + position_bias
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights


class Attention(nn.Module):
    """Multi-head attention of `queries` (B, M, D), by default the tokens themselves or the first `num_queries` of them,
    to tokens (B, N, D) -> (B, M, D).

    Source: ViT paper, appendix A; q_norm and k_norm: arXiv 2302.05442, section 2.1.
    """

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: ViTConfig, *, in_encoder: bool = True):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        normed = config.qk_norm and in_encoder
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if normed else nn.Identity() for _ in range(2)
        )
        self.relative_position_bias_table = None
        if config.position_embedding == "relative" and in_encoder:
            rows = relative_table_rows(config.grid_size, config.num_prefix_tokens)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, config.num_attention_heads))

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_positions: RelativePositions | None = None,
        num_queries: int | None = None,
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        device = hidden_states.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # once, and not in each of the three projections
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        queries = hidden_states[:, :num_queries] if queries is None else queries
        query = self.q_norm(self.split_heads(self.q_proj(queries)))
        key = self.k_norm(self.split_heads(self.k_proj(hidden_states)))
        value = self.split_heads(self.v_proj(hidden_states))
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast norms in fp32
        # eager is the only form that has the weights to show
        name = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        bias = {}
        if relative_positions is not None:
            all_pairs = self.position_bias(*relative_positions).to(value.dtype)
            bias["position_bias"] = all_pairs[:, :, : query.shape[2]]
            if name == "flex_attention":  # it looks the bias of each image up
                bias["position_bias"] = bias["position_bias"].expand(value.shape[0], -1, -1, -1)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **bias)
        return self.o_proj(output.reshape(queries.shape)), weights

    def split_heads(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D/heads)"""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def position_bias(self, index: Tensor, grid_size: Grid) -> Tensor:
        """The bias of each head for each pair of tokens of this grid: (1, heads, N, N)."""
        table = resize_relative_table(self.relative_position_bias_table, self.config.grid_size, grid_size)
        bias = table[index].permute(2, 0, 1)[None]
        # a bias that wants a gradient is traced into a form of attention that the exporter cannot translate
        return bias.detach() if torch.onnx.is_in_onnx_export() else bias


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
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        keep = torch.empty(shape, device=hidden_states.device).bernoulli_(1 - self.rate).div_(1 - self.rate)
        return hidden_states * keep.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch: (B, N, D) -> (B, N, D). Source: arXiv 2103.17239."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.gamma


class Layer(GradientCheckpointingLayer):
    """One encoder layer, normalised before each branch: (B, N, D) -> (B, N, D), attention weights or None.

    Source: ViT paper, equations 2 and 3. Dropout after attention and MLP as transformers; the authors' code drops after
    the first layer of the MLP too.
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float):
        super().__init__()
        scaled = config.layer_scale_init is not None
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(config) if scaled else nn.Identity()
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale2 = LayerScale(config) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_positions: RelativePositions | None = None,
        num_outputs: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """num_outputs: only so many tokens, from the first on, are asked for; they attend to all."""
        normed = self.layernorm_before(hidden_states)
        attention, weights = self.attention(normed, output_attentions, relative_positions, num_outputs)
        hidden_states = hidden_states[:, :num_outputs] + self.drop_path(self.layer_scale1(self.dropout(attention)))
        mlp = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale2(self.dropout(mlp))), weights


class AttentionPooling(nn.Module):
    """A learned probe attends to the tokens, an MLP follows: (B, N, D) -> (B, D).

    Source: arXiv 2106.04560, section 3.2 (MAP head); google-research/big_vision, MAPHead.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = Attention(config, in_encoder=False)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled, _ = self.attention(tokens, queries=self.probe.expand(tokens.shape[0], -1, -1))
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
