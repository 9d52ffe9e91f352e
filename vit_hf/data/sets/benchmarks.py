"""The sets on which models of ImageNet are judged beside its own validation split: where they lie, and which of the 1000
classes each of their labels is.

Must not know: models, pixels.

Sources: V2 arXiv 1902.10811, ReaL arXiv 2006.07159, A arXiv 1907.07174, R arXiv 2006.16241, Sketch arXiv 1905.13549.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from vit_hf.data.rows.table import TableRows
from vit_hf.errors import ArgumentError, UserError, nearest

WNIDS = Path(__file__).with_name("imagenet_wnids.txt")
REAL_FILE = "real.json"
REAL_URL = "https://raw.githubusercontent.com/google-research/reassessed-imagenet/master/real.json"
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Benchmark:
    """A set of images of ImageNet's classes.

    Args:
        hub_id, split, image_column_name, label_column_name: where it lies on the Hub; None: found by its type.
        part: a letter of imagenet_wnids.txt: the set has images of these classes alone, and a model chooses among them.
        relabelled: several classes may be right, as real.json says.
    """

    hub_id: str
    split: str
    image_column_name: str | None = None
    label_column_name: str | None = None
    part: str = ""
    relabelled: bool = False


# Copies that `datasets` loads without code of their own. ImageNet-V2's is the one of matched frequency.
BENCHMARKS = {
    "imagenet-v2": Benchmark("clip-benchmark/wds_imagenetv2", "test", label_column_name="cls"),
    "imagenet-real": Benchmark("ILSVRC/imagenet-1k", "validation", "image", "label", relabelled=True),
    "imagenet-a": Benchmark("barkermrl/imagenet-a", "train", "image", "label", part="a"),
    "imagenet-r": Benchmark("axiong/imagenet-r", "test", "image", "wnid", part="r"),
    "imagenet-sketch": Benchmark("clip-benchmark/wds_imagenet_sketch", "test", label_column_name="cls"),
}


@dataclass(frozen=True)
class EvalSet:
    """One set of --eval_datasets.

    Args:
        name: as it was given.
        dataset_name: Hub id, folder or the name of a set.
        benchmark: whose labels it has; None: its own.
        is_copy: another copy of a benchmark than the one on the Hub.
    """

    name: str
    dataset_name: str
    benchmark: Benchmark | None = None
    is_copy: bool = False


def eval_sets(names: tuple[str, ...]) -> list[EvalSet]:
    """The sets that --eval_datasets names: a benchmark, `BENCHMARK=COPY` for another copy of it (a folder or Hub id), or
    what --dataset_name takes.

    Raises:
        ArgumentError: no such benchmark; a set comes twice.
    """
    found = []
    for name in names:
        short, equals, copy = name.partition("=")
        if equals and (short not in BENCHMARKS or not copy):
            raise ArgumentError(f"--eval_datasets {name}: {short!r} is none of {', '.join(BENCHMARKS)}")
        if short in BENCHMARKS:
            benchmark = BENCHMARKS[short]
            found.append(EvalSet(short, copy or benchmark.hub_id, benchmark, bool(copy)))
        elif re.match(r"imagenet[-_ ]?(?!1k$)\w+$", short, re.IGNORECASE) and not Path(short).is_dir():
            raise ArgumentError(f"--eval_datasets {name}: {nearest(short, BENCHMARKS)}")
        else:
            found.append(EvalSet(name, name))
    for number, one in enumerate(found):
        if one.name in [other.name for other in found[:number]]:
            raise ArgumentError(f"--eval_datasets: {one.name} comes twice")
    return found


def imagenet_wnids(part: str = "") -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes in the order of their numbers, which is that of the texts; `part`: a or
    r, those of the 200 classes of ImageNet-A or ImageNet-R.

    Source: the lists of timm (Apache-2.0), imagenet_synsets.txt, imagenet_a_synsets.txt and imagenet_r_synsets.txt.
    """
    lines = [line.split() for line in WNIDS.read_text().splitlines()]
    return [line[0] for line in lines if part in "".join(line[1:])]


