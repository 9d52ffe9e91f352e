"""What goes into `vit-hf predict` and what comes out of it: files found, rows written, copies sorted into classes.

Knows rows of plain values: no model, no arrays of the device.
"""

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_hf.commands.figures import IMAGE_FILES
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import ArgumentError, UserError

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
NONE_SURE = "_none"  # folder of what a model of several classes is sure of no class of
NAME_BYTES = 200  # of a folder's name; systems allow 255


def check_output(output_file: str | None, copy_to: str | None = None) -> None:
    """Before anything is loaded.

    Raises:
        ArgumentError: a file of another kind, or one that is there.
        UserError: nothing can be written to the folder.
    """
    if copy_to is not None:
        check_folder(copy_to, "--copy_to")
    if output_file is None:
        return
    path = Path(output_file)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"--output_file {output_file}: its suffix is none of {', '.join(SUFFIXES)}")
    if path.exists():
        raise ArgumentError(f"--output_file {output_file}: exists already; choose another name, or remove it")
    check_folder(path.parent, "--output_file")


def image_files(words: Sequence[str]) -> list[str] | None:
    """The image files that words name: files as given, folders walked in the order of the names; None for a single word
    that names a set, or a folder of something else than image files.

    Raises:
        ArgumentError: a word that is no file and no folder, beside others or with an image's suffix.
        UserError: folders without an image.
    """
    found: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            inside, others = walk(path)
            if not inside and len(words) == 1 and others:
                return None
            found += inside
            if others and inside and os.environ.get("RANK", "0") == "0":
                print(f"note: {others} files of {word} have no suffix of an image; they are left out", file=sys.stderr)
        elif path.is_file():
            found.append(str(path))
        elif len(words) == 1 and path.suffix.lower() not in IMAGE_FILES:
            return None
        else:
            raise ArgumentError(f"{word}: no such file or folder; a set is named alone")
    if not found:
        raise UserError(f"{' '.join(words)}: no image files in it; allowed are {', '.join(IMAGE_FILES)}")
    return found


def walk(folder: Path) -> tuple[list[str], int]:
    """The image files below a folder, sorted by the names on their way, and the number of other files; what begins with a
    dot is passed over."""
    found, others = [], 0
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_FILES):
                found.append(Path(here, name))
            else:
                others += 1
    return [str(path) for path in sorted(found, key=lambda path: path.parts)], others


def rows_of(
    answers: Any,
    class_names: Sequence[str],
    files: list[str] | None,
    source_rows: np.ndarray,
    known: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """One row an image: `image` (its file), or `row` (of the split) and `label` (its name in the set, or a list of names), then
    `classes` and `probabilities`, best first, and `sure_classes` of a model of several; `numbers` and `sure` are those as
    numbers.

    Args:
        answers: Answers. files: of the images; None for a set. source_rows: of a set, the row of each
            index. known: the set's class names.
    """
    rows = []
    for place, index in enumerate(answers.index.tolist()):
        row: dict[str, Any] = {"image": files[index]} if files is not None else {"row": int(source_rows[index])}
        if known is not None:
            label = answers.labels[place]
            row["label"] = [known[i] for i in np.flatnonzero(label)] if np.ndim(label) else known[int(label)]
        row["classes"] = [class_names[number] for number in answers.classes[place].tolist()]
        row["probabilities"] = [float(value) for value in answers.probabilities[place]]
        row["numbers"] = answers.classes[place].tolist()
        if answers.sure is not None:
            row["sure"] = np.flatnonzero(answers.sure[place]).tolist()
            row["sure_classes"] = [class_names[number] for number in row["sure"]]
        rows.append(row)
    return rows


HIDDEN = ("numbers", "sure")  # of use here, not in a file


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in HIDDEN}


def shown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table for people: a header, and a line an image."""
    if not rows:
        return
    known = [name for name in ("image", "row", "label") if name in rows[0]]
    cells = [known, *([_cell(row[name]) for name in known] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    answers = ["class and probability, best first"]
    answers += [
        "  ".join(f"{one} {value:.4f}" for one, value in zip(row["classes"], row["probabilities"])) for row in rows
    ]
    for line, best in zip(cells, answers, strict=True):
        yield "  ".join([*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)), best])


def _cell(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row as CSV has it: class_1, probability_1, class_2, ...; several names of a cell by `|`."""
    row = _plain(row)
    classes, probabilities = row.pop("classes"), row.pop("probabilities")
    sure = row.pop("sure_classes", None)
    cells = {name: "|".join(value) if isinstance(value, list) else value for name, value in row.items()}
    for number, (name, value) in enumerate(zip(classes, probabilities), 1):
        cells |= {f"class_{number}": name, f"probability_{number}": value}
    return cells if sure is None else cells | {"sure_classes": "|".join(sure)}


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes a whole file or none, as its suffix says: lists stay lists but in CSV, which has a column for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist([_plain(row) for row in rows]), temporary)
        else:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                _write_text(rows, file, suffix)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(rows: list[dict[str, Any]], file: Any, suffix: str) -> None:
    if suffix == ".csv":
        cells = [flat(row) for row in rows]
        writer = csv.DictWriter(file, list(cells[0]) if cells else ["image"])
        writer.writeheader()
        writer.writerows(cells)
    elif suffix == ".json":
        json.dump([_plain(row) for row in rows], file, indent=1, ensure_ascii=False)
    else:
        file.writelines(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A folder for each class: its name without what a file system does not take (`/ \\ : * ? " < > |`, control
    characters, dots and spaces at its ends), cut at NAME_BYTES; where two would be one, also regardless of case, the
    later one's number stands behind it."""
    found: list[str] = []
    taken: set[str] = set()
    for number, name in enumerate(class_names):
        safe = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", name)
        safe = safe.encode()[:NAME_BYTES].decode(errors="ignore").strip(" .") or "_"
        if safe.casefold() in taken or safe == NONE_SURE:
            safe = f"{safe}_{number}"
        taken.add(safe.casefold())
        found.append(safe)
    return found


def copy_to_classes(rows: list[dict[str, Any]], class_names: Sequence[str], folder: Path) -> int:
    """Copies each image file into the folder of its best class, or of each class that a model of several is sure of; where
    the name is taken, a number goes before its suffix. Returns how many copies were made."""
    names, count = folder_names(class_names), 0
    for row in rows:
        inside = (
            [names[number] for number in row["sure"]] or [NONE_SURE] if "sure" in row else [names[row["numbers"][0]]]
        )
        for name in inside:
            (folder / name).mkdir(parents=True, exist_ok=True)
            _copy(Path(row["image"]), folder / name)
            count += 1
    return count


def _copy(source: Path, folder: Path) -> None:
    """Copies a file under a name that is not taken."""
    target, number = folder / source.name, 1
    while True:
        try:
            file = open(target, "xb")
        except FileExistsError:
            number += 1
            target = folder / f"{source.stem}_{number}{source.suffix}"
            continue
        try:
            with file, open(source, "rb") as original:
                shutil.copyfileobj(original, file)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return
