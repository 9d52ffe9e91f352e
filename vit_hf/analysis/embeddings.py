"""What the first layers of a model hold: filters of the patch embedding or of a stem, similarity of positions. Arrays out."""

import numpy as np
import torch
from torch import Tensor, nn

from vit_hf.models.modeling_vit import ViTModel
from vit_hf.models.positions import Grid

NUM_FILTERS = 28  # as many as figure 7 of the ViT paper shows


NUM_STEM_FILTERS = 64
STRUCTURE = 0.1  # differences of colours whose neighbours correlate less hold nothing that was learned


@torch.no_grad()
def patch_filters(
    vit: ViTModel, grey_std: Tensor | None = None, number: int = NUM_FILTERS
) -> tuple[np.ndarray, np.ndarray] | None:
    """The first principal components of the filters of the patch embedding.

    The D filters are points in the space of a patch's pixels (P x P x C values); their mean is taken off. The sign of a
    component is arbitrary: here its largest value is positive.

    Args:
        grey_std: the deviations (C,) that normalise images, where the filters are those of grey data: channels are
            summed first (see `grey_filters`), and C is 1.

    Returns:
        components (n, P, P, C), each of norm 1, n at most `number`; and the share of the filters' variance that lies
        along each, (n,). None where patches are not cut out of the image itself (hybrid and convolutional stems).

    Source: ViT paper (arXiv 2010.11929), section 4.5 and figure 7, left.
    """
    if vit.config.stem != "patch":
        return None
    weight = first_weight(vit)
    weight = weight if grey_std is None else grey_filters(weight, grey_std)
    components, shares = principal_components(weight.flatten(1), number)
    return components.reshape(-1, *weight.shape[1:]).permute(0, 2, 3, 1).numpy(), shares.numpy()


@torch.no_grad()
def stem_filters(encoder: nn.Module, grey_std: Tensor | None = None, number: int = NUM_STEM_FILTERS) -> np.ndarray:
    """The first so many filters of the first convolution, as they come: (n, P, P, C). A standardised convolution
    subtracts a number from each filter and divides it by another, which is not done here.

    Args:
        grey_std: as in patch_filters.
    """
    weight = first_weight(encoder)[:number]
    return (weight if grey_std is None else grey_filters(weight, grey_std)).permute(0, 2, 3, 1).numpy()


def first_weight(encoder: nn.Module) -> Tensor:
    """Of the first convolution that sees the image, float32 (D, C, P, P) on the CPU."""
    return next(module for module in encoder.modules() if isinstance(module, nn.Conv2d)).weight.detach().float().cpu()


def grey_filters(weight: Tensor, std: Tensor) -> Tensor:
    """What filters (D, C, P, P) do to grey images, whose channels are alike until each is divided by its own deviation:
    (D, 1, P, P)."""
    return (weight / std.flatten().cpu()[None, :, None, None]).sum(dim=1, keepdim=True)


def colour_structure(weight: Tensor) -> float | None:
    """Whether filters (D, C, P, P) have learned of colours: the correlation of neighbouring pixels in what makes their
    channels different. None where channels are alike.

    Grey images move all channels of a filter alike, so the differences stay the noise that they started from, in which
    neighbours have nothing in common. What colours have taught is smooth.
    """
    apart = weight - weight.mean(dim=1, keepdim=True)
    if apart.norm() <= 1e-3 * weight.norm():
        return None
    pairs = [(apart[..., 1:], apart[..., :-1]), (apart[..., 1:, :], apart[..., :-1, :])]
    products = sum(float((one * other).sum()) for one, other in pairs)
    squares = [sum(float(pair[side].square().sum()) for pair in pairs) for side in (0, 1)]
    return products / max((squares[0] * squares[1]) ** 0.5, 1e-30)


def looks_grey(weight: Tensor, images_are_grey: bool) -> bool:
    """Whether the channels of filters say nothing by themselves: they are alike, or all images at hand are grey and the
    channels' differences are noise."""
    structure = colour_structure(weight)
    return structure is None or (images_are_grey and abs(structure) < STRUCTURE)


def principal_components(points: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(n, p) -> the first `number` directions of most variance (m, p), of norm 1, and the share of the variance along
    each (m,); n points have at most n - 1. Computed without randomness; a direction's largest value is positive."""
    points = points.double()
    _, deviations, directions = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)
    directions = directions[: min(number, len(points) - 1)]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    variances = deviations.square()
    shares = variances / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return (directions * largest.sign()).float(), shares[: len(directions)].float()


@torch.no_grad()
def position_similarity(vit: ViTModel, grid_size: Grid) -> np.ndarray | None:
    """Cosine similarity of each patch's position with every other's: (h, w, h, w) in [-1, 1]; None for a model without
    positions. For another grid than the model's the positions are resized as the model itself does.

    `learned_1d`, `learned_2d`, `sincos_2d`: of the vectors that are added to the tokens. `relative` adds none; there a
    position is what it adds to the attention: the biases that it has for all patches, in all heads and layers, side by
    side, each head's less its mean (a constant does not change a softmax).

    Source: ViT paper (arXiv 2010.11929), section 4.5, figure 7, centre, and appendix D.4; google-research/
    vision_transformer, issue 55.
    """
    if vit.config.position_embedding == "none":
        return None
    patches = grid_size[0] * grid_size[1]
    if vit.config.position_embedding == "relative":
        products = _bias_products(vit, grid_size)
        lengths = products.diagonal().clamp_min(0).sqrt().clamp_min(1e-12)
        similarity = products / lengths[:, None] / lengths[None]
    else:
        positions = vit.embeddings.positions(grid_size)[0, -patches:].float()
        positions = nn.functional.normalize(positions, dim=-1)
        similarity = positions @ positions.T
    return similarity.clamp(-1, 1).reshape(*grid_size, *grid_size).cpu().numpy()


def _bias_products(vit: ViTModel, grid_size: Grid) -> Tensor:
    """Scalar products (h*w, h*w) of the positions of `relative`, summed layer by layer."""
    prefix = vit.config.num_prefix_tokens
    index, _ = vit.relative_positions(grid_size)
    products = torch.zeros(())
    for layer in vit.layers:
        bias = layer.attention.position_bias(index, grid_size)[0, :, prefix:, prefix:].float()
        bias = bias - bias.mean(dim=-1, keepdim=True)
        products = products.to(bias) + torch.einsum("hqk,hpk->qp", bias, bias)
    return products
