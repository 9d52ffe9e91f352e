"""A set that is read while it is trained on: parquet shards, or fractals that are computed as they are needed."""

import functools

import datasets
import numpy as np
import pyarrow as pa

from vit_hf.data.rows.parquet import ParquetRows, head, light_columns, parquet_splits
from vit_hf.data.sets.columns import NO_LABEL, checked_labels, find_columns, renumbered
from vit_hf.data.sets.fractals import FractalRows, num_images, parse_options
from vit_hf.data.sets.fractals import class_names as fractal_class_names
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
    subset_hash,
)
from vit_hf.errors import UserError


def load_streamed(
    name, config_name, revision, image_column, label_column, train_split, eval_split,
    subset, max_train_samples, max_eval_samples, split_seed, need_train, cache_dir,
) -> ImageSplits:  # fmt: skip
    """As `load_image_splits`, with rows that are read when they are needed."""
    notes: list[str] = []
    origin_known = False
    if name == "fractal":
        options = parse_options(config_name)
        class_names = fractal_class_names(options)
        heads = {
            split: range(num_images(options, split)) for split in ("train", "test")
        }  # their lengths are asked for
        train_name = train_split_name(heads, train_split, needed=need_train)
        eval_name = eval_split or "test"
        if eval_name not in heads:
            raise UserError(f"--eval_split {eval_name}: no such split; splits: {listed_splits(heads)}")
        open_split = functools.partial(FractalRows, options)
    else:
        shards, features = _find_shards(name, config_name, revision, cache_dir)
        heads = Heads({split: head(files, features) for split, files in shards.items()})
        train_name = train_split_name(heads, train_split, needed=need_train)
        eval_name = eval_split_name(heads, eval_split, train_name, label_column, notes)
        if eval_name is None:
            raise UserError("--streaming: no part of a stream is held out; name a split to evaluate by --eval_split")
        columns = {
            split: find_columns(heads[split], split, image_column, label_column)
            for split in (train_name, eval_name)
            if split
        }
        kinds = {split: heads[split].features[label] for split, (_, label) in columns.items()}
        if not all(isinstance(kind, datasets.ClassLabel) for kind in kinds.values()):
            raise UserError(
                "--streaming: the label column names no classes, which would be known only when all of it was read; "
                "`vit-hf data prepare` writes a copy that names them"
            )
        class_names = list(next(iter(kinds.values())).names)
        origin_known = all(carries_origin(heads[split].features) for split in columns)

        def open_split(split: str) -> ParquetRows:
            rows = ParquetRows(shards[split], *columns[split], kinds[split].names)
            rows.renumber(renumbered(kinds[split].names, class_names, split))
            return rows

    if not origin_known and (subset.per_class is not None or subset.classes is not None):
        raise UserError(
            "--streaming: a subset of classes or by class (--subset_classes, --subset_per_class, or a model of fewer "
            "classes) would have to read all labels first; allowed is --subset_fraction, or a copy by `vit-hf data prepare`"
        )
    train, evaluation, record = open_split(train_name) if need_train else None, open_split(eval_name), {}
    if not subset.is_empty and origin_known:
        class_names, record = _narrow(train, evaluation, class_names, subset, notes)
    elif not subset.is_empty and need_train:
        kept = keep_fraction(len(train), subset.fraction, subset.seed)
        record = {"rule": subset.describe(), "subset_hash": subset_hash(kept), "train_samples": len(kept)}
        train.keep(kept)
        notes.append(
            "--streaming: --subset_fraction keeps rows by a hash of their numbers, without reading them: other images "
            "than without --streaming; a copy by `vit-hf data prepare` has the same both ways."
        )
        if isinstance(heads, Heads):
            note_old_copy(name, heads[train_name].features, notes)
    if need_train:
        train.keep(draw_samples(len(train), max_train_samples, split_seed))
        if len(train) == 0:
            raise UserError(f"--train_split {train_name}: zero training samples; splits: {listed_splits(heads)}")
    evaluation.keep(draw_samples(len(evaluation), max_eval_samples, split_seed))
    train_name = train_name if need_train else None
    return ImageSplits(train, evaluation, class_names, train_name, eval_name, record, notes)


def _narrow(
    train: ParquetRows | None, evaluation: ParquetRows, class_names: list[str], rule: SubsetRule, notes: list[str]
) -> tuple[list[str], dict]:
    """Applies a rule to the splits of a copy, of which the columns beside the images are read. Returns the classes that
    are left and the record of the subset."""
    kept = resolve_classes(rule.classes, class_names)
    number_of = np.full(len(class_names), NO_LABEL)
    number_of[kept] = np.arange(len(kept))

    def labels_of(rows: ParquetRows, split: str, table: pa.Table) -> np.ndarray:
        return checked_labels(table[0], datasets.ClassLabel(names=rows.class_names), class_names, split)

    eval_labels = labels_of(evaluation, "evaluation", light_columns(evaluation.files, evaluation.columns[1:]))
    eval_rows = np.flatnonzero(np.isin(eval_labels, kept))
    if len(eval_rows) == 0:
        raise UserError("--eval_split: no images of the classes in use")
    record = {}
    if train is not None:
        table = light_columns(train.files, [train.columns[1], *SOURCE_COLUMNS])
        labels = labels_of(train, "training", table)
        every = np.arange(len(labels))
        chosen, record = apply_rule(labels, every, rule, class_names, Origin(every, table))
        check_untrained(labels[chosen], eval_labels[eval_rows], class_names, rule, notes)
        train.keep(chosen)
        train.renumber(number_of)
    evaluation.keep(eval_rows)
    evaluation.renumber(number_of)
    return [class_names[index] for index in kept], record


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
