"""Where images come from: a named set, a folder or a Hub id, as one training and one evaluation split.

Job: load through `datasets`, find columns and splits, check the labels, apply the subset filter and the trial draws.
Must not know: models, training, pixels (decode.py reads the images), processes.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc

from vit_hf.data.columns import (
    NO_LABEL,
    checked_labels,
    column_values,
    encode_labels,
    find_columns,
    has_labels,
    renumbered,
)
from vit_hf.data.digits import load_digits_splits
from vit_hf.data.fractals import FractalRows, load_fractal_splits, num_images, parse_options
from vit_hf.data.fractals import class_names as fractal_class_names
from vit_hf.data.glyphs import load_glyphs_splits
from vit_hf.data.rows import Rows
from vit_hf.data.streams import ParquetRows, head, keep_fraction, parquet_splits
from vit_hf.data.subset import SubsetRule, apply_rule, draw_samples, hold_out, resolve_classes, subset_hash
from vit_hf.errors import UserError

GENERATED_SETS = ("digits", "glyphs", "fractal")
HUB_SETS = {"cifar10": "uoft-cs/cifar10", "imagenet-1k": "ILSVRC/imagenet-1k"}
NAMED_SETS = [*GENERATED_SETS, *HUB_SETS]

EVAL_SPLITS = ("test", "validation", "val", "valid", "dev")
HELD_OUT_FRACTION = 0.1


@dataclasses.dataclass
class ImageSplits:
    """A loaded set: columns `image` (Image(decode=False): dicts of `bytes` and `path`) and `label` (ClassLabel); or
    rows to be read as they are needed.

    `train_split` and `eval_split` name the source's splits, or say how a split was made. `subset` is {} or holds
    `rule`, `subset_hash` (over the rows of the source split) and `train_samples` (rows kept by the rule, before any
    trial draw). `notes` are sentences that the run should say.
    """

    train: datasets.Dataset | Rows | None
    eval: datasets.Dataset | Rows
    class_names: list[str]
    train_split: str | None
    eval_split: str | None
    subset: dict = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Split:
    """One source split with its checked labels, and the source rows that belong to it."""

    name: str
    images: datasets.Dataset  # the one column `image`
    labels: np.ndarray  # int64 (N,), over all source rows
    rows: np.ndarray  # int64 (n,), ascending


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
    seed: int = 0,
    need_train: bool = True,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> ImageSplits:
    """Load a set's training and evaluation split, every process the same rows.

    Args:
        dataset_name: digits, glyphs, fractal, cifar10, imagenet-1k, an existing folder (imagefolder, parquet or
            `save_to_disk`), or a Hub id; a named set goes before a folder of that name (write `./digits` for it).
        dataset_config_name, revision: configuration and version of a Hub set; the options of `fractal`.
        image_column_name, label_column_name: columns, where their types do not decide.
        train_split: default `train`.
        eval_split: default `test`, or `validation` where test is absent or has no labels, or else a stratified tenth
            held out of the training split (said in `notes`).
        subset: which training rows to keep; its classes also filter the evaluation split, nothing else does.
        max_train_samples, max_eval_samples: trial draws after the subset filter.
        seed: of the held-out tenth and the draws.
        need_train: False leaves `train` and `subset` empty; the evaluation split is the same either way.
        streaming: read parquet shards, or compute fractals, as they are needed, instead of storing them first.
        cache_dir: folder of the cache; None is the usual Hugging Face datasets cache.

    Raises:
        UserError: no such set, configuration, split, column or class; no access or no connection; labels out of
            range; no training or evaluation samples; a subset that empties a class which is evaluated.
    """
    if streaming:
        options = (dataset_config_name, revision, image_column_name, label_column_name, train_split, eval_split)
        draws = (max_train_samples, max_eval_samples, seed)
        return _load_streamed(dataset_name, *options, subset, *draws, need_train, cache_dir)
    source = _load_source(dataset_name, dataset_config_name, revision, cache_dir)
    notes: list[str] = []
    train_name = _train_split_name(source, train_split, needed=need_train)
    columns = {}  # the training split's first: a mistyped column must not look like a split without labels
    if train_name is not None:
        columns[train_name] = find_columns(source[train_name], train_name, image_column_name, label_column_name)
    eval_name = _eval_split_name(source, eval_split, train_name, label_column_name, notes)
    if eval_name is not None:
        columns[eval_name] = find_columns(source[eval_name], eval_name, image_column_name, label_column_name)
    splits, class_names = _read_splits({name: source[name] for name in columns}, columns)
    train, evaluation = splits.get(train_name), splits.get(eval_name)
    if (need_train or evaluation is None) and len(train.rows) == 0:
        raise UserError(f"--train_split {train_name}: zero training samples; splits: {_listed(source)}")
    if evaluation is None:
        train, evaluation = _hold_out(train, seed, notes)
    elif need_train and train_name == eval_name:
        notes.append(f"The evaluation split is the training split itself ({eval_name}), as the flags ask.")

    kept = resolve_classes(subset.classes, class_names)
    eval_rows = evaluation.rows[np.isin(evaluation.labels[evaluation.rows], kept)]
    if len(eval_rows) == 0:
        raise UserError(f"--eval_split {evaluation.name}: no images of the classes in use; splits: {_listed(source)}")
    train_rows, record = None, {}
    if need_train:
        train_rows, record = apply_rule(train.images, train.labels, train.rows, subset, class_names, cache_dir)
        untrained = np.setdiff1d(evaluation.labels[eval_rows], train.labels[train_rows])
        _check_untrained([class_names[index] for index in untrained], subset, notes)
        train_rows = train_rows[draw_samples(len(train_rows), max_train_samples, seed)]
    eval_rows = eval_rows[draw_samples(len(eval_rows), max_eval_samples, seed)]
    return ImageSplits(
        train=_finish(train, train_rows, kept, class_names) if need_train else None,
        eval=_finish(evaluation, eval_rows, kept, class_names),
        class_names=[class_names[index] for index in kept],
        train_split=train.name if need_train else None,
        eval_split=evaluation.name,
        subset=record,
        notes=notes,
    )


class _Heads(dict):
    """The splits of a stream, of which the first rows alone are read."""


def check_available(dataset_name: str, dataset_config_name: str | None = None) -> None:
    """Raises UserError where a set cannot be had from here; asks for its description alone, and downloads no images."""
    if dataset_name in GENERATED_SETS:
        return
    path, is_folder = _resolve(dataset_name)
    if is_folder:
        return
    try:
        datasets.load_dataset_builder(path, dataset_config_name)
    except Exception as error:  # as in _load_source
        raise _explained(error, dataset_name, path, is_folder) from error


def _load_streamed(
    name, config_name, revision, image_column, label_column, train_split, eval_split,
    subset, max_train_samples, max_eval_samples, seed, need_train, cache_dir,
) -> ImageSplits:  # fmt: skip
    """As `load_image_splits`, with rows that are read when they are needed."""
    if subset.per_class is not None or subset.classes is not None:
        raise UserError(
            "--streaming: a subset of classes or by class (--subset_classes, --subset_per_class, or a model of fewer "
            "classes) would have to read all labels first; allowed is --subset_fraction, or a copy by `vit-hf data prepare`"
        )
    notes: list[str] = []
    if name == "fractal":
        options = parse_options(config_name)
        class_names = fractal_class_names(options)
        heads = {
            split: range(num_images(options, split)) for split in ("train", "test")
        }  # their lengths are asked for
        train_name = _train_split_name(heads, train_split, needed=need_train)
        eval_name = eval_split or "test"
        if eval_name not in heads:
            raise UserError(f"--eval_split {eval_name}: no such split; splits: {_listed(heads)}")
        open_split = functools.partial(FractalRows, options)
    else:
        shards, features = _find_shards(name, config_name, revision, cache_dir)
        heads = _Heads({split: head(files, features) for split, files in shards.items()})
        train_name = _train_split_name(heads, train_split, needed=need_train)
        eval_name = _eval_split_name(heads, eval_split, train_name, label_column, notes)
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

        def open_split(split: str) -> ParquetRows:
            rows = ParquetRows(shards[split], *columns[split], kinds[split].names)
            rows.renumber(renumbered(kinds[split].names, class_names, split))
            return rows

    train, record = None, {}
    if need_train:
        train = open_split(train_name)
        if not subset.is_empty:
            kept = keep_fraction(len(train), subset.fraction, subset.seed)
            record = {"rule": subset.describe(), "subset_hash": subset_hash(kept), "train_samples": len(kept)}
            train.keep(kept)
        train.keep(draw_samples(len(train), max_train_samples, seed))
        if len(train) == 0:
            raise UserError(f"--train_split {train_name}: zero training samples; splits: {_listed(heads)}")
    evaluation = open_split(eval_name)
    evaluation.keep(draw_samples(len(evaluation), max_eval_samples, seed))
    train_name = train_name if need_train else None
    return ImageSplits(train, evaluation, class_names, train_name, eval_name, record, notes)


def _find_shards(
    name: str, config_name: str | None, revision: str | None, cache_dir: str | None
) -> tuple[dict[str, list[str]], datasets.Features | None]:
    """Split name -> its parquet shards, and the columns where the set's card names them."""
    if name in GENERATED_SETS:
        raise UserError(f"--streaming: {name} is generated on this machine and small; leave the flag out")
    path, is_folder = _resolve(name)
    try:
        builder = datasets.load_dataset_builder(path, config_name, revision=revision, cache_dir=cache_dir)
    except Exception as error:
        raise _explained(error, name, path, is_folder) from error
    return parquet_splits(name, builder), builder.info.features


