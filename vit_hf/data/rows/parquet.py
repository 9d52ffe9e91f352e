"""Sets larger than the disk: parquet shards, local or on the Hub, read in pieces as they are needed.

Job: the rows of a split by index, where only the row groups at hand are held; what the shards of a set are.
Must not know: pixels, which sample comes where, models, training.
"""

import collections
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vit_hf.data.rows.interface import LazyRows
from vit_hf.data.rows.retries import patiently
from vit_hf.errors import UserError

_OPEN_FILES = 8


class ParquetRows(LazyRows):
    """The rows of a split that is stored as parquet shards.

    Args:
        files: paths or URLs of the shards (local, hf://, ...), in order.
        image_column, label_column: their columns.
        class_names: names of the labels 0..K-1.

    `held_rows` says how many rows are kept in memory: those of the row groups read last, at least one group.

    Raises:
        UserError: a shard cannot be read, or has no such columns.
    """

    def __init__(
        self,
        files: list[str],
        image_column: str,
        label_column: str,
        class_names: list[str],
    ):
        super().__init__(0, class_names)
        self.files, self.columns, self.held_rows = files, [image_column, label_column], 0
        with ThreadPoolExecutor(16) as pool:  # a footer is a small read over a long way
            footers = list(pool.map(self._footer, files))
        sizes = [[footer.row_group(number).num_rows for number in range(footer.num_row_groups)] for footer in footers]
        self.group_file = np.repeat(np.arange(len(files)), [len(groups) for groups in sizes])
        self.group_number = np.concatenate([np.arange(len(groups)) for groups in sizes]).astype(np.int64)
        self.group_start = np.cumsum([0, *(rows for groups in sizes for rows in groups)])
        self.source_rows = np.arange(self.group_start[-1])
        self._groups: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._open: collections.OrderedDict[int, pq.ParquetFile] = collections.OrderedDict()

    def hold(self, buffer_size: int, num_workers: int) -> None:
        """Keeps so many rows in each worker that a row group is rarely read twice: its share of the shuffle buffer, half
        as many for those drawn late, and the groups at either end."""
        largest = int(np.diff(self.group_start).max(initial=0))
        self.held_rows = math.ceil(1.5 * buffer_size / max(1, num_workers)) + 2 * largest

    def shards(self) -> list[np.ndarray]:
        """The indices that lie in each shard, int64 each; shards of which no row is kept are left out."""
        group = np.searchsorted(self.group_start, self.source_rows, side="right") - 1
        cuts = np.flatnonzero(np.diff(self.group_file[group])) + 1
        return np.split(np.arange(len(self)), cuts)

    def read(self, index: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The images {"bytes", "path"} and labels int64 (B,) at `index`.

        Raises:
            UserError: a shard cannot be read, or a label is missing or out of range; file and row are named.
        """
        rows = self.source_rows[index]
        groups = np.searchsorted(self.group_start, rows, side="right") - 1
        images: list[Any] = [None] * len(rows)
        labels = np.empty(len(rows), dtype=np.int64)
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            inside = rows[places] - self.group_start[group]
            image_column, label_column = self._group(int(group)).columns
            for place, row in zip(places.tolist(), inside.tolist()):
                value, label = image_column[row].as_py(), label_column[row].as_py()
                if label is None or not 0 <= label < len(self.class_names):
                    raise UserError(
                        f"{self.files[self.group_file[group]]}, row {row} of row group {self.group_number[group]}: label "
                        f"{'missing' if label is None else label}, allowed are 0..{len(self.class_names) - 1}"
                    )
                images[place] = value if isinstance(value, dict) else {"bytes": value, "path": None}
                labels[place] = label
        return images, self.number_of[labels]

    def _group(self, group: int) -> pa.Table:
        if group not in self._groups:
            table = patiently(lambda: self._read_group(group), self.files[self.group_file[group]], self.retried)
            self._groups[group] = table
            held = sum(len(table) for table in self._groups.values())
            while held > max(self.held_rows, len(table)) and len(self._groups) > 1:
                held -= len(self._groups.popitem(last=False)[1])
        self._groups.move_to_end(group)
        return self._groups[group]

    def _read_group(self, group: int) -> pa.Table:
        number = int(self.group_file[group])
        try:
            if number not in self._open:
                self._open[number] = pq.ParquetFile(open_shard(self.files[number]), pre_buffer=True)
                while len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close(force=True)
            self._open.move_to_end(number)
            table = self._open[number].read_row_group(int(self.group_number[group]), columns=self.columns)
            return table.select(self.columns).combine_chunks()
        except Exception:
            self._open.pop(number, None)  # the next try opens it anew
            raise

    def _footer(self, name: str) -> pq.FileMetaData:
        def read() -> pq.FileMetaData:
            with open_shard(name) as file:
                return pq.read_metadata(file)

        footer = patiently(read, name, self.retried)
        missing = set(self.columns) - set(footer.schema.to_arrow_schema().names)
        if missing:
            raise UserError(f"{name}: has no column {', '.join(sorted(missing))}")
        return footer

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with the process that opened them."""
        return {**self.__dict__, "_open": collections.OrderedDict(), "_groups": collections.OrderedDict()}


def open_shard(name: str, **options: Any) -> Any:
    """A local path or a URL as a file that can be read in pieces."""
    filesystem, path = fsspec.core.url_to_fs(name)
    return filesystem.open(path, "rb", **options)


def light_columns(files: list[str], columns: list[str]) -> pa.Table:
    """Some columns of all rows of the shards. Those that lie side by side are one small read a row group: what is
    between them, the images, is not read."""

    def read(name: str) -> pa.Table:
        with open_shard(name, cache_type="none") as file:  # clients of networks would read megabytes ahead
            return pq.ParquetFile(file, pre_buffer=True).read(columns=columns).select(columns)

    with ThreadPoolExecutor(16) as pool:
        return pa.concat_tables(pool.map(lambda name: patiently(lambda: read(name), name, []), files))


def parquet_splits(name: str, builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """Split name -> its shards.

    Raises:
        UserError: a set that is not stored as parquet.
    """
    if builder.name != "parquet":
        raise UserError(
            f"--streaming: {name} is stored as {builder.name}, allowed is parquet; `vit-hf data prepare` writes it"
        )
    return {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}


def head(files: list[str], features: datasets.Features | None) -> datasets.Dataset:
    """The first rows of a split with empty images: what its columns are, and whether it has labels."""

    def read() -> datasets.Dataset:
        with open_shard(files[0]) as source:
            parquet = pq.ParquetFile(source)
            schema = parquet.schema_arrow
            heavy = [field.name for field in schema if not _is_light(field.type)]
            light = [field.name for field in schema if _is_light(field.type)]
            table = parquet.read_row_group(0, columns=light) if parquet.num_row_groups else schema.empty_table()
            columns = {
                field.name: pa.nulls(len(table), field.type) if field.name in heavy else table[field.name]
                for field in schema
            }
            whole = pa.table(columns, schema=schema)
            kinds = features or datasets.Features.from_arrow_schema(schema)
            return datasets.Dataset(
                datasets.table.table_cast(whole, kinds.arrow_schema), info=datasets.DatasetInfo(features=kinds)
            )

    return patiently(read, files[0], [])


def _is_light(kind: pa.DataType) -> bool:
    return pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
