"""The parts of a run, each made from its flags: accelerator, data, preprocessing, batches, optimizer, evaluation.

runner.py puts them together for training, `vit-hf evaluate` for evaluation.
"""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import datasets
import torch
import transformers

from vit_hf.arguments import (
    RandomCrop,
    RunArguments,
    parse_channels,
    parse_num_workers,
    parse_randaugment,
    parse_random_crop,
    trackers,
)
from vit_hf.data.augment.mixing import Mixing
from vit_hf.data.augment.pipeline import Augment, normalise
from vit_hf.data.augment.policies import OP_SETS, make_policies
from vit_hf.data.cache import sampled_sizes
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, eval_batches, train_batches
from vit_hf.data.order import StepPlan
from vit_hf.data.preprocessing import Preprocessing, choose_preprocessing
from vit_hf.data.rows.interface import Rows
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.names import ImageSplits
from vit_hf.data.sets.subset import SubsetRule, parse_subset_classes
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation.evaluate import evaluate_model
from vit_hf.training import state as training_state
from vit_hf.training.accelerator import build_accelerator
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import BatchPlan, Schedule
from vit_hf.training.state import TrainState
from vit_hf.training.waiting import machine_first, main_process_first


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


def image_sizes_of(rows: Rows, accelerator: accelerate.Accelerator) -> list[tuple[int, int]]:
    """(height, width) of some images, the same on all processes: the main process looks; a user's error there ends all
    alike."""
    return main_process_first(accelerator, functools.partial(sampled_sizes, rows), "looking at the images' sizes")


def splits_loader(args: Any) -> Callable[..., ImageSplits]:
    """`load_image_splits` with the flags of a set and its subset."""
    subset = SubsetRule(
        fraction=args.subset_fraction,
        per_class=args.subset_per_class,
        classes=parse_subset_classes(args.subset_classes) if args.subset_classes else None,
        seed=args.subset_seed,
    )
    names = ("dataset_config_name", "image_column_name", "label_column_name", "train_split", "eval_split")
    names += ("max_train_samples", "max_eval_samples", "split_seed")
    flags = {name: getattr(args, name) for name in names}
    return functools.partial(load_image_splits, args.dataset_name, subset=subset, **flags)


def load_splits(args: RunArguments, accelerator: accelerate.Accelerator) -> ImageSplits:
    """The two splits, on every process; the main process downloads, scans or generates, and the others open what it
    has made."""

    def load() -> ImageSplits:  # where each row comes from is known by its subset_hash; the columns would travel along
        splits = splits_loader(args)(streaming=args.streaming)
        return dataclasses.replace(splits, train_origin=None, eval_origin=None)

    splits = main_process_first(accelerator, load, f"loading {args.dataset_name}")
    for note in splits.notes:
        accelerator.print(f"note: {note}")
    return splits


