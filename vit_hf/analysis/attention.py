"""How the tokens of a ViT attend: how far each head looks, and what the output has looked at in the end.

Layers are run one by one, and the weights of one (N x N a head) are reduced before the next are computed: at 1,370
tokens and 32 layers all of them would take 4 GB an image. The model keeps its own form of attention; it is asked for
weights through an argument. Arrays out: this module must not know about figures.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vit_hf.models.modeling_vit import ViTModel
from vit_hf.models.positions import Grid

Reduce = Callable[[int, Tensor, Tensor], None]


@dataclasses.dataclass
class Attention:
    """What is kept of an image's attention.

    distance: pixels, (layers, heads). rollout: what reaches the output from each patch, shares that sum to 1, (h, w).
    heads: what the output attends to in its last look, (heads, h, w). The output is the class token; with pooling=map the
    probe; with pooling=mean all patches, and the numbers are means over them.
    """

    distance: np.ndarray
    rollout: np.ndarray
    heads: np.ndarray


@torch.no_grad()
def run_layers(vit: ViTModel, pixel_values: Tensor, reduce: Reduce) -> Tensor:
    """Runs the encoder on images (B, C, H, W) of any size that its patches divide, and hands each layer's output to
    `reduce(layer, hidden_states (B, N, D), weights (B, heads, N, N))`; one layer's weights exist at a time.

    Returns:
        The last layer's tokens (B, N, D), before the final norm.

    Raises:
        ValueError: patches do not divide the image.
    """
    grid_size = vit.grid_size(pixel_values, interpolate_pos_encoding=True)
    hidden_states, relative_positions = vit.embeddings(pixel_values, grid_size), vit.relative_positions(grid_size)
    for index, layer in enumerate(vit.layers):
        hidden_states, weights = layer(hidden_states, True, relative_positions)
        reduce(index, hidden_states, weights)
        del weights  # or they would live on while the next layer makes its own
    return hidden_states


def look(vit: ViTModel, pixel_values: Tensor, *, renormalise: bool = False) -> tuple[Attention, Tensor]:
    """The attention of one image (1, C, H, W), reduced layer by layer, and the last layer's tokens (1, N, D), before the
    final norm.

    Args:
        renormalise: as in mean_distance.

    Raises:
        ValueError: patches do not divide the image.

    Source: rollout with mean pooling: the head reads the mean of the patches, so what reaches it is the mean of their
    rows of the rolled-out matrix.
    """
    grid_size, prefix = vit.grid_size(pixel_values, True), vit.config.num_prefix_tokens
    apart = patch_distances(grid_size, vit.config.token_stride).to(pixel_values.device)
    distances: list[Tensor] = []
    rolled: Tensor | None = None
    last_look: Tensor | None = None

    def reduce(layer: int, hidden_states: Tensor, weights: Tensor) -> None:
        nonlocal rolled, last_look
        weights = weights[0].float()
        distances.append(mean_distance(weights, apart, renormalise))
        rolled = roll(rolled, weights.mean(dim=0))
        if layer == len(vit.layers) - 1:
            # a view of the class token's row would keep all weights
            last_look = weights[:, 0].clone() if vit.config.has_class_token else weights[:, prefix:].mean(dim=1)

    hidden_states = run_layers(vit, pixel_values, reduce)
    if vit.attention_pool is not None:
        last_look = probe_attention(vit, hidden_states)
        rollout = last_look.mean(dim=0) @ rolled  # the probe has no residual connection: no identity is added
    else:
        rollout = rolled[0] if vit.config.has_class_token else rolled[prefix:].mean(dim=0)
    attention = Attention(
        distance=torch.stack(distances).cpu().numpy(),
        rollout=_share(rollout[prefix:]).reshape(grid_size).cpu().numpy(),
        heads=last_look[:, prefix:].reshape(-1, *grid_size).cpu().numpy(),
    )
    return attention, hidden_states


def patch_distances(grid_size: Grid, token_stride: tuple[int, int]) -> Tensor:
    """Distances in pixels between the centres of all patches, in raster order: float32 (h*w, h*w)."""
    axes = [torch.arange(side, dtype=torch.float32) * stride for side, stride in zip(grid_size, token_stride)]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return (centres[:, None] - centres[None]).square().sum(dim=-1).sqrt()


def mean_distance(weights: Tensor, apart: Tensor, renormalise: bool = False) -> Tensor:
    """How far each head looks: for each patch the distance to all patches (itself at 0), weighted with its attention and
    summed, then the mean over patches. (heads, N, N) -> pixels (heads,).

    Class token and registers have no place, so they are left out. Their weights are missing in the sum, so attention to
    them counts as distance 0, as in the authors' code. With `renormalise` a patch's weights for the patches are scaled to
    sum to 1 first: the distance of what attention falls on patches at all.

    Source: ViT paper (arXiv 2010.11929), section 4.5 and appendix D.7; the authors' code in google-research/
    vision_transformer, issue 162: sum(maps * w[1:, 1:]), in pixels.
    """
    prefix = weights.shape[-1] - len(apart)
    among = weights[:, prefix:, prefix:]
    sums = torch.einsum("hqk,qk->hq", among, apart)
    if renormalise:
        sums = sums / among.sum(dim=-1).clamp_min(torch.finfo(among.dtype).tiny)
    return sums.mean(dim=-1)


def uniform_distance(vit: ViTModel, grid_size: Grid, renormalise: bool = False) -> float:
    """mean_distance of attention that is spread evenly over all tokens, in pixels."""
    apart, prefix = patch_distances(grid_size, vit.config.token_stride), vit.config.num_prefix_tokens
    even = torch.full((1, prefix + len(apart), prefix + len(apart)), 1 / (prefix + len(apart)))
    return float(mean_distance(even, apart, renormalise))


def roll(rolled: Tensor | None, weights: Tensor) -> Tensor:
    """One more layer of attention rollout: what each token holds of each input token, (N, N), rows sum to 1.

    Args:
        rolled: that of the layers below; None at the first layer. weights: (N, N), the mean over heads.

    Source: Abnar & Zuidema (arXiv 2005.00928), section 3, equation 1: A = (W + I) / 2 for the residual connection, rows
    normalised, multiplied from the first layer on; ViT paper, appendix D.8 (mean over heads), and the authors' code in
    google-research/vision_transformer, issue 18.
    """
    step = weights + torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    step = step / step.sum(dim=-1, keepdim=True)
    return step if rolled is None else step @ rolled


@torch.no_grad()
def probe_attention(vit: ViTModel, hidden_states: Tensor) -> Tensor:
    """What the probe of pooling=map attends to: (1, N, D) -> (heads, N), nothing of it on registers."""
    prefix, pool = vit.config.num_prefix_tokens, vit.attention_pool
    patches = vit.layernorm(hidden_states)[:, prefix:]
    _, weights = pool.attention(patches, output_attentions=True, queries=pool.probe)
    return torch.nn.functional.pad(weights[0, :, 0].float(), (prefix, 0))


def _share(map: Tensor) -> Tensor:
    return map / map.sum().clamp_min(torch.finfo(map.dtype).tiny)
