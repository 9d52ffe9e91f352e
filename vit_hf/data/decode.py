"""From encoded bytes to uint8 pixels of one size, as the exported image processor does it.

This module must not know about batches, epochs or devices.
"""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from vit_hf.data.preprocessing import Preprocessing

# what Pillow raises for bytes that are no image, are cut off, changed or absurdly large: beside its own errors nearly
# anything (struct.error, TypeError, RuntimeError, MemoryError), by format
DECODE_ERRORS = (Exception,)
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
    noted its orientation (as datasets and pipelines do), transparent parts white (as the image processor does), 16-bit
    grey scaled to 8 bits (which the image processor clips).

    Raises:
        One of DECODE_ERRORS.
    """
    with _open(value) as image:
        return _rgb(_upright(image))


def _open(value: Any) -> Image.Image:
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    if source is None:
        raise ValueError("neither bytes nor a path")
    return Image.open(source)


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and "exif" not in image.info:  # nearly all: asking for tags would cost time
        return image
    method = TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    sides = resized_sides(image.size, preprocessing)
    if sides[0] * sides[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(
            f"a shape of {image.width} x {image.height}, resized to {sides[0]} x {sides[1]}"
        )
    image = image.resize(sides, preprocessing.resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def crop_to_pixels(
    value: dict[str, Any],
    box_of: Callable[[tuple[int, int]], tuple[float, float, float, float]],
    preprocessing: Preprocessing,
) -> np.ndarray:
    """Cuts a box of an undecoded row, to whole pixels, and resizes it with torch's antialiased bilinear filter, which
    does what Pillow's does in less than half the time: uint8 (H, W, 3).

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
        if upright is image and image.format == "JPEG" and spare >= 2:
            image.draft(None, (int(full_width / spare), int(full_height / spare)))
        rgb = _rgb(upright)
        x, y = rgb.width / full_width, rgb.height / full_height
        left, right = round(left * x), round((left + box_width) * x)
        top, bottom = round(top * y), round((top + box_height) * y)
        cut = np.array(rgb.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    import torch  # not at the top: processes that only decode whole images start without it

    channels_first = torch.from_numpy(cut).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def decode_row(
    value: Any,
    preprocessing: Preprocessing | None,
    box_of: Callable[[tuple[int, int]], tuple[float, float, float, float]] | None = None,
) -> np.ndarray | str:
    """The pixels of a row, uint8 (H, W, 3), or why there are none.

    Args:
        value: an undecoded row, or pixels, uint8 (H, W, 3), of a set that is rendered and not stored.
        preprocessing: None leaves the image at its own size.
        box_of: as for `crop_to_pixels`; None takes the whole image.
    """
    try:
        if preprocessing is None:
            return np.asarray(open_image(value))
        if box_of is None:
            return to_pixels(open_image(value), preprocessing)
        return crop_to_pixels(value, box_of, preprocessing)
    except DECODE_ERRORS as error:
        name = f"file {value['path']}, " if value.get("path") else ""
        reason = re.sub(r" ?<_io.BytesIO object at \w+>", "", " ".join(str(error).split()))
        return f"{name}{type(error).__name__}: {reason}"


def image_size(value: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels as the file's header says, before any turning; reads no pixels.

    Raises:
        One of DECODE_ERRORS.
    """
    with _open(value) as image:
        return image.height, image.width