def _listed(source: dict) -> str:
    if isinstance(source, _Heads):
        return ", ".join(source)
    return ", ".join(f"{name} ({len(split)} rows)" for name, split in source.items())


def _load_source(name: str, config_name: str | None, revision: str | None, cache_dir: str | None) -> dict:
    """Return split name -> Dataset; every failure of `datasets` becomes one line."""
    if name in GENERATED_SETS:
        if revision or (config_name and name != "fractal"):
            given = f"revision {revision}" if revision else f"--dataset_config_name {config_name}"
            raise UserError(f"--dataset_name {name}: is generated on this machine and takes no {given}; leave it out")
        if name == "fractal":
            return load_fractal_splits(parse_options(config_name), cache_dir=cache_dir)
        return {"digits": load_digits_splits, "glyphs": load_glyphs_splits}[name](cache_dir=cache_dir)
    path, is_folder = _resolve(name)
    try:
        if is_folder and {"dataset_dict.json", "state.json"} & set(os.listdir(path)):  # save_to_disk made it
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config_name, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # `datasets` lets through the exceptions of every library below it
        raise _explained(error, name, path, is_folder) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _resolve(name: str) -> tuple[str, bool]:
    """The Hub id or the folder that a set's name stands for, and whether it is a folder."""
    path = HUB_SETS.get(name, os.path.expanduser(name))
    is_folder = name not in HUB_SETS and os.path.isdir(path)
    if not is_folder and name.startswith(("/", ".", "~")):
        raise UserError(f"--dataset_name {name}: no such folder")
    return path, is_folder


