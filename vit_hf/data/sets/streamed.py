"""A set that is read while it is trained on: parquet shards, or fractals that are computed as they are needed."""

import dataclasses
import functools
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa

from vit_hf.data.rows.interface import LazyRows
from vit_hf.data.rows.labels import LabelLists
from vit_hf.data.rows.parquet import ParquetRows, head, light_columns, parquet_splits
from vit_hf.data.sets.columns import NO_LABEL, checked_labels, find_columns, holds_lists, one_label, renumbered
from vit_hf.data.sets.fractals import FractalRows, num_images, parse_options
from vit_hf.data.sets.fractals import class_names as class_names_of
from vit_hf.data.sets.load_errors import explained
from vit_hf.data.sets.names import (
    GENERATED_SETS,
    Heads,
    ImageSplits,
    eval_split_name,
    listed_splits,
    note_old_copy,
    resolve_name,
    train_split_name,
)
from vit_hf.data.sets.origin import SOURCE_COLUMNS, Origin, carries_origin
from vit_hf.data.sets.subset import (
    SubsetRule,
    apply_rule,
    check_untrained,
    draw_samples,
    keep_fraction,
    resolve_classes,
    rows_of_classes,
    subset_hash,
    taken,
)
from vit_hf.errors import UserError

LOOKED_AT = 8  # row groups
FEW = 2 / 3  # of the classes that they would hold in random order; by chance alone a group hardly falls below 0.9


@dataclasses.dataclass
class _Stream:
    """A set of which nothing but names and sizes is read yet.

    Args:
        heads: split name -> something that has a length and, of a stored set, features.
        open: split name -> its rows.
        knows_origin: whether it is a copy that says where its rows come from.
    """

    heads: dict
    class_names: list[str]
    train_name: str | None
    eval_name: str
    open: Callable[[str], LazyRows]
    knows_origin: bool = False
    multi_label: bool = False


def load_streamed(
    name, config_name, revision, image_column, label_column, train_split, eval_split,
    subset, max_train_samples, max_eval_samples, split_seed, need_train, cache_dir,
) -> ImageSplits:  # fmt: skip
    """As `load_image_splits`, with rows that are read when they are needed."""
    notes: list[str] = []
    if name == "fractal":
        stream = _fractals(config_name, train_split, eval_split, need_train)
    else:
        shards, features = _find_shards(name, config_name, revision, cache_dir)
        columns = (image_column, label_column)
        stream = _shards(shards, features, columns, train_split, eval_split, need_train, notes)
    if not stream.knows_origin and (subset.per_class is not None or subset.classes is not None):
        raise UserError(
            "--streaming: a subset of classes or by class (--subset_classes, --subset_per_class, or a model of fewer "
            "classes) would have to read all labels first; allowed is --subset_fraction, or a copy by `vit-hf data prepare`"
        )
    train, evaluation = stream.open(stream.train_name) if need_train else None, stream.open(stream.eval_name)
    if isinstance(train, ParquetRows) and not stream.knows_origin:  # a copy has its rows in random order
        notes += _sorted_rows(train, stream.train_name, name)
    class_names, record = stream.class_names, {}
    if not subset.is_empty and stream.knows_origin:
        class_names, record = _narrow(train, evaluation, class_names, subset, notes)
    elif not subset.is_empty and need_train:
        record = _keep_fraction(train, subset, notes)
        if isinstance(train, ParquetRows):
            note_old_copy(name, stream.heads[stream.train_name].features, notes)
    if need_train:
        train.keep(draw_samples(len(train), max_train_samples, split_seed))
        if len(train) == 0:
            listed = listed_splits(stream.heads)
            raise UserError(f"--train_split {stream.train_name}: zero training samples; splits: {listed}")
    evaluation.source_name = (name, stream.eval_name)
    evaluation.keep(draw_samples(len(evaluation), max_eval_samples, split_seed))
    train_name = stream.train_name if need_train else None
    return ImageSplits(
        train, evaluation, class_names, train_name, stream.eval_name, record, notes, multi_label=stream.multi_label
    )


def _fractals(config_name: str | None, train_split: str | None, eval_split: str | None, need_train: bool) -> _Stream:
    options = parse_options(config_name)
    heads = {split: range(num_images(options, split)) for split in ("train", "test")}  # their lengths are asked for
    eval_name = eval_split or "test"
    if eval_name not in heads:
        raise UserError(f"--eval_split {eval_name}: no such split; splits: {listed_splits(heads)}")
    train_name = train_split_name(heads, train_split, needed=need_train)
    return _Stream(heads, class_names_of(options), train_name, eval_name, functools.partial(FractalRows, options))


