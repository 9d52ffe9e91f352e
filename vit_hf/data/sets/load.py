"""A name to rows: a named set, a folder or a Hub id, as one training and one evaluation split.

Job: load through `datasets`, find columns and splits, check the labels, apply the subset filter and the trial draws.
Must not know: models, training, pixels (decode.py reads the images), processes.
"""

import dataclasses
import functools
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_hf.data.processes import Processes
from vit_hf.data.rows.labels import LabelLists
from vit_hf.data.rows.table import Source
from vit_hf.data.sets.columns import (
    NO_LABEL,
    checked_labels,
    column_values,
    encode_labels,
    find_columns,
    holds_lists,
    one_label,
)
from vit_hf.data.sets.digits import load_digits_splits
from vit_hf.data.sets.fractals import load_fractal_splits, parse_options
from vit_hf.data.sets.glyphs import load_glyphs_splits
from vit_hf.data.sets.load_errors import cache_problem, explained
from vit_hf.data.sets.names import (
    GENERATED_SETS,
    ImageSplits,
    eval_split_name,
    listed_splits,
    note_old_copy,
    resolve_name,
    train_split_name,
)
from vit_hf.data.sets.origin import SOURCE_COLUMNS, Origin, carries_origin
from vit_hf.data.sets.streamed import load_streamed
from vit_hf.data.sets.subset import (
    SubsetRule,
    apply_rule,
    check_untrained,
    draw_samples,
    hold_out,
    resolve_classes,
    rows_of_classes,
    taken,
)
from vit_hf.data.sets.tars import tar_class_names
from vit_hf.errors import UserError

HELD_OUT_FRACTION = 0.1


@dataclasses.dataclass
class _Split:
    """One source split with its checked labels, and the source rows that belong to it."""

    name: str
    images: datasets.Dataset  # the one column `image`
    labels: np.ndarray | LabelLists  # int64 (N,), over all source rows; or lists of them
    rows: np.ndarray  # int64 (n,), ascending
    origin: Origin  # of all source rows
    source_name: str  # as the set names it


@dataclasses.dataclass(frozen=True)
class SetSettings:
    """Which set and which of its images, as the flags of the same names say."""

    dataset_name: str
    dataset_config_name: str | None = None
    revision: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    subset_fraction: float | None = None
    subset_per_class: int | None = None
    subset_classes: tuple[str, ...] | None = None
    subset_seed: int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    split_seed: int = 0
    streaming: bool = False
    need_train: bool = True  # of no flag: whether the training split is wanted
    only_judged: bool = False  # of no flag: a set that is there to judge models by, and is not trained on


def load_set(settings: SetSettings) -> ImageSplits:
    """The two splits that the settings name; errors are those of `load_image_splits`."""
    values = dataclasses.asdict(settings)
    rule = {name: values.pop(f"subset_{name}") for name in ("fraction", "per_class", "classes", "seed")}
    rule["classes"] = None if rule["classes"] is None else list(rule["classes"])
    return load_image_splits(values.pop("dataset_name"), subset=SubsetRule(**rule), **values)


def load_splits(settings: SetSettings, processes: Processes) -> ImageSplits:
    """The two splits, on every process: the main process downloads, scans or generates, and the others open what it has
    made. Says what is to be known of the set."""

    def load() -> ImageSplits:  # where each row comes from is known by its subset_hash; the columns would travel along
        return dataclasses.replace(load_set(settings), train_origin=None, eval_origin=None)

    splits = processes.main_first(load, f"loading {settings.dataset_name}")
    for note in splits.notes:
        processes.say(f"note: {note}")
    return splits


