"""The names of sets: which are made here, which are on the Hub, and which split is which."""

import dataclasses
import os
from pathlib import Path

import datasets
import yaml

from vit_hf.data.rows.interface import Rows
from vit_hf.data.rows.table import Source, TableRows
from vit_hf.data.sets.columns import has_labels
from vit_hf.data.sets.origin import Origin, carries_origin
from vit_hf.errors import UserError, note_near

GENERATED_SETS = ("digits", "glyphs", "fractal")
HUB_SETS = {"cifar10": "uoft-cs/cifar10", "imagenet-1k": "ILSVRC/imagenet-1k"}
NAMED_SETS = [*GENERATED_SETS, *HUB_SETS]
EVAL_SPLITS = ("test", "validation", "val", "valid", "dev")


@dataclasses.dataclass
class ImageSplits:
    """A loaded set: columns `image` (Image(decode=False): dicts of `bytes` and `path`) and `label` (ClassLabel); or
    rows to be read as they are needed. With `multi_label` an image has a list of labels, List(ClassLabel).

    `train_split` and `eval_split` name the source's splits, or say how a split was made. `subset` is {} or holds
    `rule`, `subset_hash` (over the numbers of the rows in the source split) and `train_samples` (rows kept by the rule,
    before any trial draw). `notes` are sentences that the run should say. The origins say where each row of a stored
    split comes from; None: it is a row of its own number. `sources` says which rows of which splits `train` and `eval`
    are.
    """

    train: datasets.Dataset | Rows | None
    eval: datasets.Dataset | Rows
    class_names: list[str]
    train_split: str | None
    eval_split: str | None
    subset: dict = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    train_origin: Origin | None = None
    eval_origin: Origin | None = None
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    multi_label: bool = False

    def rows(self, which: str) -> Rows:
        """The split `train` or `eval` by index."""
        split = getattr(self, which)
        return TableRows(split, self.sources.get(which)) if isinstance(split, datasets.Dataset) else split


def trained_split_seed(model: str) -> int:
    """The --split_seed of the run that made a local model or checkpoint: it decides which images were held out of a set
    that has no evaluation split of its own. 0 where nothing is said."""
    for name in ("run_config.yaml", "manifest.json"):  # the latter in a checkpoint
        try:
            content = yaml.safe_load((Path(model) / name).read_text())  # JSON is YAML too
            run = content.get("run", content)
            return int(run.get("split_seed", run["seed"]))  # an older run had one seed for both
        except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
            continue
    return 0


class Heads(dict):
    """The splits of a stream, of which the first rows alone are read."""


def listed_splits(source: dict) -> str:
    if isinstance(source, Heads):
        return ", ".join(source)
    return ", ".join(f"{name} ({len(split)} rows)" for name, split in source.items())


def resolve_name(name: str) -> tuple[str, bool]:
    """The Hub id or the folder that a set's name stands for, and whether it is a folder."""
    path = HUB_SETS.get(name, os.path.expanduser(name))
    is_folder = name not in HUB_SETS and os.path.isdir(path)
    if not is_folder and name.startswith(("/", ".", "~")):
        raise UserError(f"--dataset_name {name}: no such folder")
    if path == name and not is_folder:
        note_near(name, tuple(NAMED_SETS), "set that is known here")
    return path, is_folder


def note_old_copy(name: str, features: datasets.Features, notes: list[str]) -> None:
    """Says of a copy that an earlier version made that its subsets are not those of the original."""
    if not carries_origin(features) and (Path(name).expanduser() / "prepare.json").is_file():
        notes.append(
            f"The copy {name} does not say which images of its source it holds, so its subset and subset_hash differ "
            "from those of the original; a new copy by `vit-hf data prepare` has the same."
        )


def train_split_name(source: dict, asked: str | None, *, needed: bool) -> str | None:
    name = asked or "train"
    if name in source or not needed:
        return name if name in source else None
    flag = f"--train_split {asked}: no such split" if asked else "no split is called train: name one by --train_split"
    raise UserError(f"{flag}; splits: {listed_splits(source)}")


def eval_split_name(
    source: dict, asked: str | None, train_name: str | None, label_column: str | None, notes: list[str]
) -> str | None:
    """Choose the evaluation split; None means that a part of the training split has to be held out."""
    if asked is not None:
        if asked not in source:
            raise UserError(f"--eval_split {asked}: no such split; splits: {listed_splits(source)}")
        if not has_labels(source[asked], label_column):
            where = f" in its column {label_column}" if label_column else ""
            raise UserError(f"--eval_split {asked}: has no labels{where}; splits: {listed_splits(source)}")
        return asked
    candidates = [name for name in EVAL_SPLITS if name in source and name != train_name]
    labelled = [name for name in candidates if has_labels(source[name], label_column)]
    if not labelled and train_name is None:
        raise UserError(f"no split to evaluate on: name one by --eval_split; splits: {listed_splits(source)}")
    if candidates and candidates[:1] != labelled[:1]:
        notes.append(f"The {candidates[0]} split has no labels, so it is not the evaluation split.")
    return labelled[0] if labelled else None
