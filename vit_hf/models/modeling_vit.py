# Copyright 2021 Google AI, Ross Wightman and The HuggingFace Inc. team (the structure of the stock ViT model).
# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""ViTModel (the encoder) and ViTForImageClassification (encoder, pooling, head), and how they are saved and read.

This module must not know about presets, data or training.
"""

import os

import torch
import transformers
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_vit import ViTConfig
from .layers import Embeddings, Layer

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
AUTO_MAP = {
    "AutoConfig": "configuration_vit.ViTConfig",
    "AutoModel": "modeling_vit.ViTModel",
    "AutoModelForImageClassification": "modeling_vit.ViTForImageClassification",
}


class ViTPreTrainedModel(PreTrainedModel):
    """Initialisation, reading and saving of both models."""

    config_class = ViTConfig
    config: ViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    stock_class: type[PreTrainedModel]  # the same model in transformers
    _no_split_modules = ["Embeddings", "Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # a checkpoint of transformers' ViTModel carries a pooler, which classification does not use
    _keys_to_ignore_on_load_unexpected = [r"^(vit\.)?pooler\.", r"^vit\.embeddings\.mask_token$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal(0, initializer_range) for weights, zero biases, unit norms
        if isinstance(module, Embeddings):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' own; reads a stock `vit` checkpoint too, with today's or the older tensor names."""
        kwargs.setdefault("key_mapping", OLDER_KEY_NAMES)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, state_dict: dict[str, Tensor] | None = None, **kwargs
    ):
        """As transformers' own. A model of stock options only is saved by transformers' ViT class as a stock `vit`
        folder, which loads without this package; any other is saved with its code."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        if self.config.is_stock:
            with torch.device("meta"):  # only its way of saving is needed
                stock = self.stock_class(self.config.to_stock()).to(self.dtype)
            stock.save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        else:
            self.config.auto_map = dict(AUTO_MAP)
            super().save_pretrained(save_directory, state_dict=state_dict, save_original_format=False, **kwargs)


class ViTModel(ViTPreTrainedModel):
    """The encoder: (B, C, H, W) -> tokens (B, N, D) after the final norm, and what the head reads of them (B, D).

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
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        hidden_states = self.embeddings(pixel_values, bool(interpolate_pos_encoding))
        all_hidden_states, all_attentions = (hidden_states,), ()
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, output_attentions)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        tokens = self.layernorm(hidden_states)
        pooled = tokens[:, 0] if self.config.pooling == "cls" else tokens.mean(dim=1)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output


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
        """`labels`: class indices int64 (B,) or probabilities float (B, K); the loss is cross-entropy for both."""
        encoded = self.vit(pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states)
        logits = self.classifier(self.pre_logits(encoded.pooler_output))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output.to_tuple() if return_dict is False else output


ViTModel.register_for_auto_class("AutoModel")
ViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
