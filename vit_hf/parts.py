"""The parts of a run, each made from its flags: accelerator, data, preprocessing, batches, optimizer, evaluation.

runner.py puts them together for training, `vit-hf evaluate` for evaluation.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import datasets
import numpy as np
import torch
import transformers

from vit_hf.arguments import (
    RunArguments,
    parse_channels,
    parse_num_workers,
    parse_randaugment,
    parse_random_crop,
    trackers,
)
from vit_hf.data.augment import Augment, normalise
from vit_hf.data.cache import decoded, worth_decoding
from vit_hf.data.decode import Preprocessing
from vit_hf.data.keys import epoch_order
from vit_hf.data.loader import DeviceBatches, EvalPlaces, Faults, ImageBatches, Places, TrainPlaces
from vit_hf.data.policies import OP_SETS, color_jitter, rand_augment, three_augment, trivial_augment
from vit_hf.data.rows import Rows, TableRows
from vit_hf.data.sources import HUB_SETS, ImageSplits, load_image_splits, named_source
from vit_hf.data.streams import ParquetRows, StreamPlaces
from vit_hf.data.subset import SubsetRule, parse_subset_classes
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation.evaluate import evaluate_model
from vit_hf.training.accelerator import apply_batch_plan, build_accelerator
from vit_hf.training.checkpoint import TrainState
from vit_hf.training.ema import EMA
from vit_hf.training.optimizer import make_optimizer, parameter_groups
from vit_hf.training.schedule import BatchPlan, Schedule
from vit_hf.training.tracking import append_event, read_jsonl

T = TypeVar("T")


def start(args: Any) -> accelerate.Accelerator:
    """The Accelerator, and libraries that keep quiet on all but the main process."""
    log_with = trackers(getattr(args, "report_to", "none"))
    for name in log_with:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: the package is not installed; pip install -e '.[{name}]'")
    accelerator = build_accelerator(args.ddp_timeout, log_with, args.output_dir)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    return accelerator


@contextlib.contextmanager
def model_errors(args: Any) -> Iterator[None]:
    """Turns what models and transformers raise for a wrong name, field or file into one line."""
    source = getattr(args, "model_name_or_path", None) or getattr(args, "model", None)
    where = f"model {source}" if source else f"--preset {args.preset}"
    try:
        yield
    except ValueError as error:
        kind = UserError if source else ArgumentError  # a preset is known from the flags alone
        raise kind(f"{where}: {' '.join(str(error).split())}") from None
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{where} cannot be loaded: {' '.join(str(error).split())[:400]}") from None
    except Exception as error:
        if type(error).__module__.startswith(("safetensors", "huggingface_hub", "httpx")):
            raise UserError(f"{where} cannot be loaded: {' '.join(str(error).split())[:400]}") from None
        raise


def main_process_first(accelerator: accelerate.Accelerator, function: Callable[[], T]) -> T:
    """Calls a function on the main process, then on the others, which find its caches. A user's error on the main
    process ends all of them alike, instead of leaving the others to wait for a process that is gone."""
    outcome: list[Any] = [None]
    result = None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as error:
            outcome = [error.with_traceback(None)]
    error = accelerate.utils.broadcast_object_list(outcome)[0]
    if error is not None:
        raise error
    return result if accelerator.is_main_process else function()


def splits_loader(args: Any) -> Callable[..., ImageSplits]:
    """`load_image_splits` with the flags of a set and its subset."""
    subset = SubsetRule(
        fraction=args.subset_fraction,
        per_class=args.subset_per_class,
        classes=parse_subset_classes(args.subset_classes) if args.subset_classes else None,
        seed=args.subset_seed,
    )
    names = ("dataset_config_name", "image_column_name", "label_column_name", "train_split", "eval_split")
    names += ("max_train_samples", "max_eval_samples", "seed")
    flags = {name: getattr(args, name) for name in names}
    return functools.partial(load_image_splits, args.dataset_name, subset=subset, **flags)


def load_splits(args: RunArguments, accelerator: accelerate.Accelerator) -> ImageSplits:
    """The two splits, on every process; the main process downloads or generates first."""
    splits = main_process_first(accelerator, functools.partial(splits_loader(args), streaming=args.streaming))
    for note in splits.notes:
        accelerator.print(f"note: {note}")
    return splits


def make_preprocessing(args: RunArguments, config: Any, mean: list[float], std: list[float]) -> Preprocessing:
    """How an image becomes the model's input. ImageNet: the centre of an image whose shorter side is 256/224 of the
    size; all others: a resize of both sides."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    kind, amount = parse_random_crop(args.random_crop)
    if kind == "padding" and amount >= min(height, width):
        raise ArgumentError(
            f"--random_crop: padding={amount:g} is not below the image's side of {min(height, width)} pixels"
        )
    centre_crop = named_source(args.dataset_name) == HUB_SETS["imagenet-1k"]
    return Preprocessing(
        image_size=(height, width),
        shortest_edge=round(min(height, width) * 256 / 224) if centre_crop else None,
        image_mean=tuple(parse_channels("image_mean", args.image_mean) or mean),
        image_std=tuple(parse_channels("image_std", args.image_std) or std),
    )