def load_image_splits(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    revision: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    subset: SubsetRule = SubsetRule(),
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    split_seed: int = 0,
    need_train: bool = True,
    streaming: bool = False,
    only_judged: bool = False,
    cache_dir: str | None = None,
) -> ImageSplits:
    """Load a set's training and evaluation split, every process the same rows.

    Args:
        dataset_name: digits, glyphs, fractal, cifar10, imagenet-1k, an existing folder (imagefolder, parquet, tar
            shards or `save_to_disk`), or a Hub id; a named set goes before a folder of that name (write `./digits` for it).
        dataset_config_name, revision: configuration and version of a Hub set; the options of `fractal`.
        image_column_name, label_column_name: columns, where their types do not decide.
        train_split: default `train`.
        eval_split: default `test`, or `validation` where test is absent or has no labels, or else a stratified tenth
            held out of the training split (said in `notes`).
        subset: which training rows to keep; its classes also filter the evaluation split, nothing else does.
        max_train_samples, max_eval_samples: trial draws after the subset filter.
        split_seed: of the held-out tenth and the draws; not the run's, so that runs of all seeds see the same images.
        need_train: False leaves `train` and `subset` empty; the evaluation split is the same either way.
        only_judged: a set of one split is evaluated whole, and integer labels are named by their numbers, whatever file
            may name them.
        streaming: read parquet shards, or compute fractals, as they are needed, instead of storing them first.
        cache_dir: folder of the cache; None is the usual Hugging Face datasets cache.

    Raises:
        UserError: no such set, configuration, split, column or class; no access or no connection; labels out of
            range; no training or evaluation samples; a subset that empties a class which is evaluated.
    """
    if streaming:
        options = (dataset_config_name, revision, image_column_name, label_column_name, train_split, eval_split)
        draws = (max_train_samples, max_eval_samples, split_seed)
        return load_streamed(dataset_name, *options, subset, *draws, need_train, cache_dir)
    source = _load_source(dataset_name, dataset_config_name, revision, cache_dir)
    notes: list[str] = []
    train_name = train_split_name(source, train_split, needed=need_train)
    if only_judged and eval_split is None and len(source) == 1:
        eval_split = next(iter(source))
    columns = {}  # the training split's first: a mistyped column must not look like a split without labels
    if train_name is not None:
        columns[train_name] = find_columns(source[train_name], train_name, image_column_name, label_column_name)
    eval_name = eval_split_name(source, eval_split, train_name, label_column_name, notes)
    if eval_name is not None:
        columns[eval_name] = find_columns(source[eval_name], eval_name, image_column_name, label_column_name)
    names = None if only_judged else tar_class_names(next(iter(source.values())), dataset_name, revision)
    splits, class_names = _read_splits({name: source[name] for name in columns}, columns, names, cache_dir)
    train, evaluation = splits.get(train_name), splits.get(eval_name)
    if (need_train or evaluation is None) and len(train.rows) == 0:
        raise UserError(f"--train_split {train_name}: zero training samples; splits: {listed_splits(source)}")
    if evaluation is None:
        train, evaluation = _hold_out(train, split_seed, notes)
    elif need_train and train_name == eval_name:
        notes.append(f"The evaluation split is the training split itself ({eval_name}), as the flags ask.")

    kept = resolve_classes(subset.classes, class_names)
    eval_rows = evaluation.rows[rows_of_classes(taken(evaluation.labels, evaluation.rows), kept)]
    if len(eval_rows) == 0:
        raise UserError(
            f"--eval_split {evaluation.name}: no images of the classes in use; splits: {listed_splits(source)}"
        )
    train_rows, record = None, {}
    if need_train:
        if not subset.is_empty:
            note_old_copy(dataset_name, source[train_name].features, notes)
        train_rows, record = apply_rule(train.labels, train.rows, subset, class_names, train.origin)
        trained, evaluated = taken(train.labels, train_rows), taken(evaluation.labels, eval_rows)
        check_untrained(trained, evaluated, class_names, subset, notes)
        train_rows = train_rows[draw_samples(len(train_rows), max_train_samples, split_seed)]
    eval_rows = eval_rows[draw_samples(len(eval_rows), max_eval_samples, split_seed)]
    sources = {"eval": Source(evaluation.images, eval_rows, (dataset_name, evaluation.source_name))}
    if need_train:
        sources["train"] = Source(train.images, train_rows, (dataset_name, train.source_name))
    return ImageSplits(
        train=_finish(train, train_rows, kept, class_names) if need_train else None,
        eval=_finish(evaluation, eval_rows, kept, class_names),
        class_names=[class_names[index] for index in kept],
        train_split=train.name if need_train else None,
        eval_split=evaluation.name,
        subset=record,
        notes=notes,
        train_origin=train.origin.at(train_rows) if need_train else None,
        eval_origin=evaluation.origin.at(eval_rows),
        sources=sources,
        multi_label=isinstance(evaluation.labels, LabelLists),
    )


def check_available(dataset_name: str, dataset_config_name: str | None = None) -> None:
    """Raises UserError where a set cannot be had from here; asks for its description alone, and downloads no images."""
    if dataset_name in GENERATED_SETS:
        return
    path, is_folder = resolve_name(dataset_name)
    if is_folder:
        return
    try:
        datasets.load_dataset_builder(path, dataset_config_name)
    except Exception as error:  # as in _load_source
        raise explained(error, dataset_name, path, is_folder) from error


