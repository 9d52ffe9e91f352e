# Copyright 2021 Google AI, Ross Wightman and The HuggingFace Inc. team (the structure of the stock ViT model).
# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""ViTModel (the encoder) and ViTForImageClassification (encoder, pooling, head), and how they start and are read.

This module must not know about presets, data or training.
"""

import math

import torch
import transformers
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_vit import ViTConfig, pair
from .layers import MLP, Attention, AttentionPooling, Embeddings, Layer, LayerScale, RelativePositions
from .losses import classification_loss
from .positions import Grid, relative_position_index
from .saving import SavesAsStock
from .stems import PatchProjection, ResNetUnit, StandardisedConv

# How transformers' ViT has named its tensors on disk since its first release, in terms of the names in memory.
OLDER_KEY_NAMES = {
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.query\.": "attention.q_proj.",
    r"attention\.attention\.key\.": "attention.k_proj.",
    r"attention\.attention\.value\.": "attention.v_proj.",
    r"attention\.output\.dense\.": "attention.o_proj.",
    r"intermediate\.dense\.": "mlp.fc1.",
    r"(layers\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
}


class ViTPreTrainedModel(SavesAsStock, PreTrainedModel):
    """Initialisation, reading and saving of both models."""

    config_class = ViTConfig
    config: ViTConfig
    code = {
        "AutoConfig": "configuration_vit.ViTConfig",
        "AutoModel": "modeling_vit.ViTModel",
        "AutoModelForImageClassification": "modeling_vit.ViTForImageClassification",
    }
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embeddings"  # what get_input_embeddings and set_input_embeddings mean
    supports_gradient_checkpointing = True
    _no_split_modules = ["Embeddings", "Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # a checkpoint of transformers' ViTModel carries a pooler, which classification does not use
    _keys_to_ignore_on_load_unexpected = [r"^(vit\.)?pooler\.", r"^vit\.embeddings\.mask_token$"]

    def __init__(self, config: ViTConfig):
        _refuse_flash(config, config._attn_implementation)
        super().__init__(config)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs) -> None:
        """As transformers' own. Raises ValueError for flash attention on a model with relative positions."""
        _refuse_flash(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over modules of custom code without tensors of their own, in case that the code does not
        # leave loaded tensors alone; `init`, used below, does
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for each module, its children before it."""
        super()._init_weights(module)  # normal(0, initializer_range) for weights, zero biases, unit norms
        std = self.config.initializer_range
        if isinstance(module, Embeddings):
            if module.kind == "learned_1d":
                init.trunc_normal_(module.position_embeddings, std=std)
            elif module.kind == "learned_2d":
                init.trunc_normal_(module.row_position_embeddings, std=std)
                init.trunc_normal_(module.column_position_embeddings, std=std)
            elif module.kind == "sincos_2d":
                init.copy_(module.sincos_position_embeddings, module.sincos(module.grid_size))
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=std)
            if module.register_tokens is not None:  # not zeros: equal tokens would stay equal
                init.trunc_normal_(module.register_tokens, std=std)
        elif isinstance(module, Attention) and module.relative_position_bias_table is not None:
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)  # as Swin
        elif isinstance(module, AttentionPooling):
            init.trunc_normal_(module.probe, std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.gamma, self.config.layer_scale_init)
        elif isinstance(module, ViTModel) and module.relative_position_index is not None:
            index = relative_position_index(self.config.grid_size, self.config.num_prefix_tokens)
            init.copy_(module.relative_position_index, index)
        elif isinstance(module, nn.Conv2d) and not isinstance(module, PatchProjection):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, ViTForImageClassification) and self.config.num_labels > 0:
            init.constant_(module.classifier.bias, self.config.head_bias_init)
        if self.config.initializer == "paper":
            self._init_as_paper(module)

    def _init_as_paper(self, module: nn.Module) -> None:
        """Source: google-research/vision_transformer, models_vit.py and models_resnet.py; the probe: big_vision."""
        if isinstance(module, Embeddings):
            if module.kind == "learned_1d":
                init.normal_(module.position_embeddings, std=0.02)
            if module.cls_token is not None:
                init.zeros_(module.cls_token)
        elif isinstance(module, Attention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.xavier_uniform_(projection.weight)
        elif isinstance(module, MLP):
            for linear in (module.fc1, module.fc2):
                init.xavier_uniform_(linear.weight)
                init.normal_(linear.bias, std=1e-6)
        elif isinstance(module, AttentionPooling):
            limit = math.sqrt(6 / (1 + self.config.hidden_size))
            init.uniform_(module.probe, -limit, limit)
        elif isinstance(module, (PatchProjection, StandardisedConv)):
            _lecun_normal(module.weight)
        elif isinstance(module, ResNetUnit):
            init.zeros_(module.norm3.weight)  # each unit starts as its shortcut
        elif isinstance(module, ViTForImageClassification):
            if self.config.head_hidden_size is not None:
                _lecun_normal(module.pre_logits[0].weight)
            if self.config.num_labels > 0:
                init.zeros_(module.classifier.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' own; reads a stock `vit` checkpoint too, with today's or the older tensor names."""
        kwargs.setdefault("key_mapping", OLDER_KEY_NAMES)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def _refuse_flash(config: ViTConfig, attn_implementation: str | dict[str, str] | None) -> None:
    if config.position_embedding == "relative" and "flash_attention" in str(attn_implementation):
        raise ValueError(
            f"attn_implementation: {attn_implementation} takes no bias, which position_embedding relative is; allowed are "
            "sdpa, eager, flex_attention"
        )


def _lecun_normal(weight: Tensor) -> None:
    """Normal of variance 1 / fan-in, cut off at two standard deviations: flax's default. (transformers' own of this
    name cuts off at 2, so that its correction for the cut makes the variance too large.)"""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978  # of a normal that is cut off at two
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class ViTModel(ViTPreTrainedModel):
    """The encoder: (B, C, H, W) -> tokens (B, N, D) after the final norm, and what the head reads of them (B, D).

    With `fc_norm` the final norm is that of the pooled tokens, and the tokens come as the last layer leaves them.

    Source: ViT paper, equations 1 to 4.
    """

    stock_class = transformers.ViTModel

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            Layer(config, config.drop_path_rate * index / last) for index in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_pool = AttentionPooling(config) if config.pooling == "map" else None
        index = None
        if config.position_embedding == "relative":  # one for all layers; computed, so no part of the saved weights
            index = relative_position_index(config.grid_size, config.num_prefix_tokens)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pooled_only: bool = False,
    ) -> BaseModelOutputWithPooling | tuple:
        """pooled_only: nothing but pooler_output is asked for. Where that reads the class token, the last layer is
        computed for the class token alone (and last_hidden_state holds only it)."""
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        grid_size = self.grid_size(pixel_values, bool(interpolate_pos_encoding))
        hidden_states = self.embeddings(pixel_values, grid_size)
        relative_positions = self.relative_positions(grid_size)
        all_hidden_states, all_attentions = (hidden_states,), ()
        shown = output_attentions or output_hidden_states
        read = 1 if pooled_only and not shown and self.config.pooling == "cls" else None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            num_outputs = read if index == last else None
            hidden_states, weights = layer(hidden_states, output_attentions, relative_positions, num_outputs)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        tokens, pooled = self.pool(hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def grid_size(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Grid:
        """Rows and columns of patches of these images. Raises ValueError for a size that the model does not take."""
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding:
            if (height, width) != pair(self.config.image_size):
                expected = "x".join(map(str, pair(self.config.image_size)))
                raise ValueError(f"the input is {height}x{width} pixels, the model takes {expected}")
            return self.config.grid_size
        rows, columns = self.config.token_stride
        if height % rows or width % columns:
            raise ValueError(f"the input is {height}x{width} pixels, which patches of {rows}x{columns} do not divide")
        return height // rows, width // columns

    def relative_positions(self, grid_size: Grid) -> RelativePositions | None:
        """What each layer needs for images of this grid; None where positions are not relative."""
        index = self.relative_position_index
        if index is None:
            return None
        if grid_size != self.config.grid_size:
            index = relative_position_index(grid_size, self.config.num_prefix_tokens).to(index.device)
        return index, grid_size

    def pool(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's tokens (B, N, D) -> tokens after the final norm (B, N, D), what the head reads (B, D)."""
        prefix = self.config.num_prefix_tokens
        if self.config.fc_norm:
            return hidden_states, self.layernorm(hidden_states[:, prefix:].mean(dim=1))
        tokens = self.layernorm(hidden_states)
        if self.config.pooling == "cls":
            return tokens, tokens[:, 0]
        patches = tokens[:, prefix:]
        return tokens, patches.mean(dim=1) if self.attention_pool is None else self.attention_pool(patches)


class ViTForImageClassification(ViTPreTrainedModel):
    """Encoder, pooling and head: (B, C, H, W) -> logits (B, K).

    Source: ViT paper, section 3.1: a head with one tanh hidden layer at pretraining, one linear layer at fine-tuning.
    """

    stock_class = transformers.ViTForImageClassification

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config)
        width = config.hidden_size
        if config.head_hidden_size is not None:
            self.pre_logits = nn.Sequential(nn.Linear(width, config.head_hidden_size), nn.Tanh())
            width = config.head_hidden_size
        else:
            self.pre_logits = nn.Identity()
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """`labels`: by config.problem_type, see classification_loss; where that is None, class indices int64 (B,) or
        probabilities float (B, K), with cross-entropy for both."""
        encoded = self.vit(
            pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states, True, pooled_only=True
        )
        logits = self.classifier(self.pre_logits(encoded.pooler_output))
        loss = None
        if labels is not None:
            loss = classification_loss(self.loss_function, labels, logits, self.config)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


ViTModel.register_for_auto_class("AutoModel")
ViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
