"""What identifies the images of a split: their digests, and their numbers in the set that they come from.

A copy by `vit-hf data prepare` carries both beside its images, which are encoded anew. So a subset of the copy holds
the images that the same flags keep of the original. Must not know: rules, pixels, where a set comes from.
"""

import dataclasses
import hashlib

import datasets
import numpy as np
import pyarrow as pa

from vit_hf.data.cache_folder import DIGESTS, cache_folder
from vit_hf.data.rows.retries import patiently
from vit_hf.data.rows.table import file_bytes, source_state
from vit_hf.errors import UserError

DIGEST_BYTES = 32  # sha256
SOURCE_ROW, SOURCE_SHA256 = "source_row", "source_sha256"
SOURCE_COLUMNS = {SOURCE_ROW: datasets.Value("int64"), SOURCE_SHA256: datasets.Value("string")}


def carries_origin(features: datasets.Features) -> bool:
    """Whether a set is a copy that says where its rows come from."""
    return all(features.get(name) == kind for name, kind in SOURCE_COLUMNS.items())


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where rows of a split come from.

    Args:
        rows: int64 (n,), their places in the split as it was loaded.
        columns: of a copy, SOURCE_COLUMNS of all rows of the split as it was loaded.
        images: all of them, one column `image` of type Image(decode=False); may be None where `columns` are there.
        cache_dir: as for `image_digests`.
    """

    rows: np.ndarray
    columns: pa.Table | None = None
    images: datasets.Dataset | None = None
    cache_dir: str | None = None

    def at(self, rows: np.ndarray) -> "Origin":
        """The origin of some of these rows, int (m,)."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def numbers(self) -> np.ndarray:
        """Their numbers in the split of the set that they come from, int64 (n,)."""
        return self.rows if self.columns is None else self._values(SOURCE_ROW).to_numpy().astype(np.int64)

    def known_digests(self) -> np.ndarray | None:
        """The sha256 of each encoded image there, uint8 (n, 32); None where it can only be had from the image."""
        if self.columns is None:
            return None
        try:
            content = bytes.fromhex("".join(self._values(SOURCE_SHA256).to_pylist()))
            return np.frombuffer(content, dtype=np.uint8).reshape(len(self.rows), DIGEST_BYTES)
        except ValueError:
            raise UserError(
                f"the column {SOURCE_SHA256} holds something else than 64 hexadecimal digits: make the copy anew with "
                "`vit-hf data prepare`"
            ) from None

    def digests(self) -> np.ndarray:
        """As `known_digests`; where they are not known, every image is read."""
        known = self.known_digests()
        return image_digests(self.images, self.rows, self.cache_dir) if known is None else known

    def _values(self, name: str) -> pa.ChunkedArray:
        values = self.columns[name].take(pa.array(self.rows))
        if values.null_count:
            raise UserError(
                f"the column {name} has rows without a value: make the copy anew with `vit-hf data prepare`"
            )
        return values


def image_digests(dataset: datasets.Dataset, rows: np.ndarray, cache_dir: str | None = None) -> np.ndarray:
    """Return the sha256 of each row's encoded image bytes, uint8 (M, 32), in the order of `rows`.

    A row that holds only a path is represented by the bytes of that file, not by its name, so that a set gives the
    same digests wherever its folder lies and whether or not it was packed into parquet. Every byte is read once, in
    small batches; the digests (32 bytes a row) are then kept in the datasets cache, keyed by the source's identity.

    Args:
        dataset: has a column `image` of type Image(decode=False).
        rows: int (M,).
        cache_dir: folder of the cache; None is the usual Hugging Face datasets cache.

    Raises:
        UserError: an image has neither bytes nor a readable file.
    """
    images = dataset.select_columns(["image"])
    if len(rows) != len(images):
        images = images.select(rows)
    key = hashlib.sha256("\n".join(source_state(images)).encode()).hexdigest()[:32]
    folder = cache_folder(cache_dir, DIGESTS)
    folder.mkdir(parents=True, exist_ok=True)
    digests = images.with_format("arrow").map(
        _digest_batch,
        batched=True,
        batch_size=64,
        remove_columns=["image"],
        features=datasets.Features({"digest": datasets.Value("binary")}),
        cache_file_name=str(folder / f"{key}.arrow"),
        load_from_cache_file=True,
        desc="Hashing images for the subset",
    )
    content = b"".join(digests.with_format("arrow")[:]["digest"].to_pylist())
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _digest_batch(table) -> dict:
    digests = []
    for image in table["image"].to_pylist():
        content = (image or {}).get("bytes")
        if content is None:
            path = (image or {}).get("path") or ""
            try:
                content = patiently(lambda path=path: file_bytes(path), path, [])
            except UserError as error:
                raise UserError(
                    f"the subset filter needs every image file: {error}; restore the file, or load the set again with "
                    "--dataset_name"
                ) from None
        digests.append(hashlib.sha256(content).digest())
    return {"digest": digests}