def _shards(
    shards: dict[str, list[str]],
    features: datasets.Features | None,
    asked_columns: tuple[str | None, str | None],
    train_split: str | None,
    eval_split: str | None,
    need_train: bool,
    notes: list[str],
) -> _Stream:
    """A set of parquet shards, of which the first rows are read."""
    heads = Heads({split: head(files, features) for split, files in shards.items()})
    train_name = train_split_name(heads, train_split, needed=need_train)
    eval_name = eval_split_name(heads, eval_split, train_name, asked_columns[1], notes)
    if eval_name is None:
        raise UserError("--streaming: no part of a stream is held out; name a split to evaluate by --eval_split")
    named = [split for split in (train_name, eval_name) if split]
    columns = {split: find_columns(heads[split], split, *asked_columns) for split in named}
    found = {split: heads[split].features[label] for split, (_, label) in columns.items()}
    multi_label = any(holds_lists(kind) for kind in found.values())
    kinds = {split: one_label(kind) for split, kind in found.items() if holds_lists(kind) == multi_label}
    if len(kinds) < len(found):
        raise UserError(f"the splits' label columns differ in type ({found}): choose others by --label_column_name")
    if not all(isinstance(kind, datasets.ClassLabel) for kind in kinds.values()):
        raise UserError(
            "--streaming: the label column names no classes, which would be known only when all of it was read; "
            "`vit-hf data prepare` writes a copy that names them"
        )
    class_names = list(next(iter(kinds.values())).names)

    def open_split(split: str) -> ParquetRows:
        rows = ParquetRows(shards[split], *columns[split], kinds[split].names, multi_label)
        rows.renumber(renumbered(kinds[split].names, class_names, split))
        return rows

    knows_origin = all(carries_origin(heads[split].features) for split in columns)
    return _Stream(heads, class_names, train_name, eval_name, open_split, knows_origin, multi_label)


def _keep_fraction(train: LazyRows, rule: SubsetRule, notes: list[str]) -> dict:
    """Narrows rows of which nothing is known but their numbers. Returns the record of the subset."""
    kept = keep_fraction(len(train), rule.fraction, rule.seed)
    train.keep(kept)
    notes.append(
        "--streaming: --subset_fraction keeps rows by a hash of their numbers, without reading them: other images than "
        "without --streaming; a copy by `vit-hf data prepare` has the same both ways."
    )
    return {"rule": rule.describe(), "subset_hash": subset_hash(kept), "train_samples": len(kept)}


def _narrow(
    train: ParquetRows | None, evaluation: ParquetRows, class_names: list[str], rule: SubsetRule, notes: list[str]
) -> tuple[list[str], dict]:
    """Applies a rule to the splits of a copy, of which the columns beside the images are read. Returns the classes that
    are left and the record of the subset."""
    kept = resolve_classes(rule.classes, class_names)
    number_of = np.full(len(class_names), NO_LABEL)
    number_of[kept] = np.arange(len(kept))

    def labels_of(rows: ParquetRows, split: str, table: pa.Table) -> np.ndarray | LabelLists:
        return checked_labels(table[0], datasets.ClassLabel(names=rows.class_names), class_names, split)

    eval_labels = labels_of(evaluation, "evaluation", light_columns(evaluation.files, evaluation.columns[1:]))
    eval_rows = rows_of_classes(eval_labels, kept)
    if len(eval_rows) == 0:
        raise UserError("--eval_split: no images of the classes in use")
    record = {}
    if train is not None:
        table = light_columns(train.files, [train.columns[1], *SOURCE_COLUMNS])
        labels = labels_of(train, "training", table)
        every = np.arange(len(labels))
        chosen, record = apply_rule(labels, every, rule, class_names, Origin(every, table))
        check_untrained(taken(labels, chosen), taken(eval_labels, eval_rows), class_names, rule, notes)
        train.keep(chosen)
        train.renumber(number_of)
    evaluation.keep(eval_rows)
    evaluation.renumber(number_of)
    return [class_names[index] for index in kept], record


def _sorted_rows(rows: ParquetRows, split: str, name: str) -> list[str]:
    """A sentence where rows of one class lie together. A few row groups, spread over the split, are held against
    themselves in random order: a group of n rows would then hold sum(1 - (1 - share of the class)^n) classes."""
    looked_at = np.unique(np.linspace(0, len(rows.group_file) - 1, LOOKED_AT).astype(np.int64))
    labels = [found for found in rows.labels_of(looked_at) if len(found)]
    if len(labels) < 2:
        return []
    _, counts = np.unique(np.concatenate(labels), return_counts=True)
    shares = counts / counts.sum()
    found = np.mean([len(np.unique(group)) for group in labels])
    mixed = np.mean([np.sum(1 - (1 - shares) ** len(group)) for group in labels])
    if found >= FEW * mixed:
        return []
    return [
        f"The rows of {split} lie sorted by class: a row group of {np.mean([len(group) for group in labels]):.0f} rows "
        f"holds {found:.1f} classes, and would hold {mixed:.1f} if the {len(labels)} that were looked at were mixed. "
        "A stream mixes only as many rows as --shuffle_buffer_size says; "
        f"`vit-hf data prepare --dataset_name {name} --output_dir FOLDER` writes a copy in random order."
    ]


def _find_shards(
    name: str, config_name: str | None, revision: str | None, cache_dir: str | None
) -> tuple[dict[str, list[str]], datasets.Features | None]:
    """Split name -> its parquet shards, and the columns where the set's card names them."""
    if name in GENERATED_SETS:
        raise UserError(f"--streaming: {name} is generated on this machine and small; leave the flag out")
    path, is_folder = resolve_name(name)
    try:
        builder = datasets.load_dataset_builder(path, config_name, revision=revision, cache_dir=cache_dir)
    except Exception as error:
        raise explained(error, name, path, is_folder) from error
    return parquet_splits(name, builder), builder.info.features
