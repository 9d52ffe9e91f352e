"""What a model makes of images: what its last features have in common, and which pixels and places the answer hangs on.
Arrays out."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit_hf.analysis.embeddings import principal_components
from vit_hf.models.modeling_vit import ViTForImageClassification
from vit_hf.models.positions import Grid


def feature_colours(tokens: Tensor, grid_size: Grid) -> np.ndarray:
    """Patch tokens of all images (B, h*w, D), or places of a feature map -> their first three principal components as RGB (B, h, w, 3) in [0, 1], each
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


def grad_cam(model: nn.Module, pixel_values: Tensor) -> np.ndarray | None:
    """Where on the last feature map of the convolutions the winning class is seen: the map's channels, each weighted with
    the mean derivative of the class's logit by it, summed, what is below 0 cut off: (1, 3, H, W) -> (h, w); None for a
    model without such a map.

    Source: Selvaraju et al. (arXiv 1610.02391), section 3, equations 1 and 2.
    """
    if last_map_reader(model) is None:
        return None
    with torch.enable_grad():
        last_map, logits = last_map_and_logits(model, pixel_values.detach().clone().requires_grad_())
        (gradient,) = torch.autograd.grad(logits[0].float().max(), last_map)
    weights = gradient.float().mean(dim=(2, 3), keepdim=True)
    return (weights * last_map.detach().float()).sum(dim=1)[0].relu().cpu().numpy()


def last_map_reader(model: nn.Module) -> nn.Module | None:
    """What reads the last feature map of the convolutions: the pooling of a ResNet or BiT, the projection of a hybrid;
    None for another ViT."""
    if not isinstance(model, ViTForImageClassification):
        return model.base_model.pooler
    return model.vit.embeddings.patch_embeddings.projection if model.config.stem == "hybrid_resnet" else None


def last_map_and_logits(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """The feature map (B, C, h, w) that `last_map_reader` reads, and the logits (B, K)."""
    kept: list[Tensor] = []
    hook = last_map_reader(model).register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    try:
        logits = logits_of(model, pixel_values)
    finally:
        hook.remove()
    return kept[0], logits


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
