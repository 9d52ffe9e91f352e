"""How alike the layers of a model are: linear CKA by the unbiased estimator of HSIC, in minibatches of images. Arrays out.

A sample is an image, and its features are all values of a layer's output: those of all tokens, or of a feature map, in one
long row. That is what the papers compare (Kornblith et al., arXiv 1905.00414, section 2; Raghu et al., arXiv 2108.08810,
section 3) and what Nguyen et al.'s own code does (google-research, "Efficient implementation of CKA based on minibatch
statistics": activations reshaped to examples x rest).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from vit_hf.models.modeling_vit import ViTForImageClassification

MIN_IMAGES = 32  # with fewer, chance alone moves a value by about 0.05
MINIBATCH = 256  # images at most: as many as Nguyen et al. take
MINIBATCH_VALUES = 1 << 26  # of the widest activation in a minibatch, as float32 a quarter of a GB


def centred_gram(features: Tensor) -> Tensor:
    """Features of n images (n, ...), n > 3 -> their Gram matrix without its diagonal, each row's mean taken off so that
    the scalar product of two such matrices is n (n - 3) times the unbiased estimate of HSIC: float64 (n, n). Zeros where
    all images have the same features.

    Source: Song et al. 2012 (JMLR 13), equation 5; as one scalar product: Székely & Rizzo 2014 (Annals of Statistics 42),
    definition 2.
    """
    rows = features.flatten(1).float()
    length = rows.norm()
    rows = rows - rows.mean(dim=0)  # changes no estimate, and spares the digits that a large mean would take
    if rows.norm() <= 1e-5 * length:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64)
    gram = (rows @ rows.T).double().cpu().fill_diagonal_(0)
    n = len(gram)
    means = gram.sum(dim=0) / (n - 2)
    means -= means.sum() / (2 * (n - 1))
    return (gram - means[:, None] - means[None]).fill_diagonal_(0)


def linear_cka(minibatches: Iterable[list[Tensor]]) -> np.ndarray:
    """The centred Gram matrices of all layers, minibatch after minibatch -> how alike each pair of layers is, whatever
    rotation and scale they are in: (layers, layers) in [-1, 1], 1 on the diagonal, near 0 and of either sign where layers
    have nothing in common; nan for a layer that tells no images apart.

    The estimates of HSIC are averaged over the minibatches, and then divided, so any number of images costs the memory
    of one minibatch.

    Source: Nguyen et al. (arXiv 2010.15327), section 2, equations 2 and 3.
    """
    total: Tensor | float = 0.0
    for grams in minibatches:
        n, flat = len(grams[0]), torch.stack(grams).flatten(1)
        total = total + flat @ flat.T / (n * (n - 3))
    lengths = total.diagonal().sqrt()
    return (total / lengths[:, None] / lengths[None]).clamp(-1, 1).numpy()


def layer_similarity(
    model: nn.Module,
    images: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    seen: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, list[str], int]:
    """Linear CKA between the layers of a model, in evaluation mode, over images uint8 (B, H, W, 3), MIN_IMAGES or more.

    Each minibatch takes its images from all over the set, since a set is often sorted by class. Of a layer nothing but
    its Gram matrix is kept.

    Args:
        normalise: images uint8 (B, 3, H, W) on the CPU -> the model's input.
        seen: told how many images went through, a minibatch at a time.

    Returns:
        (layers, layers), the names of the layers, and the number of minibatches.
    """
    layers = named_layers(model)

    def outputs(part: np.ndarray, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda module, inputs, output: kept.append(keep(output[0] if isinstance(output, tuple) else output))
            )
            for layer in layers.values()
        ]
        try:
            encode(model, normalise(torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2)))
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    widest = 4 * max(
        int(size) for size in outputs(images[:1], lambda output: torch.tensor(output.numel()))
    )  # the MLP's
    size = min(MINIBATCH, max(8, MINIBATCH_VALUES // widest))
    number = -(-len(images) // size)

    def minibatches() -> Iterator[list[Tensor]]:
        for first in range(number):
            yield outputs(images[first::number], centred_gram)
            seen(len(images[first::number]))

    with torch.no_grad():
        return linear_cka(minibatches()), list(layers), number


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What is compared, in the order in which it runs: the layers of a ViT by number, before them a hybrid's stages; the
    stem of a ResNet or BiT and its blocks by stage and number."""
    if isinstance(model, ViTForImageClassification):
        layers = {str(number): layer for number, layer in enumerate(model.vit.layers, 1)}
        stages = model.vit.embeddings.patch_embeddings.backbone.stages if model.config.stem == "hybrid_resnet" else ()
        return {f"stage {number}": stage for number, stage in enumerate(stages, 1)} | layers
    encoder = model.base_model
    blocks = {
        f"{stage}.{number}": block
        for stage, blocks in enumerate(encoder.encoder.stages, 1)
        for number, block in enumerate(blocks.layers, 1)
    }
    return {"stem": encoder.embedder} | blocks


def encode(model: nn.Module, pixel_values: Tensor) -> None:
    """All layers of the model on images of any size, for whoever listens; all tokens of a ViT go through the last one."""
    if isinstance(model, ViTForImageClassification):
        model.vit(pixel_values, interpolate_pos_encoding=True)
    else:
        model.base_model(pixel_values.to(next(model.parameters()).dtype))  # DeepSpeed keeps weights in 16 bits
