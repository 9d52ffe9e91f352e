"""From encoded bytes to uint8 pixels of one size, as the exported image processor does it.

This module must not know about batches, epochs or devices.
"""

import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from vit_hf.data.preprocessing import Preprocessing

# what Pillow raises for bytes that are no image, are cut off, changed or absurdly large: beside its own errors nearly
# anything, by format; not MemoryError, which says nothing of the image
DECODE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, Image.DecompressionBombError, LookupError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
JPEGS = ("JPEG", "MPO")  # files that can be decoded at a fraction of their size; MPO is a JPEG with more behind it
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the orientation that a camera noted


def open_image(value: dict[str, Any]) -> Image.Image:
    """Opens a row of a `datasets.Image(decode=False)` column, {"bytes", "path"}, as RGB: upright where a camera
    noted its orientation (as datasets and pipelines do), transparent parts white (as the image processor does), grey of
    more than 8 bits scaled to 8 (which the image processor clips).

    Raises:
        One of DECODE_ERRORS.
    """
    with _open(value) as image:
        return _rgb(_upright(image), image)


def _open(value: Any) -> Image.Image:
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or not value.size:
            raise ValueError(f"pixels of {value.dtype} {value.shape}, allowed are uint8 (height, width, 3)")
        return Image.fromarray(value)
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    if source is None:
        raise ValueError("neither bytes nor a path")
    return Image.open(source)


def _upright(image: Image.Image) -> Image.Image:
    if image.format in JPEGS and "exif" not in image.info:  # nearly all: asking for tags would cost time
        return image
    method = TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image, file: Image.Image) -> Image.Image:
    """An image, perhaps turned, in RGB; `file` is what was opened, which knows the range of its samples."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), *_sample_range(file))).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _resize(image: Image.Image, sides: tuple[int, int], resample: int) -> Image.Image:
    """Resizes to (width, height), unless that would be absurdly large."""
    if sides[0] * sides[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(
            f"a shape of {image.width} x {image.height}, resized to {sides[0]} x {sides[1]}"
        )
    return image.resize(sides, resample)


def _sample_range(file: Image.Image) -> tuple[float, float]:
    """The samples that are black and white in a grey file of more than 8 bits: all that up to 16 bits can hold, what
    a TIFF file tells of others, and 0 to 1 of floats of which nothing is told, as scikit-image and OpenCV write them.
    Raises ValueError for integers of which nothing is told.

    Source: TIFF 6.0, sections 8 and 19 (tags 258, 280, 281, 339, 340 and 341).
    """
    tags = getattr(file, "tag_v2", {})
    told = {number: np.ravel(tags[number])[0] for number in (258, 280, 281, 339, 340, 341) if number in tags}
    signed, bits = told.get(339) == 2, int(told.get(258, 16))
    whole = file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM", "TIFF"))
    if whole and bits <= 16 and not signed:
        return 0.0, 2.0**bits - 1
    for low, high in ((340, 341), (280, 281)):
        if high in told:
            return float(told.get(low, 0)), float(told[high])
    if file.mode == "F":
        return 0.0, 1.0
    raise ValueError(
        f"grey of {bits} {'signed ' if signed else ''}bits, and the file does not tell which are black and white"
    )


def _eight_bits(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey levels uint8, evenly from `low` to `high`, each level as wide as the others. Raises ValueError for samples
    outside."""
    samples = samples.astype(np.float64)
    if not low <= samples.min() <= samples.max() <= high or low == high:  # also where one is not a number
        raise ValueError(f"samples from {samples.min():g} to {samples.max():g}, its range is {low:g} to {high:g}")
    return np.minimum((samples - low) * (256 / (high - low)), 255).astype(np.uint8)