def named_source(name: str) -> str:
    """The Hub id of a set, also of one that was copied by `vit-hf data prepare`; any other name as it is."""
    try:
        name = json.loads((Path(name).expanduser() / "prepare.json").read_text())["source"]["dataset_name"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return HUB_SETS.get(name, name)


def _explained(error: Exception, name: str, path: str, is_folder: bool) -> UserError:
    """Turn a loading error into one line: what was asked for, what went wrong, what to do."""
    chain = _causes(error)
    text = " ".join(str(cause) for cause in chain)
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    cause = _one_line(chain[-1])
    flag = f"--dataset_name {name}"
    out_of_range = re.search(r"Class label (-?\d+) greater than configured num_classes (\d+)", text)
    if out_of_range:
        value, count = map(int, out_of_range.groups())
        return UserError(f"{flag}: a label is {value}, allowed are 0..{count - 1}: correct the labels or class names")
    empty_split = re.search(r'Instruction "(\w+)" corresponds to no data', text)
    if empty_split:
        return UserError(f"{flag}: zero samples in the {empty_split[1]} split: it needs at least one image")
    if re.search(r"Config name is missing|BuilderConfig '.*' not found", text):
        return UserError(f"{flag}: {_one_line(error)}: choose one with --dataset_config_name")
    if is_folder:
        empty = kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}
        problem = "no image or parquet files found" if empty else f"cannot be read: {cause}"
        return UserError(f"{flag}: {problem} (a folder holds one folder of images a class, or parquet files)")
    if "gated dataset" in text or "GatedRepoError" in kinds:
        return UserError(
            f"{flag}: gated; ask for access at https://huggingface.co/datasets/{path} and log in with `hf auth login`"
        )
    if "Revision" in text and "doesn't exist" in text:
        return UserError(f"{flag}: {_one_line(error)}")
    unreachable = kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"}
    if unreachable or kinds & {"FileNotFoundError", "HFValidationError", "RepositoryNotFoundError"}:
        where = f"{path} is not in the cache" if name in HUB_SETS else "not a named set, not a folder"
        hub = f"the Hub cannot be reached ({cause})" if unreachable else "the Hub has no such set for this login"
        near = difflib.get_close_matches(name, NAMED_SETS, n=2, cutoff=0.5)
        nearest = f"; nearest: {' or '.join(near)}" if near and name not in NAMED_SETS else ""
        offline = f"; {', '.join(GENERATED_SETS)} need no network" if unreachable else ""
        return UserError(f"{flag}: {where}, and {hub}; named sets: {', '.join(NAMED_SETS)}{nearest}{offline}")
    return UserError(f"{flag}: cannot be loaded: {cause}")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it came from, outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _train_split_name(source: dict, asked: str | None, *, needed: bool) -> str | None:
    name = asked or "train"
    if name in source or not needed:
        return name if name in source else None
    flag = f"--train_split {asked}: no such split" if asked else "no split is called train: name one by --train_split"
    raise UserError(f"{flag}; splits: {_listed(source)}")