def _load_source(name: str, config_name: str | None, revision: str | None, cache_dir: str | None) -> dict:
    """Return split name -> Dataset; every failure of `datasets` becomes one line."""
    if name in GENERATED_SETS:
        if revision or (config_name and name != "fractal"):
            given = f"revision {revision}" if revision else f"--dataset_config_name {config_name}"
            raise UserError(f"--dataset_name {name}: is generated on this machine and takes no {given}; leave it out")
        load = {"digits": load_digits_splits, "glyphs": load_glyphs_splits}.get(name)
        load = load or functools.partial(load_fractal_splits, parse_options(config_name))
        try:
            return load(cache_dir=cache_dir)
        except OSError as error:
            raise cache_problem(error, name, cache_dir) or error from None
    path, is_folder = resolve_name(name)
    try:
        if is_folder and {"dataset_dict.json", "state.json"} & set(os.listdir(path)):  # save_to_disk made it
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config_name, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # `datasets` lets through the exceptions of every library below it
        raise cache_problem(error, name, cache_dir) or explained(error, name, path, is_folder) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _read_splits(
    source: dict, columns: dict, names: list[str] | None, cache_dir: str | None
) -> tuple[dict[str, _Split], list[str]]:
    """Return each split with labels as int64 0..K-1, all splits numbered alike, and the K class names; `names` are those
    of integer labels that do not say them."""
    values = {name: column_values(source[name], label) for name, (_, label) in columns.items()}
    for name, column in values.items():
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise UserError(f"{name} split, row {row}: {columns[name][1]} is empty; every row needs a label")
    features = {name: source[name].features[columns[name][1]] for name in source}
    if names is not None:
        named = datasets.ClassLabel(names=names)
        features = {name: named if pa.types.is_integer(values[name].type) else features[name] for name in source}
    lists = {name: holds_lists(feature) for name, feature in features.items()}
    features = {name: one_label(feature) for name, feature in features.items()}
    typed = [isinstance(feature, datasets.ClassLabel) for feature in features.values()]
    alike = all(lists.values()) or not any(lists.values())
    if alike and all(typed):
        class_names = list(next(iter(features.values())).names)
        labels = {name: checked_labels(values[name], features[name], class_names, name) for name in source}
    elif any(typed) or not alike:
        shown = ", ".join(
            f"{name}: {columns[name][1]} {'list of ' if lists[name] else ''}{type(feature).__name__}"
            for name, feature in features.items()
        )
        raise UserError(f"the splits' label columns differ in type ({shown}): choose others by --label_column_name")
    else:
        labels, class_names = encode_labels(values, columns)
    splits = {}
    for name, (image, _) in columns.items():
        images = source[name].select_columns([image])
        images = images.rename_column(image, "image") if image != "image" else images
        images = images.cast_column("image", datasets.Image(decode=False))
        rows, table = np.arange(len(labels[name])), None
        if carries_origin(source[name].features):
            table = source[name].select_columns(list(SOURCE_COLUMNS)).with_format("arrow")[:]
        splits[name] = _Split(name, images, labels[name], rows, Origin(rows, table, images, cache_dir), name)
    return splits, class_names


def _hold_out(train: _Split, split_seed: int, notes: list[str]) -> tuple[_Split, _Split]:
    """Make an evaluation split of a stratified tenth of the training rows, and say so."""
    kept, held_out = hold_out(train.labels, HELD_OUT_FRACTION, split_seed)
    if len(held_out) == 0:
        raise UserError(
            f"the set has no evaluation split, and {len(train.labels)} training rows are too few to hold some out: "
            "name a split by --eval_split"
        )
    percent = round(100 * HELD_OUT_FRACTION)
    of_each = "" if isinstance(train.labels, LabelLists) else " of each class"
    notes.append(
        f"The set has no labelled evaluation split: {len(held_out)} rows ({percent}%{of_each}) of "
        f"{train.name} are held out with --split_seed {split_seed}."
    )
    rest = dataclasses.replace(train, name=f"{train.name} ({100 - percent}% kept, split seed {split_seed})", rows=kept)
    return rest, dataclasses.replace(
        train, name=f"{train.name} ({percent}% held out, split seed {split_seed})", rows=held_out
    )


def _finish(split: _Split, rows: np.ndarray, kept: np.ndarray, class_names: list[str]) -> datasets.Dataset:
    """Attach the labels, renumbered 0..K-1 over the kept classes, and take the chosen rows."""
    number_of = np.full(len(class_names), NO_LABEL, dtype=np.int64)
    number_of[kept] = np.arange(len(kept))
    feature = datasets.ClassLabel(names=[class_names[index] for index in kept])
    if isinstance(split.labels, LabelLists):
        column, feature = split.labels.renumbered(number_of).column(), datasets.List(feature)
    else:
        column = number_of[split.labels]
    # The column goes on before the rows are chosen: added to a selection, it would copy every image.
    dataset = split.images.add_column("label", column, feature=feature)
    return dataset if len(rows) == len(dataset) else dataset.select(rows)