def resized_sides(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) to which an image of (width, height) is resized, before its centre is cut."""
    if preprocessing.shortest_edge is None:
        height, width = preprocessing.resized or preprocessing.image_size
        return width, height
    short, long = sorted(size)
    sides = (preprocessing.shortest_edge, int(preprocessing.shortest_edge * long / short))
    return sides if size[0] <= size[1] else sides[::-1]


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resizes (and centre-crops) as the image processor does: uint8 (H, W, 3)."""
    height, width = preprocessing.image_size
    image = _resize(image, resized_sides(image.size, preprocessing), preprocessing.resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def crop_to_pixels(
    value: dict[str, Any],
    box_of: Callable[[tuple[int, int]], tuple[float, float, float, float]],
    preprocessing: Preprocessing,
    bicubic: bool = False,
) -> np.ndarray:
    """Cuts a box of an undecoded row, to whole pixels, and resizes it with torch's antialiased bilinear or bicubic
    filter, which does what Pillow's does in less than half the time: uint8 (H, W, 3).

    A JPEG is decoded at a half, a quarter or an eighth of its size where the box still has the pixels it needs.

    Args:
        value: as for `open_image`.
        box_of: called with (height, width) of the upright image, gives (top, left, height, width), in its pixels.

    Raises:
        One of DECODE_ERRORS.
    """
    height, width = preprocessing.image_size
    with _open(value) as image:
        upright = _upright(image)
        full_width, full_height = upright.size
        top, left, box_height, box_width = box_of((full_height, full_width))
        spare = min(box_height / height, box_width / width)
        if upright is image and image.format in JPEGS and spare >= 2:
            image.draft(None, (int(full_width / spare), int(full_height / spare)))
        rgb = _rgb(upright, image)
        x, y = rgb.width / full_width, rgb.height / full_height
        left, right = round(left * x), round((left + box_width) * x)
        top, bottom = round(top * y), round((top + box_height) * y)
        cut = np.array(rgb.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    import torch  # not at the top: processes that only decode whole images start without it

    channels_first = torch.from_numpy(cut).permute(2, 0, 1)[None]
    mode = "bicubic" if bicubic else "bilinear"
    resized = torch.nn.functional.interpolate(channels_first, (height, width), mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def simple_crop_to_pixels(
    value: dict[str, Any], place: np.ndarray, padding: int, preprocessing: Preprocessing
) -> np.ndarray:
    """Resizes an undecoded row so that it just covers the input, mirrors `padding` pixels at each border, and cuts
    anywhere: uint8 (H, W, 3).

    Args:
        place: top and left in [0, 1), as shares of the places that there are.

    Source: the simple random crop of DeiT III (arXiv 2204.07118, section 3), as facebookresearch/deit, augment.py has
    it.

    Raises:
        One of DECODE_ERRORS.
    """
    height, width = preprocessing.image_size
    image = open_image(value)
    covers = (width, max(height, int(width * image.height / image.width)))
    if image.width * height > width * image.height:  # wider than the input
        covers = (max(width, int(height * image.width / image.height)), height)
    resized = np.asarray(_resize(image, covers, preprocessing.resample))
    padded = np.pad(resized, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    spare = np.array([padded.shape[0] - height + 1, padded.shape[1] - width + 1])
    top, left = (place * spare).astype(int)
    return padded[top : top + height, left : left + width]


def decode_row(
    value: Any,
    preprocessing: Preprocessing | None,
    box_of: Callable[[tuple[int, int]], tuple[float, float, float, float]] | None = None,
    place: np.ndarray | None = None,
    padding: int = 0,
    bicubic: bool = False,
) -> np.ndarray | str:
    """The pixels of a row, uint8 (H, W, 3), or why there are none. A MemoryError is not the image's fault and passes.

    Args:
        value: an undecoded row, or pixels, uint8 (H, W, 3), of a set that is rendered and not stored.
        preprocessing: None leaves the image at its own size.
        box_of, bicubic: as for `crop_to_pixels`. place, padding: as for `simple_crop_to_pixels`. None takes the whole
            image, resized as the preprocessing says.
    """
    try:
        if preprocessing is None:
            return np.asarray(open_image(value))
        if box_of is not None:
            return crop_to_pixels(value, box_of, preprocessing, bicubic)
        if place is not None:
            return simple_crop_to_pixels(value, place, padding, preprocessing)
        return to_pixels(open_image(value), preprocessing)
    except DECODE_ERRORS as error:
        if "can't allocate memory" in str(error):  # torch's words, in a RuntimeError
            raise MemoryError from None
        name = f"file {value['path']}, " if isinstance(value, dict) and value.get("path") else ""
        reason = re.sub(r" ?<_io.BytesIO object at \w+>", "", " ".join(str(error).split()))
        return f"{name}{type(error).__name__}: {reason}"


def image_size(value: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels as the file's header says, before any turning; reads no pixels.

    Raises:
        One of DECODE_ERRORS.
    """
    with _open(value) as image:
        return image.height, image.width
