"""What a model answers to each image of a split, and the file that keeps it: predictions.parquet.

Knows arrays and the file alone: no model, no images.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_hf.errors import UserError

FILE = "predictions.parquet"


@dataclass(frozen=True)
class Predictions:
    """Rows in the order of the dataset, each sample once, the same on all processes.

    Args:
        index: int64 (N,), the place among the images that were asked for; without a draw the row of the split.
        labels: int64 (N,), the model's number of the class; or, of several classes, bool (N, K).
        top5: int64 (N, min(5, K)), classes of the model, best first.
        probabilities: float32 (N, min(5, K)), of those classes.
        loss: float32 (N,), nats.
        brier: float32 (N,), the sum over the classes of (probability - label)^2.
        scores: float32 (N, K), the probability of each class, where labels are (N, K); else None.
        class_names: of the model's K classes; empty where they have none.
        source: which images they are of, as one text that another set or another draw does not have; "" where it is not
            known.
    """

    index: np.ndarray
    labels: np.ndarray
    top5: np.ndarray
    probabilities: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    scores: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def correct(self) -> np.ndarray:
        """bool (N,): the best class is the label, or among the labels."""
        return self.hits(1)

    def hits(self, k: int) -> np.ndarray:
        """bool (N,): a label is among the k best classes, k at most 5."""
        best = self.top5[:, :k]
        if self.labels.ndim == 2:
            return np.take_along_axis(self.labels, best, axis=1).any(axis=1)
        return (best == self.labels[:, None]).any(axis=1)

    def name(self, number: int) -> str:
        """A class as people call it."""
        return self.class_names[number] if number < len(self.class_names) else str(number)


def write_predictions(path: Path, predictions: Predictions, source_rows: np.ndarray | None = None) -> None:
    """Writes a whole file or none: columns index, row (where `source_rows` are given), label (a number, or a list of numbers), top5_label and
    top5_probability (lists, best first), loss, brier, and scores where there are any; class names and source are in the
    schema's metadata.

    Args:
        source_rows: int64 (M,), for each index the row of the split that the image is taken from.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = predictions.labels
    columns = {
        "index": pa.array(predictions.index, pa.int64()),
        **({} if source_rows is None else {"row": pa.array(source_rows[predictions.index], pa.int64())}),
        "label": _sets(labels) if labels.ndim == 2 else pa.array(labels, pa.int64()),
        "top5_label": _lists(predictions.top5.astype(np.int64)),
        "top5_probability": _lists(predictions.probabilities.astype(np.float32)),
        "loss": pa.array(predictions.loss, pa.float32()),
        "brier": pa.array(predictions.brier, pa.float32()),
    }
    if predictions.scores is not None:
        columns["scores"] = _lists(predictions.scores.astype(np.float32))
    about = {"class_names": json.dumps(predictions.class_names), "source": predictions.source}
    if labels.ndim == 2:
        about["num_classes"] = str(labels.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table(columns).replace_schema_metadata(about), temporary)
    os.replace(temporary, path)


def read_predictions(path: Path) -> Predictions:
    """Reads what `write_predictions` wrote.

    Raises:
        UserError: the file is not one of these.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}: no such file; `vit-hf evaluate --save_predictions` writes one")
    try:
        table = pq.read_table(path).combine_chunks()
        if holes := [name for name in table.column_names if table[name].null_count]:
            raise ValueError(f"empty cells in {', '.join(holes)}")
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        wide = {name: _rows(table[name]) for name in ("top5_label", "top5_probability")}
        found = Predictions(
            index=table["index"].to_numpy().astype(np.int64),
            labels=_labels(table["label"], int(about.get("num_classes", 0))),
            top5=wide["top5_label"].astype(np.int64),
            probabilities=wide["top5_probability"].astype(np.float32),
            loss=table["loss"].to_numpy().astype(np.float32),
            brier=table["brier"].to_numpy().astype(np.float32),
            scores=_rows(table["scores"]).astype(np.float32) if "scores" in table.column_names else None,
            class_names=tuple(json.loads(about["class_names"])),
            source=about.get("source", ""),
        )
        _check_classes(found)
        return found
    except (KeyError, ValueError, IndexError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} holds no predictions ({' '.join(str(error).split())[:200]}); `vit-hf evaluate --save_predictions` "
            "writes them"
        ) from None


def _check_classes(predictions: Predictions) -> None:
    """Raises ValueError where a number is no class."""
    numbers, count = [predictions.top5], len(predictions.class_names)
    if predictions.labels.ndim == 1:
        numbers.append(predictions.labels)
    low, high = min(column.min() for column in numbers), max(column.max() for column in numbers)
    if low < 0 or (count and high >= count):
        raise ValueError(f"class {low if low < 0 else high} where {count} are named")


def _lists(values: np.ndarray):
    """(N, M) as a column of lists."""
    import pyarrow as pa

    rows, columns = values.shape
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * columns, values.ravel())


def _rows(column) -> np.ndarray:
    """A column of lists of one length as (N, M)."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


def _sets(labels: np.ndarray):
    """bool (N, K) as a column of lists of the numbers that are set."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(labels.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, np.nonzero(labels)[1].astype(np.int64))


def _labels(column, num_classes: int) -> np.ndarray:
    """int64 (N,), or bool (N, K) of a column of lists."""
    if num_classes == 0:
        return column.to_numpy().astype(np.int64)
    labels, lists = np.zeros((len(column), num_classes), dtype=bool), column.combine_chunks()
    rows = np.repeat(np.arange(len(column)), lists.value_lengths().to_numpy())
    labels[rows, lists.flatten().to_numpy()] = True
    return labels
