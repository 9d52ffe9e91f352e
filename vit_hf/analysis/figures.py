"""Arrays in, matplotlib figures out."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def contact_sheet(
    originals: np.ndarray, augmented: np.ndarray, labels: list[str], mixed_labels: list[list[str]]
) -> Figure:
    """Each image of a set beside what becomes of it in training, one row an image.

    Args:
        originals: uint8 (N, H, W, 3). augmented: uint8 (N, M, H, W, 3).
        labels: of the originals. mixed_labels: N lists of M texts, under the augmented ones.
    """
    rows, columns = augmented.shape[:2]
    figure = Figure(figsize=(1.5 * (columns + 1), 1.75 * rows), layout="constrained")
    for row, line in enumerate(figure.subplots(rows, columns + 1, squeeze=False)):
        pictures = [originals[row], *augmented[row]]
        for axes, picture, text in zip(line, pictures, [labels[row], *mixed_labels[row]], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(text, fontsize=7, fontweight="bold" if axes is line[0] else "normal")
    return figure


def filter_grid(filters: np.ndarray, heading: str, titles: list[str] | None = None, columns: int = 7) -> Figure:
    """Filters or their principal components as small pictures, each stretched to [0, 1].

    Args:
        filters: (n, P, P, C), colours for C of 3, grey for 1. titles: of each, above it.
    """
    columns = min(columns, len(filters))
    rows = -(-len(filters) // columns)
    side, above = (1.1, 0.2) if titles else (0.75, 0)
    figure = Figure(figsize=(max(side * columns + 0.2, 4.6), (side + above) * rows + 0.5), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if number < len(filters):
            picture = stretched(filters[number])
            axes.imshow(picture.repeat(3 // picture.shape[-1], axis=-1), interpolation="nearest")
            axes.set_title(titles[number] if titles else "", fontsize=7)
    return figure


def similarity_tiles(similarity: np.ndarray) -> Figure:
    """One tile for each position, at its place: its similarity with all positions.

    Args:
        similarity: (h, w, h, w) in [-1, 1].
    """
    height, width = similarity.shape[:2]
    cell = max(1, 12 // max(height, width))  # wide enough for thin lines between the tiles
    down, across = height * cell + 1, width * cell + 1
    mosaic = np.full((height * down - 1, width * across - 1), np.nan)
    for row, column in np.ndindex(height, width):
        tile = similarity[row, column].repeat(cell, axis=0).repeat(cell, axis=1)
        mosaic[row * down : (row + 1) * down - 1, column * across : (column + 1) * across - 1] = tile
    side = 6.2 / max(height, width)
    figure = Figure(figsize=(side * width + 1.9, side * height + 1.1), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(mosaic, vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    for axis, count, period in ((axes.yaxis, height, down), (axes.xaxis, width, across)):
        numbers = np.arange(0, count, max(1, -(-count // 16)))
        axis.set_ticks(numbers * period + period / 2 - 1, [str(number + 1) for number in numbers])
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set(xlabel="input patch column", ylabel="input patch row", title="Position similarity")
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.9)
    return figure


def distance_by_layer(distance: np.ndarray, uniform: float, definition: str) -> Figure:
    """Mean attention distance, a dot for each head of each layer.

    Args:
        distance: pixels (layers, heads). uniform: the distance in pixels of attention that is spread evenly, drawn as a
            line. definition: of the two, under the title.
    """
    layers, heads = distance.shape
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for head, line in enumerate(distance.T):
        colour = colormaps["turbo"]((head + 0.5) / heads)
        axes.scatter(np.arange(1, layers + 1), line, s=22, alpha=0.8, label=f"head {head + 1}", color=colour)
    axes.axhline(uniform, color="grey", linewidth=1, linestyle="--", label="uniform attention")
    axes.set(
        xlabel="network depth (layer)",
        ylabel="mean attention distance (pixels)",
        ylim=(0, 1.06 * max(uniform, distance.max())),
    )
    axes.set_title(f"Mean attention distance of each head\n{definition}", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def maps_over_images(
    images: np.ndarray, maps: np.ndarray, titles: list[str], names: list[str], heading: str
) -> Figure:
    """Each image beside the maps of it, drawn over it: one row an image, one column a kind of map; few columns make
    room for several images in a row. Each map is divided by its largest value.

    Args:
        images: uint8 (B, H, W, 3). maps: not negative, (B, M, h, w). titles: of the images. names: M names of the maps.
    """
    count, kinds = maps.shape[:2]
    abreast = max(1, min(count, 8 // (kinds + 1)))  # images in a row
    rows, columns = -(-count // abreast), abreast * (kinds + 1)
    height, width = images.shape[1:3]
    side = 1.35 if columns <= 9 else 1.0
    figure = Figure(figsize=(side * columns + 0.9, (side * height / width + 0.28) * rows + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    shown = None
    for axes in grid.flat:
        axes.set_axis_off()
    for number in range(count):
        row, first = number // abreast, number % abreast * (kinds + 1)
        line = grid[row, first : first + kinds + 1]
        line[0].imshow(images[number], interpolation="nearest")
        line[0].set_title(titles[number], fontsize=7, parse_math=False)
        for axes, map, name in zip(line[1:], maps[number], names, strict=True):
            axes.imshow(images[number].mean(axis=-1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            shown = axes.imshow(
                map / max(map.max(), 1e-12), cmap="inferno", vmin=0, vmax=1, alpha=0.65, interpolation="bilinear",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )  # fmt: skip
            axes.set_title(name, fontsize=7)
    if shown is not None:
        figure.colorbar(shown, ax=grid, label="share of the map's largest", shrink=0.8, aspect=30)
    return figure


def layer_matrix(similarity: np.ndarray, names: list[str]) -> Figure:
    """How alike each pair of layers is, the first layer at the bottom left. The colours begin at 0, or below where an
    estimate is negative; a layer without similarity is grey.

    Args:
        similarity: (L, L) in [-1, 1], or nan.
    """
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    lowest = min(0.0, float(np.nanmin(similarity, initial=0.0)))
    shown = axes.imshow(
        similarity, vmin=lowest, vmax=1, cmap=colormaps["magma"].with_extremes(bad="grey"), origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    places = np.arange(0, len(names), max(1, -(-len(names) // 18)))
    axes.set_xticks(places, [names[place] for place in places], rotation=90, fontsize=8)
    axes.set_yticks(places, [names[place] for place in places], fontsize=8)
    axes.set(xlabel="layer", ylabel="layer", title="Similarity of layers (linear CKA)")
    figure.colorbar(shown, ax=axes, label="linear CKA, unbiased estimate")
    return figure


def pairs_of_images(images: np.ndarray, pictures: np.ndarray, titles: list[str], name: str, heading: str) -> Figure:
    """Each image above a picture of it, RGB.

    Args:
        images: uint8 (B, H, W, 3). pictures: (B, h, w, 3) in [0, 1].
    """
    count, columns = len(images), min(8, len(images))
    rows = -(-count // columns)
    ratio = images.shape[1] / images.shape[2]
    figure = Figure(figsize=(1.3 * columns + 0.2, (2.6 * ratio + 0.5) * rows + 0.5), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number in range(count):
        above, below = grid[number // columns * 2, number % columns], grid[number // columns * 2 + 1, number % columns]
        above.imshow(images[number], interpolation="nearest")
        above.set_title(titles[number], fontsize=7, parse_math=False)
        below.imshow(pictures[number], interpolation="nearest", extent=(0, images.shape[2], images.shape[1], 0))
        below.set_title(name, fontsize=7)
    return figure


def stretched(picture: np.ndarray) -> np.ndarray:
    """Lowest value to 0, highest to 1."""
    low, high = picture.min(), picture.max()
    return (picture - low) / max(high - low, 1e-12)