def label_map(
    class_names: list[str], model_names: list[str], benchmark: Benchmark
) -> tuple[list[int], np.ndarray | None]:
    """For each class of a benchmark its index in the model, and the indices int64 (M,) among which the model chooses (None:
    all).

    A class is named by its WordNet id; or by its number, in whatever order the names come ("10" lies before "2" in a list
    of folders): of the 1000 classes, or of the benchmark's part of them; or, where there are 1000, as the model names it,
    or in ImageNet's order. A model has the 1000 classes in ImageNet's order, or names its classes by WordNet ids.

    Raises:
        UserError: a model of other classes, or class names that tell nothing.
    """
    wnids = imagenet_wnids()
    if set(model_names) >= set(imagenet_wnids(benchmark.part)):
        place = {wnid: model_names.index(wnid) for wnid in wnids if wnid in model_names}
    elif len(model_names) == NUM_CLASSES:
        place = {wnid: number for number, wnid in enumerate(wnids)}
    else:
        raise UserError(
            f"the model has {len(model_names)} classes ({', '.join(model_names[:3])}, ...): this set is for models of "
            f"ImageNet's {NUM_CLASSES}"
        )
    part = imagenet_wnids(benchmark.part)
    known = _as_wnids(class_names, model_names, part, wnids)
    if known is None:
        raise UserError(
            f"the set names its {len(class_names)} classes {', '.join(class_names[:3])}, ...: allowed are WordNet ids, "
            f"numbers below {len(part)}, or {NUM_CLASSES} names; another column: --eval_datasets NAME=COPY"
        )
    among = np.array(sorted(place[wnid] for wnid in part)) if benchmark.part else None
    return [place[wnid] for wnid in known], among


def _as_wnids(class_names: list[str], model_names: list[str], part: list[str], wnids: list[str]) -> list[str] | None:
    """The WordNet id of each class, or None where nothing tells."""
    if set(class_names) <= set(wnids):
        return class_names if set(class_names) <= set(part) else None
    if all(name.isdecimal() for name in class_names):
        numbers = [int(name) for name in class_names]
        return [part[number] for number in numbers] if max(numbers) < len(part) else None
    if len(class_names) != NUM_CLASSES or len(part) != NUM_CLASSES:
        return None
    if set(class_names) == set(model_names) and len(set(model_names)) == NUM_CLASSES:
        return [wnids[model_names.index(name)] for name in class_names]
    return wnids


def reassessed_labels() -> list[list[int]]:
    """ReaL's labels of the 50,000 validation images, in the order of their file names: numbers of classes, any of which is
    right; an image may have none. From real.json in the working directory, else from the copy that timm carries.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = Path(REAL_FILE)
    if not path.is_file():
        timm = importlib.util.find_spec("timm")  # found, not imported: timm loads torchvision
        path = Path(timm.origin).parent / "data/_info/imagenet_real_labels.json" if timm and timm.origin else path
    if not path.is_file():
        raise UserError(
            f"imagenet-real needs {REAL_FILE} in the working directory, or timm installed: download it from {REAL_URL}"
        )
    try:
        labels = json.loads(path.read_text())
        right = isinstance(labels, list) and all(0 <= number < NUM_CLASSES for row in labels for number in row)
    except (ValueError, TypeError):
        right = False
    if not right:
        raise UserError(f"{path}: holds something else than a list of lists of class numbers; download {REAL_URL}")
    return labels


def reassess(rows: TableRows, labels: list[list[int]]) -> list[list[int]]:
    """The labels of each row of ImageNet's validation images. An image is known by the number in its file's name,
    ILSVRC2012_val_00000293....JPEG.

    Raises:
        UserError: a name without such a number; rows that are streamed, whose names are not known beforehand.
    """
    if not isinstance(rows, TableRows):
        raise UserError(
            "imagenet-real: its labels go by the names of files, which --streaming does not read; leave it out"
        )
    paths = pc.struct_field(rows.source.data.column("image"), "path").take(rows.source_rows).to_pylist()
    found = []
    for row, path in enumerate(paths):
        match = re.search(r"ILSVRC2012_val_(\d{8})", path or "")
        number = int(match[1]) if match else 0
        if not 0 < number <= len(labels):
            raise UserError(
                f"imagenet-real: the image in row {row} is called {path}, not ILSVRC2012_val_00000001 to "
                f"{len(labels):08d}, so that its labels cannot be told; choose another copy: imagenet-real=FOLDER"
            )
        found.append(labels[number - 1])
    return found
