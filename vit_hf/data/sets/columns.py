"""The columns of a loaded set: which holds images, which labels, and whether the labels can be used.

Must not know: where a set comes from, subsets, pixels.
"""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_hf.data.rows.labels import LabelLists, checked_lists, flat, is_list
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
    """Those of one label, before those of lists of labels, before one that has the name of one."""
    features = dataset.features.items()
    typed = [name for name, feature in features if isinstance(feature, datasets.ClassLabel)]
    lists = [name for name, feature in features if isinstance(one_label(feature), datasets.ClassLabel)]
    return typed or lists or [name for name in LABEL_NAMES if name in dataset.column_names][:1]


def holds_lists(feature: Any) -> bool:
    return isinstance(feature, datasets.List | datasets.LargeList)


def one_label(feature: Any) -> Any:
    """The type of a label, also where a column holds lists of them."""
    return feature.feature if holds_lists(feature) else feature


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
    if is_list(values.type):
        values = flat(values).drop_null()
        if len(values) == 0:
            return False
    return not pa.types.is_integer(values.type) or pc.max(values).as_py() > NO_LABEL


def checked_labels(
    values: pa.ChunkedArray, feature: datasets.ClassLabel, class_names: list[str], split: str
) -> np.ndarray | LabelLists:
    """Check a ClassLabel column's range, and renumber it where this split lists the same classes in another order; also
    a column of lists of them."""
    if is_list(values.type):
        lists = checked_lists(values, len(feature.names), f"{split} split")
        return lists.renumbered(renumbered(feature.names, class_names, split))
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
    """Number plain integer (by value) or text labels (alphabetically), over all splits together. In lists integers are
    the numbers of classes, up to the largest that is found."""
    lists, values = values, {name: flat(column) if is_list(column.type) else column for name, column in values.items()}
    several = any(is_list(column.type) for column in lists.values())
    distinct = set()
    for name, column in values.items():
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"--label_column_name {columns[name][1]}: holds {kind}; allowed are class labels, integers or text, or "
                "lists of one of these"
            )
        distinct.update(column.unique().drop_null().to_pylist())
    if len({type(value) for value in distinct}) > 1:
        raise UserError("the splits' label columns differ in type (integers, text): choose another --eval_split")
    order = sorted(distinct)
    if several and all(isinstance(value, int) for value in order):
        order = list(range(max(order, default=-1) + 1))
    index_of = pa.array(order)
    if several:
        labels = {name: _numbered_lists(lists[name], index_of, f"{name} split") for name in lists}
        return labels, [str(value) for value in order]
    labels = {
        name: pc.index_in(column.cast(index_of.type), index_of).to_numpy().astype(np.int64)
        for name, column in values.items()
    }
    return labels, [str(value) for value in order]


def _numbered_lists(column: pa.ChunkedArray, index_of: pa.Array, where: str) -> LabelLists:
    """Lists of integers or text as lists of class numbers."""
    found = []
    for chunk in column.chunks:
        chunk = chunk.cast(pa.list_(chunk.type.value_type))
        inside = chunk.flatten()
        if not pa.types.is_integer(inside.type):
            inside = pc.index_in(inside.cast(index_of.type), index_of)
        ends = np.concatenate([[0], np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))])
        found.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inside.cast(pa.int64())))
    return checked_lists(pa.chunked_array(found, pa.list_(pa.int64())), len(index_of), where)
