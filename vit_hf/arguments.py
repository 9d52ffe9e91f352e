"""What a run is told: the flags of both scripts, their YAML file, and every check that needs no data and no model.

A recipe (`--config FILE.yaml`) holds the same names as the flags; a flag wins over the file. This module must not
import torch, transformers or more of vit_hf than its errors, so that `--help` and a wrong flag answer at once.
"""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vit_hf.errors import ArgumentError, nearest


def flag(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, same_run: bool = False
) -> Any:
    """A field with its help text, its range (inclusive), and whether it may change when a run is resumed."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "same_run": same_run})


@dataclass
class ModelArguments:
    """The model: from scratch by --preset, or from weights by --model_name_or_path."""

    preset: str | None = flag(None, "architecture by name, randomly initialised (`vit-hf models` lists them)")
    model_name_or_path: str | None = flag(None, "Hub id or folder of a pretrained model")
    revision: str | None = flag(None, "branch, tag or commit of the Hub model")
    config_overrides: str | None = flag(
        None, 'fields of the configuration, e.g. "drop_path_rate=0.1,pooling=mean" (docs/models.md)'
    )
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository (ours needs none)")


@dataclass
class DatasetArguments:
    """Which images."""

    dataset_name: str | None = flag(
        None, "digits, glyphs, fractal, cifar10, imagenet-1k, a Hub id, or a folder (imagefolder or parquet)"
    )
    dataset_config_name: str | None = flag(
        None, 'configuration of the Hub dataset, or options of fractal, e.g. "num_classes=1000,image_size=64"'
    )
    image_column_name: str | None = flag(None, "image column (default: found by its type)")
    label_column_name: str | None = flag(None, "label column (default: found by its type)")
    eval_split: str | None = flag(None, "split to evaluate on (default: test, or validation where test has no labels)")
    max_eval_samples: int | None = flag(None, "evaluate on a seeded draw of so many images, for trials", low=1)
    split_seed: int = flag(
        0, "which images are held out of a set without an evaluation split, and the draws", low=0, high=2**32 - 1
    )
    on_bad_image: Literal["raise", "skip"] = flag("raise", "an image that does not decode: stop, or leave it out")


@dataclass
class LoadingArguments:
    """How images come to the device: shared by training and evaluation."""

    streaming: bool = flag(False, "read parquet shards as they are needed, for sets larger than the disk")
    dataloader_num_workers: str = flag(
        "auto", "worker processes of each rank that read and decode images that are not kept decoded", same_run=True
    )
    per_device_eval_batch_size: int = flag(128, "evaluation batch of one process", low=1, same_run=True)


@dataclass
class SubsetArguments:
    """Which training images."""

    train_split: str | None = flag(None, "split to train on (default: train)")
    max_train_samples: int | None = flag(None, "train on a seeded draw of so many images, for trials", low=1)
    subset_fraction: float | None = flag(None, "keep this share of every class of the training split", low=0, high=1)
    subset_per_class: int | None = flag(None, "keep exactly so many training images of each class", low=1)
    subset_classes: str | None = flag(None, "keep these classes: names or indices by comma, or a file, one a line")
    subset_seed: int = flag(0, "which images the subset filter keeps", low=0, high=2**32 - 1)


@dataclass
class PreprocessingArguments:
    """How an evaluation image becomes the model's input."""

    interpolation: Literal["auto", "bilinear", "bicubic"] = flag(
        "auto", "how images are resized; auto: as the model's image processor says, else bilinear"
    )
    crop_pct: float | None = flag(
        None, "share of the resized side that is kept, e.g. 0.875; implies --eval_resize shortest", low=0.05, high=1
    )
    eval_resize: Literal["auto", "shortest", "square"] = flag(
        "auto",
        "shortest: the shorter side, then the centre is cut; square: both sides (docs/data.md says what auto is)",
    )


