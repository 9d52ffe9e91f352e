"""The `fractal` set: pictures of random iterated function systems, each system a class (FractalDB, and its OFDB form).

Job: make a labelled pretraining set of any size without a network; a class depends on (seed, class number) alone and
an image on its class and (seed, split, index) alone, never on a global generator, the process or the order.
Must not know: models, training, subset rules, the other generated sets (it borrows their PNG encoder).

Source: Kataoka et al., "Pre-training without Natural Images", ACCV 2020, arXiv 2101.08515 (the search, the weights of
the instances, the 3x3 patches); Kataoka et al., CVPR 2022, arXiv 2206.09132 (in colour); Nakamura et al., ICCV 2023,
arXiv 2307.14710 (one image a class). Their points come from one long chaos game; here the same distribution is drawn
in one go, see `_attractor_points`.
"""

import dataclasses
import functools
import re
import typing

import datasets
import numpy as np

from vit_hf.data.rows.interface import LazyRows
from vit_hf.data.sets.glyphs import png_bytes
from vit_hf.errors import UserError, nearest

FLAG = "--dataset_config_name"
LIMITS = {
    "num_classes": (2, 100_000),
    "instances_per_class": (1, 1_000_000),
    "image_size": (16, 1024),
    "seed": (0, 2**32 - 1),
}
SPLIT_NUMBERS = {"train": 0, "test": 1}
CLASS_NUMBER, SEARCH_NUMBER = 2, 3  # in a split's place: where a class draws its systems, and the search its points
MIN_MAPS, MAX_MAPS = 2, 8
MIN_FILL = 0.2  # share of the pixels that a class must reach at the search resolution
SEARCH_SIZE = 512  # pixels
SEARCH_STARTS = 112  # about 100,000 points, as FractalDB's search has
ROUND_SIZE = 32  # systems that an unfinished class draws at a time; part of what the classes are
SCREEN_SIZE, SCREEN_CHAINS, SCREEN_WARM_UP, SCREEN_STEPS = 64, 128, 10, 16
SCREEN_FILL = 0.26  # 99 of 100 systems of MIN_FILL reach it in the few points of the screen
FACTORS = (0.2, 0.6, 1.4, 1.8)  # of one of the six parameters, in all maps alike
MIN_INSTANCE_FILL = 0.1  # share of the pixels hit, below which a varied system is brought closer to its class
PLAIN_PATCH = 0b000010000  # the centre alone: a point is one pixel
MARGIN = 6 / 512  # of the picture's side, empty on each of the four sides
START_SETS = 8  # sets of starting points, taken in turn by the words; a picture has 8 points for each pixel
WORD_ROWS = 4  # a word is worth less than this many rows; below START_SETS, so that equal words start elsewhere
WARM_UP = 6  # random words that bring a starting point onto the attractor
MAX_LETTERS = 24  # of a word; only systems that nearly always take the same map would go on


@dataclasses.dataclass(frozen=True)
class FractalOptions:
    """What the set depends on.

    Args:
        num_classes: systems, 2..100000.
        instances_per_class: training images of each class; 1 is OFDB, one unvaried picture a class.
        image_size: pixels of a side.
        colour: False makes grey pictures.
        seed: another seed gives other classes and other images.

    Raises:
        UserError: a value of the wrong kind or out of range.
    """

    num_classes: int = 1000
    instances_per_class: int = 100
    image_size: int = 64
    colour: bool = True
    seed: int = 0

    def __post_init__(self):
        if type(self.colour) is not bool:
            raise UserError(f"{FLAG} colour={self.colour!r}: allowed are true and false")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UserError(f"{FLAG} {name}={value!r}: allowed are whole numbers {low}..{high}")


