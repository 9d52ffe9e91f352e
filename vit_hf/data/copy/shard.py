"""One image and one file of a copy: shrunk, encoded, and written whole or not at all."""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from vit_hf.data.copy.plan import Shard, Work, copy_order
from vit_hf.data.decode import DECODE_ERRORS, JPEGS, open_image
from vit_hf.data.rows.table import TableRows
from vit_hf.data.sets.origin import SOURCE_COLUMNS, SOURCE_ROW, SOURCE_SHA256
from vit_hf.errors import UserError

ROWS_PER_GROUP = 100  # what a reader of a stream has to fetch and hold at least
BAD_ROWS = "vit_hf.bad_images"  # key in a file's footer: the rows of its range that it lacks, as JSON


def _copied(value: dict[str, Any], shorter_side: int, jpeg_quality: int) -> tuple[dict[str, Any], str]:
    """A row's image {"bytes", "path"} as it is in the copy, and the SHA-256 (hex) of what it was. Raises one of
    DECODE_ERRORS."""
    data, path = value["bytes"], value["path"]
    if data is None and path is None:
        raise ValueError("neither bytes nor a path")
    if data is None:
        data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    image = _shrunk(data, shorter_side)
    if image is not None:
        # Chroma at half the resolution, as nearly all photographs have it: a quarter to a third fewer bytes to store
        # and to decode than 4:4:4. An empty comment, or else Pillow would copy the source's.
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=jpeg_quality, subsampling="4:2:0", comment=b"")
        data = encoded.getvalue()
    # the name alone, also of a file in an archive: zip://class/a.jpg::/home/...
    return {"bytes": data, "path": path and os.path.basename(path.split("::")[0])}, digest


def _shrunk(data: bytes, shorter_side: int) -> Image.Image | None:
    """The image upright in RGB, its shorter side `shorter_side` pixels; None where it has no more than that.

    Bicubic: Lanczos takes a third longer and rings more around edges. A JPEG that is at least four times too large is
    decoded at a half, a quarter or an eighth, and is still at least twice too large for the resize, which itself starts
    by averaging whole pixels down to three times the size. On photographs both together are a quarter of a grey level
    off the plain resize, in the mean; the JPEG that is then written is two or three off.
    """
    with Image.open(io.BytesIO(data)) as image:
        short = min(image.size)
        if image.format in JPEGS and short >= 4 * shorter_side:
            width, height = _size(image.size, shorter_side)
            image.draft(None, (2 * width, 2 * height))
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
            return ImageOps.exif_transpose(small)
    image = open_image({"bytes": data, "path": None})  # also one that stays as it is: it must decode
    if short <= shorter_side:
        return None
    return image.resize(_size(image.size, shorter_side), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """(width, height) after the resize, rounded down as the evaluation's resize does: that one then changes nothing."""
    short, long = sorted(size)
    sides = (shorter_side, int(shorter_side * long / short))
    return sides if size[0] <= size[1] else sides[::-1]


def finish_shard(shard: Shard, rows: TableRows, work: Work, count: Callable[[int], Any]) -> str:
    """Writes a shard unless an earlier start did, and returns the SHA-256 (hex) of the file.

    Args:
        count: told the number of rows done since the last call.
    """
    if read_footer(shard) is None:
        _write(shard, rows, work, count)
    else:
        count(len(shard))
    with open(shard.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(shard: Shard, rows: TableRows, work: Work, count: Callable[[int], Any]) -> None:
    label_type = work.sets[shard.split].features["label"]
    several = isinstance(label_type, datasets.List)
    schema = datasets.Features({"image": datasets.Image(), "label": label_type, **SOURCE_COLUMNS}).arrow_schema
    # images are compressed already, and no two are the same
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["label"], "write_page_index": True}
    order, numbers, digests = copy_order(shard.split, len(rows)), work.numbers[shard.split], work.digests
    bad = []
    with whole_file(shard.path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for start in range(shard.start, shard.stop, ROWS_PER_GROUP):
            index = order[start : min(start + ROWS_PER_GROUP, shard.stop)]
            kept = []
            for row, value, label in zip(index.tolist(), *rows.read(index)):
                number = int(numbers[row])
                try:
                    image, digest = _copied(value, work.shorter_side, work.jpeg_quality)
                    if shard.split in digests:
                        digest = digests[shard.split][row].tobytes().hex()
                    value_of = np.flatnonzero(label).tolist() if several else int(label)
                    kept.append({"image": image, "label": value_of, SOURCE_ROW: number, SOURCE_SHA256: digest})
                except DECODE_ERRORS as error:
                    bad.append(_bad_row(shard.split, number, value["path"], error, work.on_bad_image))
                count(1)
            if kept:
                writer.write_table(pa.Table.from_pylist(kept, schema=schema))
        writer.add_key_value_metadata({BAD_ROWS: json.dumps(bad)})


def _bad_row(split: str, row: int, path: str | None, error: Exception, on_bad_image: str) -> dict[str, Any]:
    """The record of a row that is left out. Raises UserError where none may be."""
    # without the file's folder and without an address in memory: the copy holds nothing of this machine
    text = re.sub(r" <[^>]* at 0x\w+>", "", getattr(error, "strerror", None) or str(error))
    reason = f"{type(error).__name__}: {' '.join(text.split())}"
    if on_bad_image == "raise":
        raise UserError(
            f"{split} split, row {row}{f', file {path}' if path else ''}: the image cannot be copied: {reason}; "
            "repair it, or leave such rows out with --on_bad_image skip"
        )
    return {"split": split, "row": row, "file": path and os.path.basename(path), "reason": reason}


def read_footer(shard: Shard) -> dict[str, Any] | None:
    """Rows, bytes and bad rows of a shard; None where it is missing or is not the whole of its rows."""
    try:
        footer = pq.read_metadata(shard.path)
        bad = json.loads(footer.metadata[BAD_ROWS.encode()])
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError):
        return None
    if footer.num_rows + len(bad) != len(shard):
        return None
    return {"rows": footer.num_rows, "bytes": shard.path.stat().st_size, "bad": bad}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is complete and on the disk, and is removed when it does not get there."""
    # A name that no pattern for data files matches. What a kill leaves under it, the next start overwrites.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
