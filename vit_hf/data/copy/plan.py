"""What a copy is: its shards and settings, as prepare.json records them, and whether a folder holds the same one."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import PIL

import vit_hf
from vit_hf.data.rows.labels import LabelLists
from vit_hf.data.rows.table import TableRows
from vit_hf.data.sets.origin import Origin
from vit_hf.errors import UserError

if TYPE_CHECKING:
    from vit_hf.data.sets.names import ImageSplits


ROW_ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the copy: the places start..stop-1 of a split in the copy's order."""

    split: str
    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Work:
    """What every shard is made with."""

    sets: dict[str, datasets.Dataset]  # by the split's name in the copy
    numbers: dict[str, np.ndarray]  # of their rows in the source, int64 (n,)
    digests: dict[str, np.ndarray]  # of the source's images, uint8 (n, 32), where the source is a copy itself
    class_names: list[str]
    shorter_side: int
    jpeg_quality: int
    on_bad_image: str


def copy_order(split: str, num_rows: int) -> np.ndarray:
    """The rows of a split in the order in which a copy holds them, int64 (n,). Training rows are mixed, since a stream
    mixes no more than its buffer, and many sets come sorted by class; the others stay as they are."""
    if split != "train":
        return np.arange(num_rows)
    # RandomState's stream is frozen by numpy, so the order is the same under every numpy version.
    return np.random.RandomState(ROW_ORDER_SEED).permutation(num_rows)


def named_splits(
    splits: "ImageSplits",
) -> tuple[dict[str, datasets.Dataset], dict[str, Origin], dict[str, str]]:
    """The splits, where their rows come from, and what the source calls them, by their names in the copy: names that
    are found without a flag."""
    evaluation = "validation" if splits.eval_split in ("validation", "val", "valid", "dev") else "test"
    sets = {"train": splits.train, evaluation: splits.eval}
    sets = {name: rows for name, rows in sets.items() if rows is not None}
    origins = {"train": splits.train_origin, evaluation: splits.eval_origin}
    origins = {name: origins[name] or Origin(np.arange(len(rows))) for name, rows in sets.items()}
    return sets, origins, {"train": splits.train_split, evaluation: splits.eval_split}


def describe_content(work: Work, names: dict[str, str], source: dict[str, Any], rows_per_shard: int) -> dict[str, Any]:
    """What decides the bytes of the copy, for prepare.json, in plain values."""
    from vit_hf.data.sets.names import NAMED_SETS

    name = source["dataset_name"]
    if name not in NAMED_SETS and os.path.isdir(os.path.expanduser(name)):
        # "./" as on the command line: a folder, not a set of that name; where it lies is this machine's own business
        source = {**source, "dataset_name": f"./{os.path.basename(os.path.abspath(os.path.expanduser(name)))}"}
    labels = {split: TableRows(dataset).labels for split, dataset in work.sets.items()}
    content = {
        "source": source,
        "shorter_side": work.shorter_side,
        "jpeg_quality": work.jpeg_quality,
        "rows_per_shard": rows_per_shard,
        "row_order_seed": ROW_ORDER_SEED,
        "splits": {
            split: {
                "source": names[split],
                "rows": len(values),
                "labels_sha256": hashlib.sha256(
                    values.digest_bytes() if isinstance(values, LabelLists) else values.astype("<i8").tobytes()
                ).hexdigest(),
            }
            for split, values in labels.items()
        },
        "classes": {
            "number": len(work.class_names),
            "sha256": hashlib.sha256("\n".join(work.class_names).encode()).hexdigest(),
        },
        "versions": {"vit_hf": vit_hf.__version__, "pillow": PIL.__version__},
    }
    return json.loads(json.dumps(content))  # as it will be read back


def recorded_content(output_dir: Path) -> dict[str, Any] | None:
    """What the folder's prepare.json says; None where there is nothing yet.

    Raises:
        UserError: the folder holds something else.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; name a folder")
    try:
        return json.loads((output_dir / "prepare.json").read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        raise UserError(f"--output_dir {output_dir}: its prepare.json cannot be read; choose another folder") from None
    ours = ("data", ".prepare.json.tmp")  # a kill may have come before prepare.json was whole
    others = sorted(path.name for path in output_dir.iterdir() if path.name not in ours) if output_dir.exists() else []
    data = output_dir / "data"
    if others or (data.exists() and (not data.is_dir() or any(data.iterdir()))):
        raise UserError(
            f"--output_dir {output_dir}: holds {(others or ['data'])[0]} and no prepare.json, so it is no copy that "
            "could be gone on with; choose a new or an empty folder"
        )
    return None


def check_same(output_dir: Path, recorded: dict[str, Any], content: dict[str, Any], finished: bool) -> None:
    """Raises UserError where the folder's copy is another one. Other versions of the programs write other bytes, so
    they may not go on with a copy; a finished one is not touched, not even one whose rows are not mixed."""
    then, now = _flat(recorded), _flat(content)
    different = [
        f"{name} {_short(then.get(name))} then, {_short(now.get(name))} now"
        for name in dict.fromkeys([*now, *then])
        if then.get(name) != now.get(name) and not (finished and name.startswith(("versions.", "row_order_seed")))
    ]
    if different:
        raise UserError(
            f"--output_dir {output_dir}: holds another copy ({'; '.join(different[:5])}); choose another folder, or "
            "give the same flags to go on"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; parts that are None or empty are left out."""
    if isinstance(value, dict):
        return {key: item for part in value for key, item in _flat(value[part], f"{name}.{part}".strip(".")).items()}
    return {name: value} if value not in (None, []) else {}


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def plan_shards(folder: Path, sets: dict[str, datasets.Dataset], rows_per_shard: int) -> list[Shard]:
    shards = []
    for split, dataset in sets.items():
        starts = range(0, len(dataset), rows_per_shard)
        for number, start in enumerate(starts):
            path = folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
            shards.append(Shard(split, path, start, min(start + rows_per_shard, len(dataset))))
    return shards