def make_preprocessing(
    args: Any,
    image_size: int | list[int],
    own: Preprocessing | None,
    sizes_of_images: Callable[[], list[tuple[int, int]]],
) -> Preprocessing:
    """How an image becomes the model's input: `choose_preprocessing` with the flags.

    Args:
        image_size: the model's.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    crop = parse_random_crop(getattr(args, "random_crop", "none"))
    if crop.kind in ("padding", "simple") and crop.amount >= min(height, width):
        raise ArgumentError(
            f"--random_crop: a padding of {crop.amount:g} is not below the image's side of {min(height, width)} pixels"
        )
    return choose_preprocessing(
        (height, width),
        own,
        sizes_of_images,
        interpolation=args.interpolation,
        crop_pct=args.crop_pct,
        eval_resize=args.eval_resize,
        image_mean=parse_channels("image_mean", getattr(args, "image_mean", None)),
        image_std=parse_channels("image_std", getattr(args, "image_std", None)),
    )


def prepare(
    args: RunArguments, accelerator: accelerate.Accelerator, model: transformers.PreTrainedModel, plan: BatchPlan
) -> TrainState:
    """Model and optimizer on the device, behind DDP or DeepSpeed where the launch says so."""
    return training_state.prepare(
        accelerator,
        model,
        plan,
        optimizer=OptimizerSettings(
            optim=args.optim,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            momentum=args.momentum,
        ),
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay,
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile=args.torch_compile,
    )


def loading_settings(args: Any) -> LoadingSettings:
    """How images come to the device."""
    return LoadingSettings(
        num_workers=parse_num_workers(args.dataloader_num_workers),
        keep_decoded=getattr(args, "decoded_cache", "never") == "auto",
        keep_on_device=getattr(args, "data_on_device", "never") == "auto",
        on_bad_image=args.on_bad_image,
        shuffle_buffer_size=getattr(args, "shuffle_buffer_size", 0),
        aug_repeats=getattr(args, "aug_repeats", 1),
        class_balanced=getattr(args, "class_balanced", False),
        eval_batch_size=args.per_device_eval_batch_size,
    )


def make_train_batches(
    args: RunArguments,
    rows: Rows,
    preprocessing: Preprocessing,
    plan: BatchPlan,
    schedule: Schedule,
    first_step: int,
    accelerator: accelerate.Accelerator,
    faults: Faults,
) -> tuple[DeviceBatches, RandomCrop]:
    """The micro-batches of this process from `first_step` on, and the crop that is left to the device."""
    make = functools.partial(
        train_batches,
        rows,
        preprocessing,
        StepPlan(
            seed=args.seed,
            first_step=first_step,
            total_steps=schedule.total_steps,
            num_processes=accelerator.num_processes,
            rank=accelerator.process_index,
            micro_batch_size=plan.micro_batch_size,
            accumulation=plan.accumulation,
        ),
        accelerator.device,
        loading_settings(args),
        faults,
        crop=parse_random_crop(args.random_crop),
        say=accelerator.print,
    )
    return machine_first(accelerator, make, "decoding the training images")


def make_augment(
    args: RunArguments,
    preprocessing: Preprocessing,
    num_classes: int,
    device: torch.device,
    crop: RandomCrop,
    first_step_of: Callable[[int], int],
) -> Augment:
    """The device side of the training transforms; `crop` is what is left to it, `first_step_of` an epoch is where mixing
    may end."""
    randaugment = parse_randaugment(args.randaugment)
    fill = OP_SETS[randaugment["ops"]].fill if randaugment else 0
    return Augment(
        seed=args.seed,
        num_classes=num_classes,
        mean=preprocessing.image_mean,
        std=preprocessing.image_std,
        device=device,
        crop=crop,
        bicubic_crops=preprocessing.bicubic_crops,
        flip=args.random_flip,
        policies=make_policies(
            randaugment=randaugment,
            trivial=args.trivial_augment,
            three=args.three_augment,
            jitter=args.color_jitter,
        ),
        fill=tuple(round(255 * mean) for mean in preprocessing.image_mean) if fill is None else fill,
        erasing=args.random_erasing,
        erasing_mode=args.random_erasing_mode,
        mixing=Mixing(
            mixup_alpha=args.mixup_alpha,
            cutmix_alpha=args.cutmix_alpha,
            mode=args.mixup_mode,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            off_step=first_step_of(args.mixup_off_epoch) if args.mixup_off_epoch else None,
        ),
        label_smoothing=args.label_smoothing_factor,
    )


def make_evaluate(
    args: Any,
    engine: torch.nn.Module,
    rows: Rows,
    preprocessing: Preprocessing,
    accelerator: accelerate.Accelerator,
    faults: Faults,
    class_index: list[int] | None = None,
    keep: bool = True,
) -> Callable[[], dict[str, float]]:
    """A function that evaluates the model as it then is; `class_index` and `keep` are those of `eval_batches`."""
    make = functools.partial(
        eval_batches,
        rows,
        preprocessing,
        accelerator.device,
        loading_settings(args),
        faults,
        num_processes=accelerator.num_processes,
        rank=accelerator.process_index,
        class_index=class_index,
        keep=keep,
        say=accelerator.print,
    )
    batches = machine_first(accelerator, make, "decoding the evaluation images")
    mean = torch.tensor(preprocessing.image_mean, device=accelerator.device)
    std = torch.tensor(preprocessing.image_std, device=accelerator.device)
    return lambda: evaluate_model(engine, batches, functools.partial(normalise, mean=mean, std=std), accelerator)
