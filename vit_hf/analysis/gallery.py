"""All figures that a model has, for the images at hand: numbers from attention.py, embeddings.py, features.py and
similarity.py, drawn by figures.py. Knows no flags and no training run."""

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
from vit_hf.analysis.attention import Attention, look, uniform_distance
from vit_hf.analysis.document import Block, Picture, write_document
from vit_hf.analysis.embeddings import first_weight, looks_grey, patch_filters, position_similarity, stem_filters
from vit_hf.analysis.features import feature_colours, grad_cam, last_map_and_logits, last_map_reader, saliency
from vit_hf.analysis.similarity import MIN_IMAGES, layer_similarity
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
CKA_IMAGES = 256  # that layers are compared over, where a set has as many
DISTANCES = {
    "paper": "authors' sum: attention to tokens without a place counts as 0",
    "renormalised": "renormalised: a patch's attention to patches sums to 1",
}


@torch.no_grad()
def model_figures(
    model: transformers.PreTrainedModel,
    images: np.ndarray,
    preprocessing: Preprocessing,
    many_images: np.ndarray | None = None,
    attention_distance: str = "paper",
    seen: Callable[[int], None] = lambda count: None,
) -> list[Block]:
    """The figures of a model, and a sentence for each that it cannot have. The model is left as it was: mode, gradients,
    random state and form of attention. One image at a time goes through it, but for the similarity of layers.

    Args:
        model: an image classifier on any device, with whole weights.
        images: uint8 (B, H, W, 3), one or more, which are drawn; of a size that a ViT's patches divide.
        preprocessing: its mean and standard deviation normalise the images.
        many_images: those that the similarity of layers is estimated over (None: those that are drawn).
        attention_distance: one of DISTANCES.
        seen: told how many of many_images went through.

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
    many_images = images if many_images is None else many_images
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)

    def normalise(batch: Tensor) -> Tensor:
        return (batch.to(device).float() / 255 - mean) / std

    with evaluating(model):
        answers = [saliency(model, image[None].to(device), mean, std) for image in batch]
        names = model.config.id2label or {}
        titles = [f"{str(names.get(winner, winner))[:18]} ({chance:.2f})" for _, winner, chance in answers]
        blocks = filter_figures(model, many_images, std)
        if isinstance(model, ViTForImageClassification):
            pixel_values = (normalise(image[None]) for image in batch)
            blocks += position_figures(model.vit, images.shape[1:3])
            blocks += layer_figures(model.vit, images, pixel_values, titles, attention_distance)
        else:
            kind = type(model.config).__name__.removesuffix("Config")
            blocks.append(f"A {kind} has no patches, positions or attention to draw.")
        blocks += map_figures(model, images, [normalise(image[None]) for image in batch], titles)
        blocks.append(similarity_figure(model, many_images, normalise, seen))
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


def filter_figures(model: transformers.PreTrainedModel, images: np.ndarray, std: Tensor) -> list[Block]:
    """What the model looks for first. Where the filters' channels say nothing by themselves they are added up; the images
    uint8 (B, H, W, 3) tell whether it is looked at with grey ones."""
    grey = looks_grey(first_weight(model), bool((images == images[..., :1]).all()))
    how = " Their colours are added up: the images are grey, and no colours were learned." if grey else ""
    found = patch_filters(model.vit, std if grey else None) if isinstance(model, ViTForImageClassification) else None
    if found is None:
        filters = stem_filters(model, std if grey else None)
        return [Picture(
            "stem_filters",
            f"The first {len(filters)} filters of the stem's first convolution, each stretched to the range of the "
            f"colours.{how}",
            figures.filter_grid(filters, f"The stem's first {len(filters)} filters" + ", channels added up" * grey, columns=8),
        )]  # fmt: skip
    components, shares = found
    return [Picture(
        "patch_embedding_filters",
        "The first principal components of the linear embedding's filters, each stretched to the range of the "
        f"colours, with its share of the filters' variance (ViT paper, figure 7, left).{how}",
        figures.filter_grid(
            components,
            f"Patch embedding filters: first {len(components)} principal components" + ", channels added up" * grey,
            [f"{number}: {100 * share:.1f} %" for number, share in enumerate(shares, 1)],
        ),
    )]  # fmt: skip


def position_figures(vit: ViTModel, size: tuple[int, int]) -> list[Block]:
    """Similarity of the positions of images of (height, width) pixels."""
    stride = vit.config.token_stride
    similarity = position_similarity(vit, (size[0] // stride[0], size[1] // stride[1]))
    if similarity is None:
        return ["The model has no position embeddings: there is no similarity of positions to draw."]
    return [Picture(
        "position_similarity",
        "Cosine similarity of each patch's position with those of all others: one tile a position, at its place in "
        f"the image ({POSITIONS[vit.config.position_embedding]}; ViT paper, figure 7, centre).",
        figures.similarity_tiles(similarity),
        dpi=max(120, int(18 * max(similarity.shape) ** 0.75)),
    )]  # fmt: skip


def layer_figures(
    vit: ViTModel, images: np.ndarray, pixel_values: Iterator[Tensor], titles: list[str], definition: str
) -> list[Block]:
    """What takes the images through the layers of a ViT: attention and the last features.

    Args:
        pixel_values: each image, normalised, float (1, 3, H, W). definition: of the distance, one of DISTANCES.
    """
    renormalise, prefix, stride = definition == "renormalised", vit.config.num_prefix_tokens, vit.config.token_stride
    looks: list[Attention] = []
    tokens: list[Tensor] = []
    for image in pixel_values:
        attention, hidden_states = look(vit, image, renormalise=renormalise)
        looks.append(attention)
        tokens.append(vit.pool(hidden_states)[0][0, prefix:].float().cpu())
    grid_size = (images.shape[1] // stride[0], images.shape[2] // stride[1])
    distance = Picture(
        "attention_distance",
        f"How far each head looks: distance between patches in pixels, weighted with the attention ({DISTANCES[definition]}); "
        f"the mean over all patches and {len(images)} images (ViT paper, figure 7, right, and appendix D.7).",
        figures.distance_by_layer(
            np.mean([seen.distance for seen in looks], axis=0),
            uniform_distance(vit, grid_size, renormalise),
            DISTANCES[definition],
        ),
    )  # fmt: skip
    features = Picture(
        "feature_pca",
        "The first three principal components of the last layer's patch tokens as red, green and blue, the same ones for "
        "all images (arXiv 2304.07193, figure 1).",
        figures.pairs_of_images(
            images, feature_colours(torch.stack(tokens), grid_size), titles, "features", "Feature maps, first 3 components"
        ),
    )  # fmt: skip
    return [distance, *output_figures(vit, images, looks, titles), features]


def output_figures(vit: ViTModel, images: np.ndarray, looks: list[Attention], titles: list[str]) -> list[Block]:
    """Attention of what the head reads: the class token, the probe of pooling=map, or the mean of the patches."""
    output, where = {
        "cls": ("class token", "the last layer"),
        "map": ("pooling probe", "the pooling"),
        "mean": ("mean of all patches", "the last layer"),
    }[vit.config.pooling]
    shown = min(HEADS_SHOWN, len(images))
    heads = np.stack([seen.heads for seen in looks[:shown]])
    return [
        Picture(
            "attention_rollout",
            f"Attention of the {output} to the input through all layers: rollout (ViT paper, figure 6 and appendix D.8; "
            "arXiv 2005.00928). Above each image: the class that wins, and its probability.",
            figures.maps_over_images(
                images, np.stack([seen.rollout for seen in looks])[:, None], titles, ["rollout"],
                f"Attention rollout from the {output} to the input",
            ),
        ),
        Picture(
            "attention_heads",
            f"Attention of the {output} in {where}, head by head.",
            figures.maps_over_images(
                images[:shown], heads, titles, [f"head {number + 1}" for number in range(heads.shape[1])],
                f"Attention of the {output} in {where}, head by head",
            ),
        ),
    ]  # fmt: skip


def map_figures(
    model: transformers.PreTrainedModel, images: np.ndarray, pixel_values: list[Tensor], titles: list[str]
) -> list[Block]:
    """What the last feature map of convolutions holds: Grad-CAM, and the principal components where it is a ResNet's or
    BiT's, which has no tokens. Nothing for a ViT without such a map."""
    if last_map_reader(model) is None:
        return []
    kind = "the ResNet in front" if isinstance(model, ViTForImageClassification) else "the last stage"
    blocks: list[Block] = [Picture(
        "grad_cam",
        f"Where the feature map of {kind} speaks for the winning class: Grad-CAM (arXiv 1610.02391). Above each image: "
        "the class that wins, and its probability.",
        figures.maps_over_images(
            images, np.stack([grad_cam(model, image) for image in pixel_values])[:, None], titles, ["Grad-CAM"],
            f"Grad-CAM of the winning class on the feature map of {kind}",
        ),
    )]  # fmt: skip
    if isinstance(model, ViTForImageClassification):
        return blocks
    maps = [last_map_and_logits(model, image)[0] for image in pixel_values]
    places = torch.cat(maps).flatten(2).transpose(1, 2)
    return [*blocks, Picture(
        "feature_pca",
        "The first three principal components of the places of the last feature map as red, green and blue, the same ones "
        "for all images (after arXiv 2304.07193, figure 1).",
        figures.pairs_of_images(
            images, feature_colours(places, maps[0].shape[2:]), titles, "features", "Feature maps, first 3 components"
        ),
    )]  # fmt: skip


