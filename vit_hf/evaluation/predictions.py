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
FORMAT = 1  # of the file; a later one may have more columns


@dataclass(frozen=True)
class Predictions:
    """Rows in the order of the dataset, each sample once, the same on all processes.

    Args:
        index: int64 (N,), the row of the split.
        labels: int64 (N,), the model's number of the class; or, of several classes, bool (N, K).
        top5: int64 (N, min(5, K)), classes of the model, best first.
        probabilities: float32 (N, min(5, K)), of those classes.
        loss: float32 (N,), nats.
        brier: float32 (N,), the sum over the classes of (probability - label)^2.
        scores: float32 (N, K), the probability of each class, where labels are (N, K); else None.
        class_names: of the model's K classes; empty where they have none.
    """

    index: np.ndarray
    labels: np.ndarray
    top5: np.ndarray
    probabilities: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    scores: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

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


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Writes a whole file or none: columns index, label (a number, or a list of numbers), top5_label and
    top5_probability (lists, best first), loss, brier, and scores where there are any; the class names are in the
    schema's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = predictions.labels
    label = [np.flatnonzero(row) for row in labels] if labels.ndim == 2 else labels
    columns = {
        "index": pa.array(predictions.index, pa.int64()),
        "label": pa.array(label, pa.list_(pa.int64()) if labels.ndim == 2 else pa.int64()),
        "top5_label": pa.array(list(predictions.top5), pa.list_(pa.int64())),
        "top5_probability": pa.array(list(predictions.probabilities), pa.list_(pa.float32())),
        "loss": pa.array(predictions.loss, pa.float32()),
        "brier": pa.array(predictions.brier, pa.float32()),
    }
    if predictions.scores is not None:
        columns["scores"] = pa.array(list(predictions.scores), pa.list_(pa.float32()))
    about = {"format": str(FORMAT), "class_names": json.dumps(predictions.class_names)}
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

    try:
        table = pq.read_table(path)
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        wide = [name for name in ("top5_label", "top5_probability", "scores") if name in table.column_names]
        columns = {
            name: np.array(table[name].to_pylist()) if name in wide else table[name].to_numpy()
            for name in table.column_names
            if name != "label"
        }
        labels = _labels(table["label"], int(about.get("num_classes", 0)))
        return Predictions(
            index=columns["index"].astype(np.int64),
            labels=labels,
            top5=columns["top5_label"].astype(np.int64),
            probabilities=columns["top5_probability"].astype(np.float32),
            loss=columns["loss"].astype(np.float32),
            brier=columns["brier"].astype(np.float32),
            scores=columns["scores"].astype(np.float32) if "scores" in columns else None,
            class_names=tuple(json.loads(about["class_names"])),
        )
    except (KeyError, ValueError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} holds no predictions ({' '.join(str(error).split())[:200]}); `vit-hf evaluate --save_predictions` "
            "writes them"
        ) from None


def _labels(column, num_classes: int) -> np.ndarray:
    """int64 (N,), or bool (N, K) of a column of lists."""
    if num_classes == 0:
        return column.to_numpy().astype(np.int64)
    labels = np.zeros((len(column), num_classes), dtype=bool)
    for row, chosen in enumerate(column.to_pylist()):
        labels[row, chosen] = True
    return labels
