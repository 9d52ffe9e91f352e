"""The `glyphs` set: characters other than the ten digits, rendered from the fonts that matplotlib ships.

Job: make a labelled pretraining set on any machine without a network; each image depends on (seed, split, index)
alone, never on a global generator, the process or the order of generation.
Must not know: models, training, subset rules, the digits set.
"""

import dataclasses
import functools
import io
import os

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIZE = 32  # pixels
TRAIN_PER_CLASS = 250
# A glyph is scaled to fill the frame, as a digit does, so a lower-case letter that is its capital drawn smaller
# (c o s u v w x z) would be the same picture with another label; the same goes for l and I, and for p and P. These
# are left out, and signs and Greek letters with a shape of their own stand in.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijkmnqrty"
SIGNS = "!?#$%&@+<*€£§{"
GREEK = "ΓΔΘΛΣΨαβγδλμπσω"
CLASS_NAMES = list(LETTERS + SIGNS + GREEK)
UNICODE_FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Bold "
    "DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic "
    "DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta"
).split()
# Computer Modern files keep TeX's own encodings: Latin letters sit at their code points, other slots claim code
# points that they do not draw, so these fonts are used for letters alone. cmex10 and cmsy10, the STIX size and
# non-Unicode fonts and the Display and LastResort fonts draw symbols or nothing at these code points.
LETTER_FONTS = "cmr10 cmb10 cmss10 cmti10 cmtt10 cmmi10".split()
CANVAS_SIZE = 2 * IMAGE_SIZE  # drawn at twice the size and averaged down, so that thin strokes stay even
GLYPH_SIZE = 52  # the longer side of an undistorted glyph on the canvas, in canvas pixels
SPLIT_NUMBERS = {"train": 0, "test": 1}


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode (H, W) uint8 grey pixels as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@functools.cache
def fonts_with(character: str) -> tuple[str, ...]:
    """Return the paths of the fonts that draw `character`, always in the same order."""
    names = UNICODE_FONTS + (LETTER_FONTS if character in LETTERS else [])
    return tuple(path for path in map(_font_path, names) if ord(character) in _code_points(path))


def _font_path(name: str) -> str:
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")


@functools.cache
def _code_points(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


@functools.cache
def _masters(character: str, path: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Draw one glyph, centred and scaled to fill the canvas, with thinned, true and thickened strokes."""
    font = ImageFont.truetype(path, 2 * CANVAS_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    drawing = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(drawing).text((-left, -top), character, fill=255, font=font)
    scale = GLYPH_SIZE / max(drawing.size)
    size = [max(1, round(side * scale)) for side in drawing.size]
    canvas = Image.new("L", (CANVAS_SIZE, CANVAS_SIZE), 0)
    corner = tuple((CANVAS_SIZE - side) // 2 for side in size)
    canvas.paste(drawing.resize(size, Image.Resampling.BOX), corner)
    thin = Image.blend(canvas, canvas.filter(ImageFilter.MinFilter(3)), 0.5)  # all of it would break hairlines
    return thin, canvas, canvas.filter(ImageFilter.MaxFilter(3))


def render_glyph(character: str, rng: np.random.Generator) -> np.ndarray:
    """Draw `character` in a random font, stroke width, affine map and sharpness: (32, 32) uint8, white on black.

    Rotation is within 12 degrees, shear within 0.2, each side's scale within 0.75..1.2, the shift within 2 pixels;
    every second image is passed through a grid of 8 to 20 pixels, so that the set also holds coarse images.

    Args:
        character: one of CLASS_NAMES.
        rng: the only source of randomness.
    """
    paths = fonts_with(character)
    master = _masters(character, paths[rng.integers(len(paths))])[rng.integers(3)]
    angle, shear = rng.uniform(-0.21, 0.21), rng.uniform(-0.2, 0.2)
    width, height = rng.uniform(0.75, 1.2, size=2)
    shift = rng.uniform(-4, 4, size=2)
    forward = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = forward @ np.array([[1, shear], [0, 1]]) @ np.diag([width, height])
    inverse = np.linalg.inv(forward)  # Pillow asks where each output pixel comes from
    centre = np.full(2, CANVAS_SIZE / 2)
    offset = centre - inverse @ (centre + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    moved = master.transform(master.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    image = moved.reduce(CANVAS_SIZE // IMAGE_SIZE)
    if rng.random() < 0.5:
        grid = int(rng.integers(8, 21))
        coarse = image.resize((grid, grid), Image.Resampling.BOX)
        image = coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


@dataclasses.dataclass
class GlyphsConfig(datasets.BuilderConfig):
    """What the generated set depends on; both values are part of the name of its cache folder."""

    seed: int = 0
    train_per_class: int = TRAIN_PER_CLASS


class GlyphsBuilder(datasets.GeneratorBasedBuilder):
    """Builder of the glyph set; raise VERSION whenever a pixel or a class changes."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = GlyphsConfig

    def _info(self) -> datasets.DatasetInfo:
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        per_class = {"train": self.config.train_per_class, "test": max(1, round(self.config.train_per_class / 9))}
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "num_images": count * len(CLASS_NAMES)})
            for split, count in per_class.items()
        ]

    def _generate_examples(self, split: str, num_images: int):
        for index in range(num_images):
            yield index, glyph_example(self.config.seed, split, index)


def glyph_example(seed: int, split: str, index: int) -> dict:
    """Return row `index` of a split: `image` (PNG bytes) and `label`, a function of the three arguments alone."""
    label = index % len(CLASS_NAMES)
    rng = np.random.default_rng((seed, SPLIT_NUMBERS[split], index))
    pixels = render_glyph(CLASS_NAMES[label], rng)
    return {"image": {"bytes": png_bytes(pixels), "path": None}, "label": label}


def load_glyphs_splits(
    seed: int = 0, train_per_class: int = TRAIN_PER_CLASS, cache_dir: str | None = None
) -> datasets.DatasetDict:
    """Return the glyph set as splits `train` and `test` (a tenth of all images), made once and then read from cache.

    Each row is `image`, a PNG of (32, 32) uint8 grey pixels, and `label`, a ClassLabel whose names are the
    characters; every class has the same number of images. The two splits draw from the same fonts with different
    random numbers. The pixels also depend on the installed fonts (matplotlib) and rasteriser (Pillow).

    Args:
        seed: at least 0; another seed gives other images of the same classes.
        train_per_class: images of each class in `train`.
        cache_dir: folder of the cache; None is the usual Hugging Face datasets cache.
    """
    builder = GlyphsBuilder(cache_dir=cache_dir, seed=seed, train_per_class=train_per_class)
    builder.download_and_prepare()
    return builder.as_dataset()