@dataclass
class DataArguments(DatasetArguments, LoadingArguments, SubsetArguments, PreprocessingArguments):
    """What is done to each image."""

    decoded_cache: Literal["auto", "never"] = flag(
        "auto", "decode a set once, into the cache of `datasets`, where it fits (docs/data.md)", same_run=True
    )
    data_on_device: Literal["auto", "never"] = flag(
        "auto", "keep a decoded set in the memory of the GPU where it fits a fifth of it", same_run=True
    )
    shuffle_buffer_size: int = flag(
        32768, "images that a stream mixes, in the memory of all processes together", low=1
    )
    image_size: str | None = flag(None, "input in pixels: SIDE, or HEIGHTxWIDTH (default: the model's)")
    image_mean: str | None = flag(
        None, "mean of each channel in [0, 1], e.g. 0.485,0.456,0.406 (default: 0.5, or the model's)"
    )
    image_std: str | None = flag(None, "standard deviation of each channel (default: 0.5, or the model's)")
    interpolation: Literal["auto", "bilinear", "bicubic", "random"] = flag(
        "auto",
        "how images are resized, also random crops; auto: as the model's image processor says, else bilinear; random: each "
        "crop draws bilinear or bicubic, evaluation is as with auto",
    )
    random_crop: str = flag(
        "none",
        'none, padding=4 (pixels), scale=0.08 (smallest share of the area), with ",rule=tensorflow" as TensorFlow draws '
        "it, or simple (DeiT III)",
    )
    random_flip: float = flag(0.0, "probability of a horizontal flip", low=0, high=1)
    randaugment: str = flag(
        "none",
        'none, or e.g. "num_ops=2,magnitude=9", with ",ops=big_vision" the operations of arXiv 2205.01580, with '
        '",magnitude_std=0.5,increasing=true" timm\'s rand-m9-mstd0.5-inc1',
    )
    trivial_augment: bool = flag(False, "TrivialAugment: one operation of random strength")
    three_augment: bool = flag(False, "3-Augment of DeiT III: grey, solarized or blurred")
    color_jitter: float = flag(0.0, "brightness, contrast and saturation by a factor of 1 +- this", low=0, high=1)
    random_erasing: float = flag(0.0, "probability that a box is covered up", low=0, high=1)
    random_erasing_mode: Literal["uniform", "pixel", "const"] = flag(
        "uniform", "what covers it: even grey levels, normal noise of each pixel, or the mean colour"
    )
    mixup_alpha: float = flag(0.0, "mixup strength, 0 is off", low=0)
    cutmix_alpha: float = flag(
        0.0, "cutmix strength, 0 is off; with mixup on too, each draw takes one of the two", low=0
    )
    mixup_prob: float = flag(1.0, "probability that a draw of mixup or cutmix mixes at all", low=0, high=1)
    mixup_switch_prob: float = flag(0.5, "probability of cutmix where mixup is on too", low=0, high=1)
    mixup_off_epoch: int = flag(0, "from this epoch on (the first is 0) nothing is mixed; 0 mixes to the end", low=0)
    mixup_mode: Literal["batch", "elem"] = flag("batch", "draw mixup and cutmix for a micro-batch, or for each image")
    aug_repeats: int = flag(1, "times that each image comes in a row, augmented otherwise each time", low=1)
    class_balanced: bool = flag(False, "all classes come equally often; the length of an epoch stays")


