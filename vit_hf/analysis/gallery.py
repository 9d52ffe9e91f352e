"""All figures that a model has, for the images at hand: numbers from attention.py, embeddings.py and features.py, drawn
by figures.py. Knows no flags and no training run."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from vit_hf.analysis import figures
from vit_hf.analysis.attention import Attention, look, patch_distances
from vit_hf.analysis.document import Block, Picture, write_document
from vit_hf.analysis.embeddings import patch_filters, position_similarity
from vit_hf.analysis.features import feature_colours, linear_cka, saliency, spread
from vit_hf.data.decode import decode_row
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.interface import Rows
from vit_hf.data.rows.table import TableRows
from vit_hf.models.modeling_vit import ViTForImageClassification, ViTModel

POSITIONS = {
    "learned_1d": "learned, one for each place",
    "learned_2d": "learned, for rows and for columns",
    "sincos_2d": "fixed sines and cosines of row and column",
    "relative": "relative: a position is the biases that it has for all others, in all heads and layers",
}
HEADS_SHOWN = 4  # images whose heads are drawn one by one


@torch.no_grad()
def model_figures(
    model: transformers.PreTrainedModel, images: np.ndarray, preprocessing: Preprocessing
) -> list[Block]:
    """The figures of a model, and a sentence for each that it cannot have. The model is left as it was: mode, gradients,
    random state and form of attention. One image at a time goes through it.

    Args:
        model: an image classifier on any device, with whole weights.
        images: uint8 (B, H, W, 3), one or more; of a size that a ViT's patches divide.
        preprocessing: its mean and standard deviation normalise the images.

    Raises:
        ValueError: patches do not divide the images, or a weight is not finite.
    """
    device = next(model.parameters()).device
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise ValueError("some of the model's weights are not finite: training has failed, there is nothing to draw")
    mean, std = (
        torch.tensor(channels, device=device)[:, None, None]
        for channels in (preprocessing.image_mean, preprocessing.image_std)
    )
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    with evaluating(model):
        answers = [saliency(model, image[None].to(device), mean, std) for image in batch]
        names = model.config.id2label or {}
        titles = [f"{str(names.get(winner, winner))[:18]} ({chance:.2f})" for _, winner, chance in answers]
        blocks: list[Block] = []
        if isinstance(model, ViTForImageClassification):
            pixel_values = ((image[None].to(device).float() / 255 - mean) / std for image in batch)
            blocks += embedding_figures(model.vit, images.shape[1:3])
            blocks += layer_figures(model.vit, images, pixel_values, titles)
        else:
            kind = type(model.config).__name__.removesuffix("Config")
            blocks.append(f"A {kind} has no patches, positions or attention to draw.")
    return [*blocks, saliency_figure(images, [map for map, _, _ in answers], titles)]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within this context every module is in evaluation mode; afterwards each is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def embedding_figures(vit: ViTModel, size: tuple[int, int]) -> list[Block]:
    """Filters and positions, the latter for images of (height, width) pixels."""
    blocks: list[Block] = []
    found = patch_filters(vit)
    if found is None:
        blocks.append(f"The stem is {vit.config.stem}: there are no filters of patches of the image to draw.")
    else:
        blocks.append(Picture(
            "patch_embedding_filters",
            "The first principal components of the linear embedding's filters, each stretched to the range of the "
            "colours, with its share of the filters' variance (ViT paper, figure 7, left).",
            figures.filter_grid(*found),
        ))  # fmt: skip
    stride = vit.config.token_stride
    similarity = position_similarity(vit, (size[0] // stride[0], size[1] // stride[1]))
    kind = vit.config.position_embedding
    if similarity is None:
        blocks.append("The model has no position embeddings: there is no similarity of positions to draw.")
    else:
        blocks.append(Picture(
            "position_similarity",
            "Cosine similarity of each patch's position with those of all others: one tile a position, at its place in "
            f"the image ({POSITIONS[kind]}; ViT paper, figure 7, centre).",
            figures.similarity_tiles(similarity),
            dpi=max(120, int(18 * max(similarity.shape) ** 0.75)),
        ))  # fmt: skip
    return blocks


def layer_figures(vit: ViTModel, images: np.ndarray, pixel_values: Iterator[Tensor], titles: list[str]) -> list[Block]:
    """What takes the images through the layers: attention and features.

    Args:
        pixel_values: each image, normalised, float (1, 3, H, W).
    """
    layers: list[list[Tensor]] = [[] for _ in vit.layers]
    looks: list[Attention] = []
    tokens: list[Tensor] = []
    prefix = vit.config.num_prefix_tokens
    for image in pixel_values:
        attention, hidden_states = look(
            vit, image, also=lambda layer, states: layers[layer].append(spread(states[:, prefix:], len(images)))
        )
        looks.append(attention)
        tokens.append(vit.pool(hidden_states)[0][0, prefix:].float().cpu())
    stride = vit.config.token_stride
    grid_size = (images.shape[1] // stride[0], images.shape[2] // stride[1])
    blocks: list[Block] = [Picture(
        "attention_distance",
        f"How far each head looks: distance between patches in pixels, averaged with the attention as weights, over all "
        f"patches and {len(images)} images (ViT paper, figure 7, right, and appendix D.7).",
        figures.distance_by_layer(
            np.mean([seen.distance for seen in looks], axis=0), float(patch_distances(grid_size, stride).mean())
        ),
    )]  # fmt: skip
    blocks += output_figures(vit, images, looks, titles)
    features = [torch.cat(rows) for rows in layers]
    blocks.append(Picture(
        "layer_cka",
        f"Linear CKA (arXiv 1905.00414) between the outputs of all layers, over {len(features[0])} patch tokens.",
        figures.layer_matrix(linear_cka(features), [str(number + 1) for number in range(len(features))]),
    ))  # fmt: skip
    blocks.append(Picture(
        "feature_pca",
        "The first three principal components of the last layer's patch tokens as red, green and blue, the same ones for "
        "all images (arXiv 2304.07193, figure 1).",
        figures.pairs_of_images(
            images, feature_colours(torch.stack(tokens), grid_size), titles, "features", "Feature maps, first 3 components"
        ),
    ))  # fmt: skip
    return blocks


def output_figures(vit: ViTModel, images: np.ndarray, looks: list[Attention], titles: list[str]) -> list[Block]:
    """Attention of the output token, which the class token is, or the probe of pooling=map."""
    if looks[0].rollout is None:
        return ["pooling is mean: there is no output token whose attention could be drawn; see the saliency below."]
    token = "class token" if vit.config.has_class_token else "pooling probe"
    where = "the last layer" if vit.config.has_class_token else "the pooling"
    shown = min(HEADS_SHOWN, len(images))
    heads = np.stack([seen.heads for seen in looks[:shown]])
    return [
        Picture(
            "attention_rollout",
            f"Attention of the {token} to the input through all layers: rollout (ViT paper, figure 6 and appendix D.8; "
            "arXiv 2005.00928). Above each image: the class that wins, and its probability.",
            figures.maps_over_images(
                images, np.stack([seen.rollout for seen in looks])[:, None], titles, ["rollout"],
                f"Attention rollout from the {token} to the input",
            ),
        ),
        Picture(
            "attention_heads",
            f"Attention of the {token} in {where}, head by head.",
            figures.maps_over_images(
                images[:shown], heads, titles, [f"head {number + 1}" for number in range(heads.shape[1])],
                f"Attention of the {token} in {where}, head by head",
            ),
        ),
    ]  # fmt: skip


def saliency_figure(images: np.ndarray, maps: list[np.ndarray], titles: list[str]) -> Picture:
    """Maps (H, W) over the images, without the few largest values, which would leave the rest dark."""
    cut = np.stack([np.minimum(map, np.percentile(map, 99)) for map in maps])
    return Picture(
        "saliency",
        "How much the winning class's logit changes with each pixel: the largest |d logit / d pixel| of the three channels "
        "(arXiv 1312.6034), cut at the 99th percentile. It asks no attention.",
        figures.maps_over_images(images, cut[:, None], titles, ["saliency"], "Saliency of the winning class"),
    )


def sample_images(rows: Rows, preprocessing: Preprocessing, number: int) -> np.ndarray:
    """Some images of a split as uint8 (B, H, W, 3), without those that do not decode: evenly spaced ones of a table, which
    is often sorted by class, the first ones of a stream, where reading far apart is dear."""
    step = max(1.0, len(rows) / number) if isinstance(rows, TableRows) else 1.0
    places = (np.arange(min(number, len(rows))) * step).astype(np.int64)
    decoded = [decode_row(image, preprocessing) for image in rows.read(places)[0]]
    pixels = [image for image in decoded if not isinstance(image, str)]
    return np.stack(pixels) if pixels else np.zeros((0, *preprocessing.image_size, 3), dtype=np.uint8)


def figure_drawer(
    model: transformers.PreTrainedModel,
    split: datasets.Dataset | Rows,
    preprocessing: Preprocessing,
    folder: Path,
    number: int = 4,
    *,
    draws: bool = True,
) -> Callable[[int], dict[str, np.ndarray]] | None:
    """A function that draws the model as it then is, looking at the same few images of a split each time: called with the
    step, it writes the figures and index.html into the folder, over those of an earlier step, and returns the pictures by
    name, uint8 (H, W, 3). None where no image of the split decodes, or another process draws."""
    if not draws:
        return None
    images = sample_images(TableRows(split) if isinstance(split, datasets.Dataset) else split, preprocessing, number)
    if len(images) == 0:
        return None

    def draw(step: int) -> dict[str, np.ndarray]:
        blocks = model_figures(model, images, preprocessing)
        write_document(folder, "index", f"Figures at step {step}", blocks, formats=("html",))
        names = [block.name for block in blocks if isinstance(block, Picture)]
        return {f"figures/{name}": np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in names}

    return draw
