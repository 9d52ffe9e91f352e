"""Sets larger than the disk: parquet shards, local or on the Hub, read in pieces as they are needed.

Job: the rows of a split by index, where only the row groups at hand are held; what the shards of a set are.
Must not know: pixels, which sample comes where, models, training.
"""

import collections
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vit_hf.data.rows.interface import LazyRows
from vit_hf.data.rows.labels import flat, is_allowed, is_list
from vit_hf.data.rows.retries import patiently
from vit_hf.errors import UserError

READERS = 8  # row groups that a process reads at once: over a network most of the time is waiting


class ParquetRows(LazyRows):
    """The rows of a split that is stored as parquet shards.

    Args:
        files: paths or URLs of the shards (local, hf://, ...), in order.
        image_column, label_column: their columns.
        class_names: names of the labels 0..K-1.
        multi_label: the label column holds lists of them.

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
        multi_label: bool = False,
    ):
        super().__init__(0, class_names, multi_label)
        self.files, self.columns, self.held_rows = files, [image_column, label_column], 0
        with ThreadPoolExecutor(16) as pool:  # a footer is a small read over a long way
            self.footers = list(pool.map(self._footer, files))  # a shard that is opened again needs no other
        sizes = [
            [footer.row_group(number).num_rows for number in range(footer.num_row_groups)] for footer in self.footers
        ]
        self.group_file = np.repeat(np.arange(len(files)), [len(groups) for groups in sizes])
        self.group_number = np.concatenate([np.arange(len(groups)) for groups in sizes]).astype(np.int64)
        self.group_start = np.cumsum([0, *(rows for groups in sizes for rows in groups)])
        self.num_source_rows = int(self.group_start[-1])
        self._groups: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self.source_rows = np.arange(self.num_source_rows)
        self.first = self.group_start  # the index of the first row kept of each row group

    def keep(self, rows: np.ndarray) -> None:
        super().keep(rows)
        self.first = np.searchsorted(self.source_rows, self.group_start)
        self._groups.clear()

    def groups(self) -> np.ndarray:
        """The first index of each row group of which a row is kept, and the number of rows: ascending int64 (R + 1,)."""
        return np.unique(self.first)

    def labels_of(self, groups: np.ndarray) -> list[np.ndarray]:
        """The labels in the source's row groups of these numbers, those that are missing left out; nothing else is read."""
        with ThreadPoolExecutor(16) as pool:
            tables = list(pool.map(lambda group: self._read_group(int(group), self.columns[1:]), groups))
        columns = [flat(table.column(0)) if self.multi_label else table.column(0) for table in tables]
        return [column.drop_null().to_numpy() for column in columns]

    def read(self, index: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The images {"bytes", "path"} and labels int64 (B,) or bool (B, K) at `index`.

        Raises:
            UserError: a shard cannot be read, or a label is missing or out of range; file and row are named.
        """
        groups = np.searchsorted(self.first, index, side="right") - 1
        images: list[Any] = [None] * len(index)
        several, number = self.multi_label, len(self.class_names)
        labels = np.zeros((len(index), number), dtype=bool) if several else np.empty(len(index), dtype=np.int64)
        for group, table in self._tables(np.unique(groups).tolist()).items():
            places = np.flatnonzero(groups == group)
            inside = index[places] - self.first[group]
            image_column, label_column = table.columns
            for place, row in zip(places.tolist(), inside.tolist()):
                value, label = image_column[row].as_py(), label_column[row].as_py()
                if not (is_allowed(label, number) if several else label is not None and 0 <= label < number):
                    row = self.source_rows[index[place]] - self.group_start[group]
                    raise UserError(
                        f"{self.files[self.group_file[group]]}, row {row} of row group {self.group_number[group]}: label "
                        f"{'missing' if label is None else label}, allowed are {'lists of ' if several else ''}0.."
                        f"{number - 1}{', each once' if several else ''}"
                    )
                images[place] = value if isinstance(value, dict) else {"bytes": value, "path": None}
                labels[(place, label) if several else place] = True if several else label
        return images, self.numbered(labels)

    def _tables(self, groups: list[int]) -> dict[int, pa.Table]:
        """The rows that are kept of each row group; those that are not at hand are read side by side."""
        missing = [group for group in groups if group not in self._groups]
        with ThreadPoolExecutor(READERS) as pool:  # starts no thread where nothing is missing
            self._groups.update(zip(missing, pool.map(self._kept, missing)))
        tables = {group: self._groups[group] for group in groups}
        for group in groups:
            self._groups.move_to_end(group)
        held = sum(len(table) for table in self._groups.values())
        while held > self.held_rows and len(self._groups) > 1:
            held -= len(self._groups.popitem(last=False)[1])
        return tables

    def _kept(self, group: int) -> pa.Table:
        table = self._read_group(group, self.columns)
        start, stop = self.group_start[group : group + 2]
        if len(table) > (kept := self.first[group + 1] - self.first[group]):
            chosen = np.zeros(stop - start, dtype=bool)
            chosen[self.source_rows[self.first[group] :][:kept] - start] = True
            table = table.filter(chosen)
        return table.combine_chunks()

    def _read_group(self, group: int, columns: list[str]) -> pa.Table:
        """All rows of a row group. The file is closed again: an open one would keep what was read last."""
        number = int(self.group_file[group])

        def read() -> pa.Table:
            with open_shard(self.files[number]) as file:
                parquet = pq.ParquetFile(file, metadata=self.footers[number], pre_buffer=True)
                return parquet.read_row_group(int(self.group_number[group]), columns=columns).select(columns)

        return patiently(read, self.files[number], self.retried)

    def _footer(self, name: str) -> pq.FileMetaData:
        def read() -> pq.FileMetaData:
            with open_shard(name) as file:
                return pq.read_metadata(file)

        footer = patiently(read, name, self.retried)
        missing = set(self.columns) - set(footer.schema.to_arrow_schema().names)
        if missing:
            raise UserError(f"{name}: has no column {', '.join(sorted(missing))}")
        return footer

    def source_state(self) -> list[str]:
        """The shards' names with size and date or tag of each; a name on the Hub holds the commit."""

        def state(name: str) -> str:
            filesystem, path = fsspec.core.url_to_fs(name)
            info = patiently(lambda: filesystem.info(path), name, self.retried)
            tags = ("size", "mtime", "ETag", "etag", "LastModified", "last_modified")
            return " ".join([name, *(str(info[tag]) for tag in tags if tag in info), *self.columns])

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(state, self.files))

    def __getstate__(self) -> dict[str, Any]:
        """What was read stays with the process that read it."""
        return {**self.__dict__, "_groups": collections.OrderedDict()}


def open_shard(name: str) -> Any:
    """A local path or a URL as a file that can be read in pieces, of which nothing is read but what is asked for."""
    filesystem, path = fsspec.core.url_to_fs(name)
    return filesystem.open(path, "rb", cache_type="none")


def light_columns(files: list[str], columns: list[str]) -> pa.Table:
    """Some columns of all rows of the shards. Those that lie side by side are one small read a row group: what is
    between them, the images, is not read."""

    def read(name: str) -> pa.Table:
        with open_shard(name) as file:
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
    if is_list(kind):  # of labels; vectors of floats may be long
        return pa.types.is_integer(kind.value_type)
    return pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