def parse_options(text: str | None) -> FractalOptions:
    """Read "num_classes=1000,instances_per_class=1,colour=false"; what is not named keeps its default.

    Raises:
        UserError: an unknown or repeated name, or a value that FractalOptions refuses.
    """
    known = [field.name for field in dataclasses.fields(FractalOptions)]
    words = {"true": True, "false": False}
    values: dict[str, typing.Any] = {}
    for part in filter(None, map(str.strip, (text or "").split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise UserError(f"{FLAG} {part!r}: the fractal set has no option {name!r}; {nearest(name, known)}")
        if name in values:
            raise UserError(f"{FLAG} {part!r}: {name} is given twice; leave one of the two out")
        is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", value)
        values[name] = int(value) if is_number else words.get(value.lower(), value)
    return FractalOptions(**values)


def class_names(options: FractalOptions) -> list[str]:
    """The names of the classes, "fractal_0000" and so on."""
    return [f"fractal_{number:04d}" for number in range(options.num_classes)]


def num_images(options: FractalOptions, split: str) -> int:
    """Rows of a split; `test` has a tenth of all images, and at least one of each class."""
    count = options.instances_per_class
    return options.num_classes * {"train": count, "test": max(1, round(count / 9))}[split]


@dataclasses.dataclass(frozen=True, eq=False)
class Systems:
    """The systems of all classes, behind one another: systems[k] is the float64 (N, 6) of class k.

    Args:
        maps: float64 (M, 6), all maps. ends: int64 (K,), one past the last map of each class.
    """

    maps: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.maps[self.ends[number - 1] if number else 0 : self.ends[number]]


def fractal_classes(options: FractalOptions) -> Systems:
    """Find the system of each class: a function of (seed, class number) alone, whatever the number of classes is.

    A class draws systems of 2 to 8 maps with parameters uniform in (-1, 1) and keeps the first one that is bounded
    and fills at least a fifth of 512 x 512 pixels with about 100,000 points. Seconds for 1,000 classes; the last
    search is remembered by the process.

    Source: arXiv 2101.08515, section 3.2; bounded (each map's spectral radius below 1) is added, so that an image's
    frame does not hang on how far a rare point went.
    """
    return _search(options.seed, options.num_classes)


@functools.lru_cache(maxsize=2)
def _search(seed: int, num_classes: int) -> Systems:
    rngs = {number: np.random.default_rng((seed, CLASS_NUMBER, number)) for number in range(num_classes)}
    found: dict[int, np.ndarray] = {}
    while rngs:
        # in small groups, because the screen holds some hundred bytes for each of its points
        for numbers in _groups(list(rngs), 64):
            systems, sizes = zip(*(_draw_systems(rngs[number]) for number in numbers))
            passed = _screen(np.concatenate(systems), np.concatenate(sizes)).reshape(len(numbers), ROUND_SIZE)
            for number, candidates, size, flags in zip(numbers, systems, sizes, passed):
                accepted = (candidates[k, : size[k]] for k in np.flatnonzero(flags))
                system = next((maps for maps in accepted if _search_fill(maps) >= MIN_FILL), None)
                if system is not None:
                    found[number] = system
                    del rngs[number]
    systems = [found[number] for number in range(num_classes)]
    maps, ends = np.concatenate(systems), np.cumsum([len(system) for system in systems])
    maps.flags.writeable = ends.flags.writeable = False  # every caller gets the same arrays
    return Systems(maps, ends)


def _groups(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _draw_systems(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw ROUND_SIZE candidates: float64 (R, 8, 6), zero behind the last map, and the number of maps (R,)."""
    sizes = rng.integers(MIN_MAPS, MAX_MAPS + 1, size=ROUND_SIZE)
    maps = rng.uniform(-1, 1, size=(ROUND_SIZE, MAX_MAPS, 6))
    maps[np.arange(MAX_MAPS) >= sizes[:, None]] = 0
    return maps, sizes


def _is_bounded(maps: np.ndarray) -> np.ndarray:
    """Whether no map of a system expands when it is repeated (spectral radius below 1): (..., N, 6) -> bool (...)."""
    a, b, c, d = np.moveaxis(maps[..., :4], -1, 0)
    half_trace, determinant = (a + d) / 2, a * d - b * c
    root = half_trace * half_trace - determinant
    radius = np.where(root < 0, np.sqrt(np.abs(determinant)), np.abs(half_trace) + np.sqrt(np.maximum(root, 0)))
    return np.all(radius < 1, axis=-1)


def _probabilities(maps: np.ndarray) -> np.ndarray:
    """How often each map is applied, in proportion to its |determinant|: (..., N, 6) -> (..., N), which sums to 1."""
    a, b, c, d = np.moveaxis(maps[..., :4], -1, 0)
    area = np.abs(a * d - b * c)
    return area / np.cumsum(area, axis=-1)[..., -1:]  # a running sum has one order on every machine


@functools.cache
def _search_numbers() -> tuple[np.ndarray, "_Draws"]:
    """The random numbers of the search, the same for every system, so that a verdict hangs on the system alone."""
    rng = np.random.default_rng((0, SEARCH_NUMBER))
    return rng.random((SCREEN_WARM_UP + SCREEN_STEPS, SCREEN_CHAINS)), _draw(rng, SEARCH_STARTS)


def _screen(maps: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Play a few short chaos games with each system and say which are worth the full test: (S, 8, 6), (S,) -> bool."""
    passed = _is_bounded(maps)
    maps = maps[passed]
    limits = np.cumsum(_probabilities(maps), axis=-1)
    limits[np.arange(MAX_MAPS) >= sizes[passed, None] - 1] = 2  # the last map takes the rest
    x = y = np.zeros((len(maps), SCREEN_CHAINS))
    row = MAX_MAPS * np.arange(len(maps))[:, None]
    table = np.ascontiguousarray(maps.reshape(-1, 6).T)
    xs, ys = [], []
    for step, uniform in enumerate(_search_numbers()[0]):
        letter = sum((uniform >= limits[:, k, None]).astype(np.int64) for k in range(MAX_MAPS - 1))
        chosen = row + letter
        a, b, c, d, e, f = (column[chosen] for column in table)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= SCREEN_WARM_UP:
            xs.append(x)
            ys.append(y)
    columns, rows = (_screen_cells(np.concatenate(values, axis=1)) for values in (xs, ys))
    cells = SCREEN_SIZE**2
    hits = np.bincount(
        (cells * np.arange(len(maps))[:, None] + SCREEN_SIZE * rows + columns).ravel(), minlength=cells * len(maps)
    )
    passed[passed] = np.count_nonzero(hits.reshape(len(maps), cells), axis=1) >= SCREEN_FILL * cells
    return passed


def _screen_cells(values: np.ndarray) -> np.ndarray:
    """Number the coordinates (S, P) by cells of each row's own range: int64 0..SCREEN_SIZE - 1."""
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    return ((values - low) / np.maximum(high - low, 1e-30) * (SCREEN_SIZE - 1e-6)).astype(np.int64)


def _search_fill(system: np.ndarray) -> float:
    x, y, _ = _attractor_points(system, _probabilities(system), _search_numbers()[1])
    pixels = _pixel_numbers(x, y, SEARCH_SIZE)
    return 0.0 if pixels is None else np.count_nonzero(np.bincount(pixels.ravel())) / SEARCH_SIZE**2


class _Draws(typing.NamedTuple):
    """Random numbers of one picture's points: places float64 (W,) in [0, 1), ascending; picks int64 (WARM_UP, Q)."""

    places: np.ndarray
    picks: np.ndarray


def _draw(rng: np.random.Generator, starts: int) -> _Draws:
    """Draw the numbers for Q = `starts` points a word and W = 8 Q words."""
    words = START_SETS * starts
    return _Draws((np.arange(words) + rng.random(words)) / words, rng.integers(words, size=(WARM_UP, starts)))


@np.errstate(over="ignore", invalid="ignore")  # a system may diverge: its points have no picture
def _attractor_points(
    system: np.ndarray, probabilities: np.ndarray, draws: _Draws
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw W x Q points of the attractor, distributed as a chaos game's: x and y float32 (W, Q), and the map (W,) that
    was applied last to each row.

    A row is one word, a composition of maps drawn letter by letter, applied to Q points that are on the attractor
    already. A word ends when it is about as probable as WORD_ROWS rows, so the words shrink the attractor to pieces of
    similar weight, which cover it evenly; neighbouring rows, which may be the same word, start from different points.

    Args:
        system: (N, 6). probabilities: (N,), of the maps.
    """
    maps, first = _words(system, probabilities, draws.places)
    a, b, c, d, e, f = maps
    x = y = np.zeros(draws.picks.shape[1])
    for picks in draws.picks:
        x, y = a[picks] * x + b[picks] * y + e[picks], c[picks] * x + d[picks] * y + f[picks]
    # one point from each word, in the words' order: every eighth is a set that is spread over the whole attractor
    x, y = np.tile(x, START_SETS), np.tile(y, START_SETS)
    starts = np.stack([a * x + b * y + e, c * x + d * y + f]).astype(np.float32)
    x, y = np.ascontiguousarray(starts.reshape(2, -1, START_SETS).swapaxes(1, 2))
    # plain products and sums in one order: a matrix product's last bits differ between machines
    a, b, c, d, e, f = maps.astype(np.float32).reshape(6, -1, START_SETS, 1)
    points_x, points_y, product = a * x, c * x, b * y
    points_x += product
    points_x += e
    points_y += np.multiply(d, y, out=product)  # fresh memory of this size costs more than the product itself
    points_y += f
    return points_x.reshape(maps.shape[1], -1), points_y.reshape(maps.shape[1], -1), first


def _words(system: np.ndarray, probabilities: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compose a word for each place in [0, 1): its maps float64 (6, W), and its first letter, applied last, (W,).

    The words tile [0, 1) in the order of their letters, each as wide as it is probable, so evenly spread places draw
    every word about as often as it should come up (arithmetic coding, read backwards).
    """
    table, ends = np.ascontiguousarray(system.T), np.cumsum(probabilities)
    starts = ends - probabilities
    probabilities = np.maximum(probabilities, 1e-12)  # of a map without area, which rounding alone could choose
    ends = ends[:-1]  # the last map takes the rest
    first = letters = np.searchsorted(ends, places, side="right")
    words, share = table[:, letters], probabilities[letters]
    rows = np.flatnonzero(share * len(places) >= WORD_ROWS)
    current, share, places, letters = words[:, rows], share[rows], places[rows], letters[rows]
    for _ in range(MAX_LETTERS - 1):
        if len(rows) == 0:
            break
        places = (places - starts[letters]) / probabilities[letters]
        letters = np.searchsorted(ends, places, side="right")
        a, b, c, d, e, f = current
        inner = table[:, letters]
        current = a * inner[0] + b * inner[2], a * inner[1] + b * inner[3], c * inner[0] + d * inner[2]
        current += c * inner[1] + d * inner[3], a * inner[4] + b * inner[5] + e, c * inner[4] + d * inner[5] + f
        current = np.stack(current)
        words[:, rows] = current
        share = share * probabilities[letters]
        active = share * words.shape[1] >= WORD_ROWS
        rows, current, share, places, letters = (v[..., active] for v in (rows, current, share, places, letters))
    return words, first


@np.errstate(over="ignore", invalid="ignore")
def _pixel_numbers(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray | None:
    """Scale the points' bounding box to the picture inside its margin, y upwards: int64, row * size + column; None if
    the points diverged or lie on a line that is parallel to a side."""
    margin = max(1, round(MARGIN * size))
    left, top = x.min(), y.max()
    width, height = x.max() - left, top - y.min()
    if not (0 < width < 1e6 and 0 < height < 1e6):
        return None
    extent = np.float32(size - 2 * margin - 1e-3)  # the last point falls into the last pixel, not behind it
    scaled = x - left
    scaled *= extent / width
    numbers = scaled.astype(np.int64)
    np.subtract(top, y, out=scaled)
    scaled *= extent / height
    rows = scaled.astype(np.int64)
    rows *= size
    numbers += rows
    numbers += margin * (size + 1)
    return numbers


def render(system: np.ndarray, options: FractalOptions, split: str, index: int) -> np.ndarray:
    """Draw row `index` of a split, whose class is index % num_classes: uint8 (H, W, 3), light on black.

    As in FractalDB, one of the six parameters is multiplied by 0.2, 0.6, 1.4 or 1.8 in all maps (one image in 25 keeps
    all six), the picture is flipped in one of four ways, and points are drawn as a random pattern of 3 x 3 pixels, the
    same for the whole picture. Where the varied system diverges or fills less than a tenth of the pixels, the factor
    goes halfway back to 1, up to three times, and then to 1. With one instance a class, `train` holds the system
    itself, unflipped and in single pixels.

    A pixel is as bright as the logarithm of its number of points. In colour, each map has a random hue and saturation
    of this image's, and a point has the colour of the map that was applied to it last.

    Args:
        system: float64 (N, 6), the class's.
        split: train | test.

    Raises:
        ValueError: a system, not one of fractal_classes, whose own points diverge or lie on a line.
    """
    size = options.image_size
    rng = np.random.default_rng((options.seed, SPLIT_NUMBERS[split], index))
    draws = _draw(rng, size)
    colours = _random_colours(rng, len(system)) if options.colour else None
    choice, flip, patch = rng.integers(1 + 6 * len(FACTORS)), rng.integers(4), int(rng.integers(1, 512))
    if options.instances_per_class == 1 and split == "train":
        choice, flip, patch = 0, 0, PLAIN_PATCH
    probabilities = _probabilities(system)
    for varied in _variations(system, choice):
        x, y, last = _attractor_points(varied, probabilities, draws)
        pixels = _pixel_numbers(x, y, size)
        if pixels is None:
            continue
        if colours is None:
            hits = np.bincount(pixels.ravel(), minlength=size * size)[None]
        else:
            pixels += size * size * last[:, None]
            hits = np.bincount(pixels.ravel(), minlength=len(system) * size * size).reshape(len(system), -1)
        counts = hits.sum(axis=0)
        if varied is system or np.count_nonzero(counts) >= MIN_INSTANCE_FILL * size * size:
            break
    else:
        raise ValueError("the system has no picture: its points diverge or lie on a line")
    image = _paint(hits, counts, colours, patch).reshape(size, size, 3)
    return np.ascontiguousarray(image[:: -1 if flip & 1 else 1, :: -1 if flip & 2 else 1])


def _variations(system: np.ndarray, choice: int) -> typing.Iterator[np.ndarray]:
    """The weighted system of this choice (0: unvaried), then milder ones, bounded ones alone, and at last itself."""
    if choice > 0:
        parameter, factor = (choice - 1) % 6, FACTORS[(choice - 1) // 6]
        for halvings in range(4):
            varied = system.copy()
            varied[:, parameter] *= 1 + (factor - 1) / 2**halvings
            if _is_bounded(varied):
                yield varied
    yield system


def _random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Bright colours of random hue and saturation: whole numbers 0..255 as float64 (3, count)."""
    hue, saturation = rng.random(count), rng.uniform(0.3, 1, size=count)
    wheel = np.clip(np.abs((6 * hue + np.array([[0], [4], [2]])) % 6 - 3) - 1, 0, 1)
    return np.rint(255 * (1 - saturation * (1 - wheel)))


def _paint(hits: np.ndarray, counts: np.ndarray, colours: np.ndarray | None, patch: int) -> np.ndarray:
    """Draw every point as the 3 x 3 patch and shade: hits (N, P) of each map, counts (P,) of all -> uint8 (P, 3).

    The outermost pixels are empty (`_pixel_numbers` leaves a margin), so a patch never reaches the next row.
    """
    size = round(len(counts) ** 0.5)
    layers = counts[None].astype(np.float64)
    if colours is not None:  # einsum, because a matrix product would start threads in every worker
        layers = np.concatenate([layers, np.einsum("cn,np->cp", colours, hits.astype(np.float64))])
    if patch != PLAIN_PATCH:
        spread = np.zeros_like(layers)
        for bit in range(9):
            if patch >> bit & 1:
                shift = (bit // 3 - 1) * size + bit % 3 - 1
                spread[:, max(shift, 0) : len(counts) + min(shift, 0)] += layers[
                    :, max(-shift, 0) : len(counts) - max(shift, 0)
                ]
        layers = spread
    counts = layers[0]
    shade = np.log1p(counts)
    shade *= 0.75 / shade.max()
    shade += 0.25  # a single point is still seen
    colour = layers[1:] / np.maximum(counts, 1) if colours is not None else np.where(counts > 0, 255.0, 0.0)[None]
    return np.rint(np.broadcast_to(colour * shade, (3, len(counts)))).astype(np.uint8).T


@dataclasses.dataclass
class FractalsConfig(datasets.BuilderConfig):
    """What the generated set depends on, see FractalOptions; all values are part of the name of its cache folder."""

    num_classes: int = FractalOptions.num_classes
    instances_per_class: int = FractalOptions.instances_per_class
    image_size: int = FractalOptions.image_size
    colour: bool = FractalOptions.colour
    seed: int = FractalOptions.seed

    def options(self) -> FractalOptions:
        names = [field.name for field in dataclasses.fields(FractalOptions)]
        return FractalOptions(**{name: getattr(self, name) for name in names})


class FractalsBuilder(datasets.GeneratorBasedBuilder):
    """Builder of the fractal set; raise VERSION whenever a pixel or a class changes."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = FractalsConfig

    def _info(self) -> datasets.DatasetInfo:
        names = class_names(self.config.options())
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in SPLIT_NUMBERS]

    def _generate_examples(self, split: str):
        options = self.config.options()
        systems = fractal_classes(options)
        for index in range(num_images(options, split)):
            label = index % options.num_classes
            pixels = render(systems[label], options, split, index)
            data = png_bytes(pixels if options.colour else pixels[:, :, 0])
            yield index, {"image": {"bytes": data, "path": None}, "label": label}


def load_fractal_splits(options: FractalOptions, cache_dir: str | None = None) -> datasets.DatasetDict:
    """Return the set as splits `train` and `test`, made once and then read from the cache.

    Each row is `image`, a PNG of uint8 pixels (H, W, 3), or of grey ones (H, W), and `label`, a ClassLabel; the class
    of row `index` is index % num_classes. Both splits show the same classes with different random numbers. Classes and
    pixels also depend on NumPy's random generators, as long as it keeps their streams.

    Args:
        cache_dir: folder of the cache; None is the usual Hugging Face datasets cache.
    """
    builder = FractalsBuilder(cache_dir=cache_dir, **dataclasses.asdict(options))
    builder.download_and_prepare()
    return builder.as_dataset()


class FractalRows(LazyRows):
    """The rows of a split, drawn when they are read, with the pixels of the cached set; may be pickled and forked.

    Args:
        split: train | test.
    """

    def __init__(self, options: FractalOptions, split: str):
        self.options, self.split = options, split
        self.systems = fractal_classes(options)
        super().__init__(num_images(options, split), class_names(options))

    def source_state(self) -> list[str]:
        """The options and the version of the set."""
        return [repr(self.options), self.split, str(FractalsBuilder.VERSION)]

    def read(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Draw rows: integers (B,) -> the B pictures, uint8 (H, W, 3) each, and their labels, int64 (B,).

        Raises:
            IndexError: an index outside 0..len - 1.
        """
        index = np.asarray(index, dtype=np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows {index.min()}..{index.max()} of a split of {len(self)}")
        rows = self.source_rows[index]
        labels = rows % self.options.num_classes
        images = [
            render(self.systems[label], self.options, self.split, row)
            for row, label in zip(rows.tolist(), labels.tolist())
        ]
        return images, self.number_of[labels]
