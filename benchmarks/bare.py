"""A plain Vision Transformer as one would write it by hand in PyTorch: what ours is measured against.

B batch, N tokens, D width. It must not import anything of vit_hf but the configuration.
"""

import functools
import re

import torch
from torch import Tensor, nn

from vit_hf.models import ViTConfig
from vit_hf.models.configuration_vit import pair


class BareBlock(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attention.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class BareViT(nn.Module):
    """What one would write by hand: a convolution as the stem, one projection to queries, keys and values, no
    switches."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, patch = config.hidden_size, pair(config.patch_size)
        rows, columns = config.grid_size
        self.stem = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + rows * columns, width))
        block = (width, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps)
        self.blocks = nn.Sequential(*(BareBlock(*block) for _ in range(config.num_hidden_layers)))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


# tensor names of transformers' ViT -> those of BareViT
BARE_NAMES = {
    r"^vit\.embeddings\.patch_embeddings\.projection\.": "stem.", r"^vit\.embeddings\.cls_token": "class_token",
    r"^vit\.embeddings\.position_embeddings": "positions", r"^vit\.layers\.": "blocks.", r"^vit\.layernorm\.": "norm.",
    r"^classifier\.": "head.", r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.q_proj\.": ".qkv.", r"\.attention\.o_proj\.": ".out.", r"\.mlp\.": ".",
}  # fmt: skip


def bare_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of BareViT."""
    renamed = {}
    for name, tensor in weights.items():
        if ".q_proj." in name:
            tensor = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        if ".k_proj." not in name and ".v_proj." not in name:
            renamed[functools.reduce(lambda n, rule: re.sub(*rule, n), BARE_NAMES.items(), name)] = tensor
    return renamed