def similarity_figure(
    model: transformers.PreTrainedModel,
    images: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    seen: Callable[[int], None],
) -> Block:
    """Linear CKA between layers, or why there is none."""
    if len(images) < MIN_IMAGES:
        return f"The similarity of layers (linear CKA) is estimated over {MIN_IMAGES} images or more; here are {len(images)}."
    similarity, names, minibatches = layer_similarity(model, images, normalise, seen)
    over = f"{len(images)} images" + (f" in {minibatches} minibatches" if minibatches > 1 else "")
    return Picture(
        "layer_cka",
        f"Linear CKA between the outputs of layers: each image is a sample, all values of a layer are its features; "
        f"unbiased estimate over {over} (arXiv 2010.15327, section 2). 1: the same but for rotation and scale, "
        "0: nothing in common.",
        figures.layer_matrix(similarity, names),
    )  # fmt: skip


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
    rows = TableRows(split) if isinstance(split, datasets.Dataset) else split
    images, many_images = (sample_images(rows, preprocessing, most) for most in (number, CKA_IMAGES))
    if len(images) == 0:
        return None

    def draw(step: int) -> dict[str, np.ndarray]:
        blocks = model_figures(model, images, preprocessing, many_images)
        write_document(folder, "index", f"Figures at step {step}", blocks, formats=("html",))
        names = [block.name for block in blocks if isinstance(block, Picture)]
        return {f"figures/{name}": np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in names}

    return draw