@dataclass
class TrainArguments:
    """How it is trained, and where the results go."""

    output_dir: str | None = flag(None, "folder of the run; becomes a Hub model folder", same_run=True)
    num_train_epochs: float | None = flag(None, "length of the run in passes over the training set", low=0)
    max_steps: int | None = flag(None, "length of the run in optimizer steps", low=1)
    global_batch_size: int = flag(128, "images an optimizer step, over all processes", low=1)
    per_device_train_batch_size: int | None = flag(
        None, "most images a process takes at once; gradient accumulation is derived from it", low=1, same_run=True
    )
    learning_rate: float = flag(1e-3, "peak learning rate", low=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag("cosine", "decay after the warm-up")
    warmup_steps: int | None = flag(None, "steps of linear warm-up", low=0)
    warmup_ratio: float | None = flag(None, "warm-up as a share of all steps", low=0, high=1)
    optim: Literal["adamw_torch", "sgd"] = flag("adamw_torch", "optimizer")
    adam_beta1: float = flag(0.9, "AdamW beta1", low=0, high=1)
    adam_beta2: float = flag(0.999, "AdamW beta2", low=0, high=1)
    momentum: float = flag(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = flag(
        0.1, "decoupled weight decay (AdamW) or L2 (SGD); never on norms, biases, tokens", low=0
    )
    layer_decay: float = flag(1.0, "learning rate factor from one layer to the one below it", low=0, high=1)
    max_grad_norm: float = flag(1.0, "clip the global gradient norm, 0 is off", low=0)
    label_smoothing_factor: float = flag(0.0, "label smoothing", low=0, high=1)
    ema_decay: float = flag(0.0, "decay of an exponential moving average of the weights, 0 is off", low=0, high=1)
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory", same_run=True
    )
    torch_compile: bool = flag(False, "compile the model with torch.compile", same_run=True)
    seed: int = flag(0, "seed of initialisation, data order, augmentation and dropout", low=0, high=2**32 - 1)
    logging_steps: int = flag(50, "steps between log lines", low=1, same_run=True)
    eval_steps: int | None = flag(None, "steps between evaluations (default: once an epoch)", low=1, same_run=True)
    log_figures_steps: int | None = flag(
        None, "steps between figures of the model, and once at the end (default: none are drawn)", low=1, same_run=True
    )
    save_steps: int | None = flag(None, "steps between checkpoints (default: once an epoch)", low=1, same_run=True)
    save_total_limit: int | None = flag(None, "keep only the newest so many checkpoints", low=1, same_run=True)
    resume_from_checkpoint: str = flag("auto", "auto, none, or the path of a checkpoint", same_run=True)
    report_to: str = flag("none", "tensorboard, wandb, trackio (several by comma) or none", same_run=True)
    ddp_timeout: int = flag(
        1800,
        "seconds a process waits for the others, but for one that loads or decodes a set: as long as it lives",
        low=1,
        same_run=True,
    )
    dry_run: bool = flag(False, "print what would be run, and stop", same_run=True)


@dataclass
class HubArguments:
    """Sharing the finished folder."""

    push_to_hub: bool = flag(False, "upload the finished folder to the Hub", same_run=True)
    hub_model_id: str | None = flag(
        None, "repository to push to (default: the name of the output folder)", same_run=True
    )
    hub_private_repo: bool = flag(False, "create the repository as private", same_run=True)


@dataclass
class RunArguments(ModelArguments, DataArguments, TrainArguments, HubArguments):
    """All flags of run_pretrain.py and run_finetune.py, flat."""


@dataclass
class EvaluateArguments(DatasetArguments, LoadingArguments, PreprocessingArguments):
    """Flags of `vit-hf evaluate`; the model is positional."""

    model: str = flag("", "Hub id or folder of a model")
    revision: str | None = flag(None, "branch, tag or commit of the Hub model")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository")
    output_dir: str | None = flag(None, "where eval_results.json goes (default: the model's folder, else here)")
    split_seed: int | None = flag(
        None,
        "which images are held out of a set without an evaluation split (default: the run's)",
        low=0,
        high=2**32 - 1,
    )
    ddp_timeout: int = flag(
        1800,
        "seconds a process waits for the others, but for one that loads or decodes a set: as long as it lives",
        low=1,
    )


@dataclass
class FiguresArguments(PreprocessingArguments):
    """Flags of `vit-hf figures`; the model is positional."""

    model: str = flag("", "Hub id or folder of a model")
    revision: str | None = flag(None, "branch, tag or commit of the Hub model")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository")
    images: list[str] | None = flag(None, "image files, or folders of them, to look at (default: images of a set)")
    dataset_name: str | None = flag(None, "set to take images of: a name, a Hub id or a folder (default: digits)")
    dataset_config_name: str | None = flag(None, "configuration of the Hub dataset, or options of fractal")
    image_column_name: str | None = flag(None, "image column (default: found by its type)")
    label_column_name: str | None = flag(None, "label column (default: found by its type)")
    eval_split: str | None = flag(None, "split to take images of (default: test, or validation)")
    num_images: int = flag(8, "most images that are taken of a set or of a folder", low=1)
    image_size: str | None = flag(None, "input in pixels: SIDE, or HEIGHTxWIDTH (default: the model's)")
    output_dir: str | None = flag(None, "folder for the figures and index.html")


@dataclass
class PrepareArguments(DatasetArguments, SubsetArguments):
    """Flags of `vit-hf data prepare`."""

    revision: str | None = flag(None, "branch, tag or commit of the Hub dataset")
    output_dir: str | None = flag(None, "folder of the copy, to be used as --dataset_name")
    shorter_side: int = flag(256, "most pixels of an image's shorter side", low=1)
    jpeg_quality: int = flag(90, "of the images that are made smaller", low=1, high=100)
    num_proc: int | None = flag(None, "worker processes (default: all cores)", low=1)


@dataclass
class CacheArguments:
    """Flags of `vit-hf data cache`."""

    clear: bool = flag(False, "remove them instead of listing them; what a running process uses stays")
    dataset_name: str | None = flag(None, "only those of this set, as it was named when it was decoded")


@dataclass
class ShowArguments(RunArguments):
    """Flags of `vit-hf data show`: those of a run, and the picture."""

    output_file: str = flag("contact_sheet.png", "the picture")


# A flag of one of these groups on the command line puts the file's choice from the same group out of force.
ALTERNATIVES = [
    ("preset", "model_name_or_path"),
    ("num_train_epochs", "max_steps"),
    ("warmup_steps", "warmup_ratio"),
    ("subset_fraction", "subset_per_class"),
]


# What users of other scripts look for here under another name.
_PRECISION = "precision is the launcher's: accelerate launch --mixed_precision bf16 (or fp16)"
MOVED = {
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "mixed_precision": _PRECISION,
    "num_processes": "processes are the launcher's: accelerate launch --num_processes N",
    "deepspeed": "ZeRO is the launcher's: accelerate launch --config_file accelerate_configs/zero2.yaml",
    "gradient_accumulation_steps": "it is derived from --global_batch_size and --per_device_train_batch_size",
    "overwrite_output_dir": "nothing is overwritten: choose another --output_dir, or remove the folder",
    "do_train": "both scripts train and evaluate; to evaluate alone: vit-hf evaluate",
    "do_eval": "both scripts train and evaluate; to evaluate alone: vit-hf evaluate",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN; a token is never a flag",
}


def _convert(name: str, value: Any, item: dataclasses.Field) -> Any:
    """Turns a flag's text or a YAML value into the field's type, and holds it against the field's range."""
    given = value
    kinds = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
    optional = type(None) in kinds
    kind = next(k for k in kinds if k is not type(None))
    if value is None or (optional and value == "none" and kind is not str):
        if optional:
            return None
        raise ArgumentError(f"--{name}: a value is missing")
    if typing.get_origin(kind) is list:  # several words
        return [str(word) for word in (value if isinstance(value, list) else [value])]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ArgumentError(f"--{name}: {value!r} is not one of {', '.join(choices)}")
        return value
    try:
        if kind is bool:
            value = {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        elif kind is int:
            number = float(value)
            if isinstance(value, bool) or number != int(number):
                raise ValueError
            value = int(number) if abs(number) < 2**53 else int(value)
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
            if not math.isfinite(value):
                raise ValueError
        elif isinstance(value, (list, tuple)):  # a YAML list where the flag takes values by comma
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            value = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in value.items())
        else:
            value = str(value)
    except (ValueError, KeyError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ArgumentError(f"--{name}: {given!r} is not {expected}") from None
    low, high = item.metadata["low"], item.metadata["high"]
    if kind in (int, float) and not ((low is None or value >= low) and (high is None or value <= high)):
        allowed = f"from {low} to {high}" if high is not None else f"{low} or more"
        raise ArgumentError(f"--{name}: {value} is out of range, allowed is {allowed}")
    return value


def read_config(path: str | Path, cls: type) -> dict[str, Any]:
    """Reads a recipe or a run_config.yaml into {field: value}; the block `resolved:` of the latter is ignored.

    Raises:
        ArgumentError: no such file, not YAML, or a key that is no flag.
    """
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ArgumentError(f"--config: {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--config: {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"--config: {path} must hold 'flag: value' lines, found {type(content).__name__}")
    content.pop("resolved", None)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in content:
        if name not in fields:
            raise ArgumentError(f"{path}: unknown key {name!r}, {nearest(str(name), fields)}")
    return {name: _convert(name, value, fields[name]) for name, value in content.items()}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message: str):  # argparse's own faults (a flag without its value) in the form of ours
        raise ArgumentError(message)


def _parser(cls: type, prog: str, description: str, positional: str | None) -> Parser:
    parser = Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional is None:
        parser.add_argument("--config", help="YAML file with the same names as the flags; a flag wins over the file")
    groups = {}
    for base in reversed(cls.__mro__[:-1]):
        for name in base.__dict__.get("__annotations__", {}):
            groups.setdefault(name, base)
    titles: dict[type, Any] = {}
    for item in dataclasses.fields(cls):
        if item.name == positional:
            parser.add_argument(item.name, help=item.metadata["help"])
            continue
        base = groups[item.name]
        group = titles.setdefault(
            base, parser.add_argument_group(base.__doc__.strip()) if base not in titles else None
        )
        kinds = [k for k in typing.get_args(item.type) or [item.type] if k is not type(None)]
        extra = {"nargs": "?", "const": "true"} if kinds == [bool] else {}
        metavar = "{" + ",".join(kinds) + "}" if isinstance(kinds[0], str) else kinds[0].__name__.upper()
        if typing.get_origin(kinds[0]) is list:
            extra, metavar = {"nargs": "+", "action": "extend"}, "PATH"
        text = item.metadata["help"].replace("%", "%%")
        text += "" if item.default is None or item.default is False else f" (default: {item.default})"
        group.add_argument(f"--{item.name}", metavar=metavar, help=text, **extra)
    return parser


def parse(
    cls: type,
    argv: list[str] | None = None,
    *,
    prog: str,
    description: str = "",
    positional: str | None = None,
    default_config: str | Path | None = None,
) -> Any:
    """Parses flags over a YAML file over the defaults of the dataclass `cls`.

    Args:
        default_config: the recipe of a call with no words at all; the call says that it is used.
        positional: a field that is given without a flag.

    Raises:
        ArgumentError: an unknown or malformed flag or key, or a value outside its range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(cls, prog, description, positional)
    if not argv and default_config is not None:
        print(f"{prog}: no flags given, running the demo recipe: --config {default_config}", file=sys.stderr)
        argv = ["--config", str(default_config)]
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            raise ArgumentError(f"unexpected word {name!r} on the command line")
        key = name[2:].replace("-", "_")
        hint = MOVED.get(key) or nearest(key, [*fields, "config"])
        raise ArgumentError(f"unknown flag {name}, {hint}")
    config = given.pop("config", None)
    values = read_config(config, cls) if config is not None else {}
    flags = {name: _convert(name, value, fields[name]) for name, value in given.items()}
    for group in ALTERNATIVES:
        if any(flags.get(name) is not None for name in group):
            for name in group:
                values.pop(name, None)
    return cls(**{**values, **flags})


def check(args: RunArguments) -> None:
    """Holds the flags of a training run against each other.

    Raises:
        ArgumentError: flags that exclude or need each other.
    """
    check_one_model(args)
    if args.preset is None and args.model_name_or_path is None:
        raise ArgumentError(f"give one of {WHICH_MODEL}: neither is given")
    if (args.num_train_epochs is None) == (args.max_steps is None):
        found = "both are given" if args.max_steps else "neither is given"
        raise ArgumentError(f"give one of --num_train_epochs and --max_steps: {found}")
    if args.num_train_epochs is not None and args.num_train_epochs <= 0:
        raise ArgumentError(f"--num_train_epochs: {args.num_train_epochs} is out of range, allowed is more than 0")
    if args.warmup_steps is not None and args.warmup_ratio is not None:
        raise ArgumentError("give only one of --warmup_steps and --warmup_ratio")
    for needed in ("dataset_name", "output_dir"):
        if not getattr(args, needed):
            raise ArgumentError(f"--{needed} is missing")
    for name in ("ema_decay", "adam_beta1", "adam_beta2"):
        if getattr(args, name) == 1:
            raise ArgumentError(f"--{name}: 1.0 would never move the average, allowed is 0 to below 1")
    check_loading(args)
    check_subset(args)
    check_augmentation(args)
    trackers(args.report_to)


def check_loading(args: DataArguments) -> None:
    """Raises ArgumentError for flags of how images are read that cannot be right, or exclude each other."""
    parse_num_workers(args.dataloader_num_workers)
    if args.streaming and args.aug_repeats > 1:
        raise ArgumentError(f"--aug_repeats: {args.aug_repeats} does not go with --streaming, allowed is 1")
    if args.streaming and args.class_balanced:
        raise ArgumentError("--class_balanced: true does not go with --streaming, allowed is false")


WHICH_MODEL = "--preset (from scratch) and --model_name_or_path (from weights)"


def check_one_model(args: ModelArguments) -> None:
    """Raises ArgumentError where two models are named."""
    if args.preset is not None and args.model_name_or_path is not None:
        raise ArgumentError(f"give one of {WHICH_MODEL}: both are given")


def check_subset(args: SubsetArguments) -> None:
    """Raises ArgumentError for a subset flag that cannot be right."""
    if args.subset_fraction == 0:
        raise ArgumentError("--subset_fraction: 0.0 keeps nothing, allowed is above 0 to 1")
    if args.subset_fraction is not None and args.subset_per_class is not None:
        raise ArgumentError("give only one of --subset_fraction and --subset_per_class")


def check_augmentation(args: DataArguments) -> None:
    """Raises ArgumentError for flags of the transforms that cannot be right, or exclude each other."""
    crop = parse_random_crop(args.random_crop)
    if args.interpolation == "random" and crop.kind != "scale":
        raise ArgumentError(
            f"--interpolation: random is for resized crops, allowed with --random_crop {args.random_crop} are auto, bilinear, "
            "bicubic; or give --random_crop scale=0.08"
        )
    parse_randaugment(args.randaugment)
    policies = [name for name in ("trivial_augment", "three_augment") if getattr(args, name)]
    policies += ["randaugment"] if args.randaugment != "none" else []
    if len(policies) > 1:
        raise ArgumentError(f"give only one of {' and '.join(f'--{name}' for name in policies)}")
    mixes = [name for name in ("mixup_alpha", "cutmix_alpha") if getattr(args, name) > 0]
    for name, idle, needed in (
        ("mixup_prob", args.mixup_prob < 1 and not mixes, "--mixup_alpha or --cutmix_alpha"),
        ("mixup_off_epoch", args.mixup_off_epoch > 0 and not mixes, "--mixup_alpha or --cutmix_alpha"),
        ("mixup_switch_prob", args.mixup_switch_prob != 0.5 and len(mixes) < 2, "--mixup_alpha and --cutmix_alpha"),
        ("random_erasing_mode", args.random_erasing_mode != "uniform" and not args.random_erasing, "--random_erasing"),
    ):
        if idle:
            raise ArgumentError(f"--{name}: {getattr(args, name)} does nothing without {needed} above 0")
    parse_image_size(args.image_size)
    for name in ("image_mean", "image_std"):
        parse_channels(name, getattr(args, name))


@dataclass(frozen=True)
class RandomCrop:
    """How training images are cropped at random.

    Args:
        kind: none | padding | scale | simple.
        amount: pixels of padding, or the smallest share of the area.
        rule: whose way of drawing the boxes of `scale`: torchvision | tensorflow.
    """

    kind: str = "none"
    amount: float = 0.0
    rule: str = "torchvision"

    @property
    def while_decoding(self) -> bool:
        """Whether it belongs on the image as it is stored: on a set that is decoded batch by batch the host cuts it."""
        return self.kind in ("scale", "simple")


def parse_random_crop(text: str) -> RandomCrop:
    """`none`, `padding=4`, `scale=0.08[,rule=tensorflow]` or `simple` -> RandomCrop.

    Raises:
        ArgumentError: any other text, a padding below 1, a scale outside (0, 1].
    """
    first, comma, rest = text.partition(",")
    kind, _, number = first.partition("=")
    rules = {"": "torchvision", ",rule=torchvision": "torchvision", ",rule=tensorflow": "tensorflow"}
    rule = rules.get(comma + rest.strip())
    try:
        if text == "none":
            return RandomCrop()
        if text == "simple":
            return RandomCrop("simple", 4.0)  # pixels of padding, as DeiT III has it
        if kind == "padding" and int(number) >= 1 and not comma:
            return RandomCrop(kind, float(number))
        if kind == "scale" and 0 < float(number) <= 1 and rule is not None:
            return RandomCrop(kind, float(number), rule)
    except ValueError:
        pass
    raise ArgumentError(
        f"--random_crop: {text!r} is not none, padding=PIXELS (1 or more), scale=SHARE (above 0, to 1), the last also with "
        ",rule=torchvision or ,rule=tensorflow, or simple"
    )


def parse_randaugment(text: str) -> dict[str, Any] | None:
    """`num_ops=2,magnitude=9[,ops=big_vision]` -> {num_ops: 2, magnitude: 9.0, ops: ...}, with `increasing=true` (ops
    timm) also magnitude_std; `none` -> None.

    Raises:
        ArgumentError: any other text, or a number out of range.
    """
    if text == "none":
        return None
    values: dict[str, Any] = {"num_ops": 2, "magnitude": 9.0, "ops": "torchvision"}
    highest = {"torchvision": 30, "big_vision": 10, "timm": 10}  # what their scales end at
    try:
        given = dict(part.strip().split("=") for part in text.split(","))
        if given.get("increasing") == "true" and "ops" not in given:
            del given["increasing"]
            values |= {"ops": "timm", "magnitude_std": 0.0}
        unknown = set(given) - set(values)
        values |= {name: type(values[name])(value) for name, value in given.items() if name not in unknown}
        in_range = 1 <= values["num_ops"] <= 8 and 0 <= values["magnitude"] <= highest[values["ops"]]
        chosen = given.get("ops") != "timm"  # it is named by what it does, as timm names it
        if not unknown and in_range and chosen and 0 <= values.get("magnitude_std", 0) <= 10:
            return values
    except (ValueError, KeyError):
        pass
    raise ArgumentError(
        f'--randaugment: {text!r} is not none or e.g. "num_ops=2,magnitude=9,ops=torchvision" (num_ops 1 to 8, magnitude '
        "0 to 30), ops=big_vision (magnitude 0 to 10), or in place of ops timm's increasing=true (magnitude 0 to 10, "
        "magnitude_std 0 to 10)"
    )


def parse_num_workers(text: str) -> int | None:
    """`auto` -> None, a number of processes otherwise.

    Raises:
        ArgumentError: anything else.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > 512:
        raise ArgumentError(f"--dataloader_num_workers: {text!r} is not auto or a number from 0 to 512")
    return int(text)


def parse_image_size(text: str | None) -> int | list[int] | None:
    """`224` -> 224; `224x160` -> [224, 160], height and width.

    Raises:
        ArgumentError: anything else.
    """
    if text is None:
        return None
    sides = text.split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ArgumentError(f"--image_size: {text!r} is not SIDE or HEIGHTxWIDTH in pixels")
    return [int(side) for side in sides] if len(sides) == 2 else int(sides[0])


def parse_channels(name: str, text: str | None) -> list[float] | None:
    """`0.485,0.456,0.406` or one number for all three channels -> three floats.

    Raises:
        ArgumentError: not one or three numbers, or a standard deviation that is not positive.
    """
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if (
        len(numbers) not in (1, 3)
        or not all(map(math.isfinite, numbers))
        or (name == "image_std" and min(numbers) <= 0)
        or (name == "image_mean" and not 0 <= min(numbers) <= max(numbers) <= 1)
    ):
        raise ArgumentError(
            f"--{name}: {text!r} is not one number or three by comma, "
            + ("above 0" if name == "image_std" else "from 0 to 1 (of grey levels divided by 255)")
        )
    return numbers * (3 // len(numbers))


def trackers(report_to: str) -> list[str]:
    """`tensorboard,wandb` -> the trackers' names; `none` -> [].

    Raises:
        ArgumentError: a tracker that is not known.
    """
    known = ("tensorboard", "wandb", "trackio")
    names = [] if report_to in ("none", "") else [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in known:
            raise ArgumentError(f"--report_to: {name!r} is not one of {', '.join(known)}, none")
    return names


def identity(args: RunArguments) -> dict[str, Any]:
    """The values that make a run this run: model, data, optimisation and seed. Where it writes, how often it logs,
    and how much one device takes at once may change from one start to the next."""
    return saved_identity(dataclasses.asdict(args))


def saved_identity(before: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run as an earlier version of the flags wrote it: flags it did not know had their defaults."""
    found = {
        item.name: before.get(item.name, item.default)
        for item in dataclasses.fields(RunArguments)
        if not item.metadata["same_run"]
    }
    found["split_seed"] = before.get("split_seed", before.get("seed", 0))  # there was one seed for both
    if not found["streaming"]:
        found["shuffle_buffer_size"] = None  # it is not used
    return found


def without_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags as they may be published: of a local path only its last name."""
    named = ("output_dir", "model_name_or_path", "dataset_name", "subset_classes", "resume_from_checkpoint")

    def public(name: str, value: Any) -> Any:
        is_path = name in named and isinstance(value, str) and (os.path.exists(value) or os.path.isabs(value))
        return Path(value).name if is_path else value

    return {name: public(name, value) for name, value in flags.items()}


def write_run_config(args: RunArguments, resolved: dict[str, Any], path: Path) -> None:
    """Writes run_config.yaml: the flags, and what was derived from them (ignored when the file is read again)."""
    content = {**dataclasses.asdict(args), "resolved": resolved}
    temporary = path.with_suffix(".yaml.tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    temporary.replace(path)
