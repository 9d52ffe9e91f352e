"""The columns of a loaded set: which holds images, which labels, and whether the labels can be used.

Must not know: where a set comes from, subsets, pixels.
"""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_hf.errors import UserError

IMAGE_NAMES = ("image", "img", "images", "picture", "pixels", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "cls")
NO_LABEL = -1  # what `datasets` stores where a test split keeps its labels back


def find_columns(dataset: datasets.Dataset, split: str, image: str | None, label: str | None) -> tuple[str, str]:
    """Find the image and the label column of a split, or check the ones named by flag."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name in IMAGE_NAMES if name in dataset.features and holds_bytes(dataset, name)]
    found = []
    for kind, asked, candidates in (("image", image, images), ("label", label, label_columns(dataset))):
        flag = f"--{kind}_column_name"
        listed = f"columns of the {split} split: {', '.join(dataset.column_names)}"
        if asked is not None and asked not in dataset.column_names:
            raise UserError(f"{flag} {asked}: no such column; {listed}")
        if asked is not None:
            found.append(asked)
        elif kind in candidates or len(candidates) == 1:
            found.append(kind if kind in candidates else candidates[0])
        elif candidates:
            raise UserError(f"{flag}: choose one of {', '.join(candidates)}; {listed}")
        else:
            hint = ", or put every image in a folder of its class" if kind == "label" else ""
            raise UserError(f"no {kind} column found: name it by {flag}{hint}; {listed}")
    if found[0] not in images and not holds_bytes(dataset, found[0]):
        raise UserError(f"--image_column_name {found[0]}: holds no images; columns with images: {', '.join(images)}")
    return found[0], found[1]


def holds_bytes(dataset: datasets.Dataset, name: str) -> bool:
    """Whether a column without the Image type can become one: encoded bytes, or the struct of bytes and path."""
    kind = dataset.data.schema.field(name).type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def label_columns(dataset: datasets.Dataset) -> list[str]:
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return typed or [name for name in LABEL_NAMES if name in dataset.column_names][:1]


def column_values(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def has_labels(dataset: datasets.Dataset, label_column: str | None) -> bool:
    """Whether any row has a label; an empty split counts as labelled, so that it is reported as empty."""
    names = [label_column] if label_column else label_columns(dataset)
    names = [name for name in names if name in dataset.column_names]
    if not names:
        return False
    values = column_values(dataset, names[0])
    if len(values) == values.null_count:
        return len(values) == 0
    return not pa.types.is_integer(values.type) or pc.max(values).as_py() > NO_LABEL


def checked_labels(
    values: pa.ChunkedArray, feature: datasets.ClassLabel, class_names: list[str], split: str
) -> np.ndarray:
    """Check a ClassLabel column's range, and renumber it where this split lists the same classes in another order."""
    labels = values.to_numpy().astype(np.int64)
    outside = np.flatnonzero((labels < 0) | (labels >= len(feature.names)))
    if len(outside):
        row, count = outside[0], len(outside)
        raise UserError(
            f"{split} split, row {row}: label {labels[row]} is outside 0..{len(feature.names) - 1} ({count} such "
            "rows): correct the labels or the class names, or choose another --label_column_name"
        )
    return renumbered(feature.names, class_names, split)[labels]


def renumbered(names: list[str], class_names: list[str], split: str) -> np.ndarray:
    """For each class of a split, in the split's own order, its number in `class_names`: int64 (K,).

    Raises:
        UserError: the split has other classes.
    """
    if names == class_names:
        return np.arange(len(names))
    if sorted(names) != sorted(class_names):
        different = sorted(set(names) ^ set(class_names))
        raise UserError(
            f"{split} split: its classes are not those of the training split; in one of them only: "
            f"{', '.join(different[:10])}; choose another --eval_split"
        )
    return np.array([class_names.index(name) for name in names])


def encode_labels(values: dict, columns: dict) -> tuple[dict, list[str]]:
    """Number plain integer (by value) or text labels (alphabetically), over all splits together."""
    distinct = set()
    for name, column in values.items():
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"--label_column_name {columns[name][1]}: holds {kind}; allowed are class labels, integers or text"
            )
        distinct.update(column.unique().to_pylist())
    if len({type(value) for value in distinct}) > 1:
        raise UserError("the splits' label columns differ in type (integers, text): choose another --eval_split")
    order = sorted(distinct)
    index_of = pa.array(order)
    labels = {
        name: pc.index_in(column.cast(index_of.type), index_of).to_numpy().astype(np.int64)
        for name, column in values.items()
    }
    return labels, [str(value) for value in order]
