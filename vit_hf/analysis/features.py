"""What the layers of a ViT make of images: how alike layers are, what the last tokens have in common, and which pixels
the answer hangs on. Arrays out."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vit_hf.analysis.embeddings import principal_components
from vit_hf.models.modeling_vit import ViTForImageClassification
from vit_hf.models.positions import Grid

MAX_TOKENS = 1024  # that stand for each layer in CKA: the memory is their square


def spread(tokens: Tensor, images: int) -> Tensor:
    """The share of one of so many images in the tokens that stand for a layer: (1, N, D) -> float32 (n, D) on the CPU,
    evenly spaced, n = MAX_TOKENS / images at most."""
    number = max(1, min(tokens.shape[1], MAX_TOKENS // images))
    places = torch.linspace(0, tokens.shape[1] - 1, number, device=tokens.device).round().long()
    return tokens[0, places].float().cpu()


def linear_cka(layers: list[Tensor]) -> np.ndarray:
    """How alike layers are, whatever rotation and scale they are in: n rows of features of each, (n, D), float32, the
    same n tokens in each -> (layers, layers) in [0, 1], 1 on the diagonal; nan for a layer whose rows are all the same.

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|) with centred columns and Frobenius norms; computed, with the same result, as the
    cosine of the matrices XX' and YY'. Few rows of wide features look more alike than they are.

    Source: Kornblith et al. (arXiv 1905.00414), section 3, linear CKA.
    """
    grams = []
    for features in layers:
        centred = features - features.mean(dim=0)
        gram = centred @ centred.T
        norm = gram.norm()
        grams.append((gram / norm).flatten() if norm > 0 else torch.full((gram.numel(),), torch.nan))
    stacked = torch.stack(grams)
    return (stacked @ stacked.T).clamp(0, 1).numpy()


def feature_colours(tokens: Tensor, grid_size: Grid) -> np.ndarray:
    """Patch tokens of all images (B, h*w, D) -> their first three principal components as RGB (B, h, w, 3) in [0, 1], each
    stretched over all images: the same colour is the same feature everywhere.

    Source: DINOv2 (arXiv 2304.07193), section 7.5 and figure 1 (without its removal of the background).
    """
    points = tokens.float().cpu().flatten(0, 1)
    directions, _ = principal_components(points, 3)
    colours = (points - points.mean(dim=0)) @ directions.T
    low, high = colours.min(dim=0).values, colours.max(dim=0).values
    colours = (colours - low) / (high - low).clamp_min(1e-12)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))  # features of fewer than three channels
    return colours.reshape(len(tokens), *grid_size, 3).numpy()


def saliency(model: torch.nn.Module, image: Tensor, mean: Tensor, std: Tensor) -> tuple[np.ndarray, int, float]:
    """How much the winning class's logit changes with each pixel: the largest |d logit / d pixel| of the channels. It
    asks no attention, so it is there for models without an output token, and for a ResNet.

    Args:
        image: uint8 (1, C, H, W), of which grey levels divided by 255 are the pixels. mean, std: (C, 1, 1).

    Returns:
        (H, W), the class, and its probability.

    Source: Simonyan et al. (arXiv 1312.6034), section 3.1.
    """
    pixels = (image.float() / 255).requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, (pixels - mean) / std)[0].float()
        winner = int(logits.argmax())
        (gradient,) = torch.autograd.grad(logits[winner], pixels)
    probability = float(logits.detach().softmax(dim=-1)[winner])
    return gradient[0].abs().amax(dim=0).float().cpu().numpy(), winner, probability


def logits_of(model: torch.nn.Module, pixel_values: Tensor) -> Tensor:
    """The logits (B, K) of images of any size. A ViT's layers are computed again for the gradient: one layer's
    activations are held at a time."""
    if not isinstance(model, ViTForImageClassification):
        return model(pixel_values).logits
    vit = model.vit
    grid_size = vit.grid_size(pixel_values, interpolate_pos_encoding=True)
    hidden_states, relative = vit.embeddings(pixel_values, grid_size), vit.relative_positions(grid_size)
    for layer in vit.layers:
        hidden_states = checkpoint(
            lambda states, layer=layer: layer(states, False, relative)[0],
            hidden_states, use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return model.classifier(model.pre_logits(vit.pool(hidden_states)[1]))