def prepare(
    args: RunArguments, accelerator: accelerate.Accelerator, model: transformers.PreTrainedModel, plan: BatchPlan
) -> TrainState:
    """Model and optimizer on the device, behind DDP or DeepSpeed where the launch says so."""
    if args.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"--gradient_checkpointing: {type(model).__name__} has no checkpoints to recompute from")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.torch_compile:
        model.compile()  # in place: names in the state dict stay
    if args.layer_decay < 1 and model.base_model_prefix != "vit":
        raise UserError(f"--layer_decay: {args.layer_decay} is for the layers of a ViT, allowed for this model is 1")
    apply_batch_plan(accelerator, plan, args.max_grad_norm)
    optimizer = make_optimizer(
        parameter_groups(model, weight_decay=args.weight_decay, layer_decay=args.layer_decay),
        optim=args.optim,
        learning_rate=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        momentum=args.momentum,
    )
    engine, optimizer = accelerator.prepare(model, optimizer)
    ema = EMA(model, args.ema_decay) if args.ema_decay else None
    return TrainState(accelerator, model, engine, optimizer, ema)


def workers_per_process(args: Any, accelerator: accelerate.Accelerator) -> int:
    """How many worker processes each process starts where images are decoded as they are needed: what
    --dataloader_num_workers says, or this process's share of the machine's cores, at most 16."""
    asked = parse_num_workers(args.dataloader_num_workers)
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return min(16, max(1, cores // on_this_machine))


def open_batches(
    args: Any,
    split: datasets.Dataset | Rows,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    crop_scale: float | None = None,
    training: bool = False,
    class_index: list[int] | None = None,
    keep: bool = True,
) -> ImageBatches:
    """A split's micro-batches on the host, decoded once where that pays.

    Args:
        crop_scale: smallest share of a random crop, where there is one; a decoded set leaves it to the device.
        keep: False decodes anew each time, for a set that is gone through once.
    """
    pixels = None
    if isinstance(split, datasets.Dataset):
        rows: Rows = TableRows(split, class_index)
        if keep and worth_decoding(rows, preprocessing, crops=crop_scale is not None):
            pixels = decoded(rows, preprocessing)
    else:
        rows = split
        if class_index is not None:
            rows.renumber(class_index)
    batches = ImageBatches(
        rows,
        preprocessing,
        pixels,
        seed=getattr(args, "seed", None) or 0,
        crop_scale=None if pixels is not None else crop_scale,
        on_bad_image=args.on_bad_image,
        training=training,
    )
    if training and args.data_on_device == "auto":  # each process reads a part of an evaluation set alone
        batches.place_on_device(device)
    return batches


def train_batches(
    args: RunArguments,
    split: datasets.Dataset | Rows,
    preprocessing: Preprocessing,
    plan: BatchPlan,
    schedule: Schedule,
    first_step: int,
    accelerator: accelerate.Accelerator,
    faults: Faults,
) -> tuple[Iterator[dict[str, torch.Tensor]], bool]:
    """The micro-batches of this process from `first_step` on, and whether a `scale` crop is left to the device."""
    kind, amount = parse_random_crop(args.random_crop)
    crop_scale = amount if kind == "scale" else None
    batches = open_batches(args, split, preprocessing, accelerator.device, crop_scale=crop_scale, training=True)
    workers = workers_per_process(args, accelerator)
    course = dict(
        seed=args.seed,
        first_step=first_step,
        total_steps=schedule.total_steps,
        num_processes=accelerator.num_processes,
        rank=accelerator.process_index,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.accumulation,
    )
    if isinstance(split, ParquetRows):
        shards = split.shards()
        if args.dataloader_num_workers == "auto":
            workers = max(1, min(workers, len(shards) // accelerator.num_processes))
        split.hold(args.shuffle_buffer_size, workers)
        places = StreamPlaces(shards=shards, num_workers=workers, buffer_size=args.shuffle_buffer_size, **course)
    else:
        places = TrainPlaces(num_samples=len(batches), repeats=args.aug_repeats, **course)
    moved = DeviceBatches(batches, places, accelerator.device, workers, faults)
    if batches.pixels is not None:
        where = "on the device" if batches.on_device is not None else "mapped from the cache"
        accelerator.print(f"images: decoded once, {batches.pixels.nbytes / 1e6:.0f} MB {where}")
    else:
        accelerator.print(f"images: read and decoded batch by batch, {workers} workers a process")
    return iter(moved), batches.pixels is not None


def make_augment(
    args: RunArguments,
    preprocessing: Preprocessing,
    num_classes: int,
    device: torch.device,
    crops_on_device: bool,
) -> Augment:
    """The device side of the training transforms."""
    crop = parse_random_crop(args.random_crop)
    randaugment = parse_randaugment(args.randaugment)
    policies = []
    if randaugment is not None:
        policies.append(functools.partial(rand_augment, **randaugment))
    if args.trivial_augment:
        policies.append(trivial_augment)
    if args.three_augment:
        policies.append(three_augment)
    if args.color_jitter > 0:
        policies.append(functools.partial(color_jitter, strength=args.color_jitter))
    return Augment(
        seed=args.seed,
        num_classes=num_classes,
        mean=preprocessing.image_mean,
        std=preprocessing.image_std,
        device=device,
        crop=crop if crop[0] != "scale" or crops_on_device else ("none", 0.0),
        flip=args.random_flip,
        policies=policies,
        fill=OP_SETS[randaugment["ops"]][2] if randaugment else 0,
        erasing=args.random_erasing,
        mixup_alpha=args.mixup_alpha,
        cutmix_alpha=args.cutmix_alpha,
        mixup_mode=args.mixup_mode,
        label_smoothing=args.label_smoothing_factor,
    )


def make_evaluate(
    args: Any,
    engine: torch.nn.Module,
    split: datasets.Dataset | Rows,
    preprocessing: Preprocessing,
    accelerator: accelerate.Accelerator,
    faults: Faults,
    class_index: list[int] | None = None,
    keep: bool = True,
) -> Callable[[], dict[str, float]]:
    """A function that evaluates the model as it then is; what can be kept decoded is decoded once.

    Args:
        class_index: the model's index of each class of the dataset, where they differ.
        keep: whether it will be evaluated again and again.
    """
    batches = open_batches(args, split, preprocessing, accelerator.device, class_index=class_index, keep=keep)
    mean = torch.tensor(preprocessing.image_mean, device=accelerator.device)
    std = torch.tensor(preprocessing.image_std, device=accelerator.device)
    workers = workers_per_process(args, accelerator)
    places = EvalPlaces(
        num_samples=len(batches),
        num_processes=accelerator.num_processes,
        rank=accelerator.process_index,
        batch_size=args.per_device_eval_batch_size,
        num_workers=workers,
    )
    moved = DeviceBatches(batches, places, accelerator.device, workers, faults)
    return lambda: evaluate_model(engine, moved, functools.partial(normalise, mean=mean, std=std), accelerator)


def show_augmentation(args: Any, splits: ImageSplits, size: Any, images: int = 8, visits: int = 5) -> tuple:
    """Some training images, and what becomes of them in the first epochs.

    Returns:
        originals uint8 (N, H, W, 3); augmented uint8 (N, M, H, W, 3); labels, N class numbers; targets float (N, M, K).
    """
    config = types.SimpleNamespace(image_size=size)
    preprocessing = make_preprocessing(args, config, [0.0] * 3, [1.0] * 3)
    preprocessing = dataclasses.replace(preprocessing, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    kind, amount = parse_random_crop(args.random_crop)
    device = torch.device("cpu")
    crops = kind == "scale"
    rows = splits.train
    if isinstance(rows, datasets.Dataset):
        crops = crops and not worth_decoding(TableRows(rows), preprocessing, crops=True)
    elif isinstance(rows, ParquetRows):
        rows.held_rows = len(rows)  # the few that are shown are read once
    make = functools.partial(open_batches, args, rows, preprocessing, device, training=True, keep=False)
    batches, plain = make(crop_scale=amount if crops else None), make()
    augment = make_augment(args, preprocessing, len(splits.class_names), device, crops_on_device=not crops)
    index = epoch_order(args.seed, 0, len(batches))[:images]

    def take(source: ImageBatches, visit: int) -> dict[str, torch.Tensor]:
        places = Places(np.full_like(index, visit), index, np.ones(len(index), dtype=bool))
        batch = source[places]
        if batch["error"] is not None:
            raise UserError(batch["error"])
        return batch

    first = take(plain, 0)
    augmented, targets = [], []
    for visit in range(visits):
        batch = take(batches, visit)
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
        pixel_values, target = augment(batch, step=visit, micro_step=0, rank=0)
        augmented.append((pixel_values * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
        targets.append(target)
    return (
        first["pixel_values"].numpy(),
        torch.stack(augmented, dim=1).numpy(),
        first["labels"].tolist(),
        torch.stack(targets, dim=1).numpy(),
    )


class DataReport:
    """What went wrong with the data of a run, of all processes: counted in metrics, named once in events.jsonl.

    Args:
        output_dir: of the run; None writes no events.
    """

    def __init__(self, accelerator: accelerate.Accelerator, on_bad_image: str, output_dir: Path | None = None):
        self.accelerator, self.on_bad_image, self.output_dir = accelerator, on_bad_image, output_dir
        self.train, self.eval = Faults(), Faults()
        events = read_jsonl(output_dir / "events.jsonl") if output_dir is not None else []
        self._known = {(e["split"], e["row"]) for e in events if e["event"] == "bad_image"}

    def collect(self) -> dict[str, int]:
        """{"bad_images": distinct rows of both splits that were left out so far}; {} where none may be."""
        retried, self.train.retried, self.eval.retried = self.train.retried + self.eval.retried, [], []
        for reason in retried if self.output_dir is not None and self.output_dir.is_dir() else ():
            append_event(self.output_dir, "retry", why=reason, rank=self.accelerator.process_index)
        if self.on_bad_image == "raise":
            return {}
        mine = [
            (split, row, why)
            for split, faults in (("train", self.train), ("eval", self.eval))
            for row, why in faults.bad.items()
        ]
        for split, row, why in sorted(accelerate.utils.gather_object(mine)):
            if (split, row) not in self._known:
                self._known.add((split, row))
                if self.output_dir is not None and self.accelerator.is_main_process:
                    append_event(self.output_dir, "bad_image", split=split, row=row, why=why)
        return {"bad_images": len(self._known)}