def _eval_split_name(
    source: dict, asked: str | None, train_name: str | None, label_column: str | None, notes: list[str]
) -> str | None:
    """Choose the evaluation split; None means that a part of the training split has to be held out."""
    if asked is not None:
        if asked not in source:
            raise UserError(f"--eval_split {asked}: no such split; splits: {_listed(source)}")
        if not has_labels(source[asked], label_column):
            where = f" in its column {label_column}" if label_column else ""
            raise UserError(f"--eval_split {asked}: has no labels{where}; splits: {_listed(source)}")
        return asked
    candidates = [name for name in EVAL_SPLITS if name in source and name != train_name]
    labelled = [name for name in candidates if has_labels(source[name], label_column)]
    if not labelled and train_name is None:
        raise UserError(f"no split to evaluate on: name one by --eval_split; splits: {_listed(source)}")
    if candidates and candidates[:1] != labelled[:1]:
        notes.append(f"The {candidates[0]} split has no labels, so it is not the evaluation split.")
    return labelled[0] if labelled else None


def _read_splits(source: dict, columns: dict) -> tuple[dict[str, _Split], list[str]]:
    """Return each split with labels as int64 0..K-1, all splits numbered alike, and the K class names."""
    values = {name: column_values(source[name], label) for name, (_, label) in columns.items()}
    for name, column in values.items():
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise UserError(f"{name} split, row {row}: {columns[name][1]} is empty; every row needs a label")
    features = {name: source[name].features[columns[name][1]] for name in source}
    typed = [isinstance(feature, datasets.ClassLabel) for feature in features.values()]
    if all(typed):
        class_names = list(next(iter(features.values())).names)
        labels = {name: checked_labels(values[name], features[name], class_names, name) for name in source}
    elif any(typed):
        shown = ", ".join(f"{name}: {columns[name][1]} {type(feature).__name__}" for name, feature in features.items())
        raise UserError(f"the splits' label columns differ in type ({shown}): choose others by --label_column_name")
    else:
        labels, class_names = encode_labels(values, columns)
    splits = {}
    for name, (image, _) in columns.items():
        images = source[name].select_columns([image])
        images = images.rename_column(image, "image") if image != "image" else images
        images = images.cast_column("image", datasets.Image(decode=False))
        splits[name] = _Split(name, images, labels[name], np.arange(len(labels[name])))
    return splits, class_names


def _hold_out(train: _Split, seed: int, notes: list[str]) -> tuple[_Split, _Split]:
    """Make an evaluation split of a stratified tenth of the training rows, and say so."""
    kept, held_out = hold_out(train.labels, HELD_OUT_FRACTION, seed)
    if len(held_out) == 0:
        raise UserError(
            f"the set has no evaluation split, and {len(train.labels)} training rows are too few to hold some out: "
            "name a split by --eval_split"
        )
    percent = round(100 * HELD_OUT_FRACTION)
    notes.append(
        f"The set has no labelled evaluation split: {len(held_out)} rows ({percent}% of each class) of "
        f"{train.name} are held out with seed {seed}."
    )
    rest = dataclasses.replace(train, name=f"{train.name} ({100 - percent}% kept, seed {seed})", rows=kept)
    return rest, dataclasses.replace(train, name=f"{train.name} ({percent}% held out, seed {seed})", rows=held_out)


def _check_untrained(names: list[str], rule: SubsetRule, notes: list[str]) -> None:
    """Refuse a subset that evaluates a class it does not train; without a subset, the set itself is like that."""
    if not names:
        return
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if not rule.is_empty:
        raise UserError(
            f"the subset {rule.describe()} leaves no training images of evaluation class {shown}: raise "
            "--subset_fraction or drop the class with --subset_classes"
        )
    notes.append(f"The evaluation split has classes without a training image: {shown}.")


def _finish(split: _Split, rows: np.ndarray, kept: np.ndarray, class_names: list[str]) -> datasets.Dataset:
    """Attach the labels, renumbered 0..K-1 over the kept classes, and take the chosen rows."""
    number_of = np.full(len(class_names), NO_LABEL, dtype=np.int64)
    number_of[kept] = np.arange(len(kept))
    feature = datasets.ClassLabel(names=[class_names[index] for index in kept])
    # The column goes on before the rows are chosen: added to a selection, it would copy every image.
    dataset = split.images.add_column("label", number_of[split.labels], feature=feature)
    return dataset if len(rows) == len(dataset) else dataset.select(rows)
