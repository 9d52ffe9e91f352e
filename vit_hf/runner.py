"""The course of a training run, top to bottom, which both scripts share; they differ in how the model is made."""

import contextlib
import functools
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
import yaml

import vit_hf
from vit_hf.analysis.figures import learning_curves
from vit_hf.arguments import (
    ArgumentError,
    RunArguments,
    UserError,
    identity,
    identity_hash,
    parse_channels,
    parse_random_crop,
    trackers,
    write_run_config,
)
from vit_hf.data.augment import Augment, normalise
from vit_hf.data.decode import Preprocessing
from vit_hf.data.loader import EvalPlaces, ImageBatches, TrainPlaces, device_batches
from vit_hf.data.sources import ImageSplits, load_image_splits
from vit_hf.data.subset import SubsetRule, parse_subset_classes
from vit_hf.evaluation.evaluate import evaluate_model
from vit_hf.hub.card import write_card
from vit_hf.hub.export import full_fp32_state_dict, save_model, write_json
from vit_hf.hub.push import find_repository, push
from vit_hf.training import checkpoint
from vit_hf.training.accelerator import apply_batch_plan, build_accelerator, zero_stage
from vit_hf.training.checkpoint import TrainState
from vit_hf.training.ema import EMA
from vit_hf.training.loop import LoopSettings, train
from vit_hf.training.objective import soft_cross_entropy
from vit_hf.training.optimizer import make_optimizer, parameter_groups
from vit_hf.training.schedule import BatchPlan, Schedule, make_schedule, plan_batches
from vit_hf.training.tracking import append_event, peak_memory_bytes, read_jsonl

Normalisation = tuple[list[float], list[float]]  # mean and standard deviation of each channel
BuildModel = Callable[[RunArguments, list[str]], tuple[transformers.PreTrainedModel, Normalisation]]


def run(args: RunArguments, build_model: BuildModel) -> None:
    """Trains, evaluates and exports one model as `args` say.

    Args:
        build_model: (args, class names) -> model in fp32 on the CPU, and the mean and std it wants.

    Raises:
        UserError: everything that is the user's to change.
    """
    start_time = time.perf_counter()
    accelerator = start(args)
    say = accelerator.print
    output_dir = Path(args.output_dir)
    if is_finished(args, output_dir):
        say(f"{output_dir} holds this run, finished; nothing to do (a new run needs another --output_dir)")
        return

    splits = load_splits(args, accelerator)
    torch.manual_seed(args.seed)  # the same initial weights on every process
    with model_errors(args):
        model, (mean, std) = build_model(args, splits.class_names)
    preprocessing = make_preprocessing(args, model.config, mean, std)
    plan = plan_batches(args.global_batch_size, accelerator.num_processes, args.per_device_train_batch_size)
    schedule = make_schedule(
        num_samples=len(splits.train),
        global_batch_size=args.global_batch_size,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        warmup_ratio=args.warmup_ratio,
        learning_rate=args.learning_rate,
        kind=args.lr_scheduler_type,
    )
    resolved = resolve(args, accelerator, splits, model, preprocessing, plan, schedule)
    say(
        f"model: {args.preset or args.model_name_or_path}, {resolved['num_parameters'] / 1e6:.1f} M parameters, "
        f"{len(splits.class_names)} classes\n"
        f"data: {args.dataset_name}, {len(splits.train)} training images ({splits.train_split}), "
        f"{len(splits.eval)} evaluation images ({splits.eval_split})\n"
        f"plan: {plan}; {schedule.total_steps} steps, {schedule.warmup_steps} of warm-up, "
        f"{schedule.epochs_after(schedule.total_steps):.1f} epochs; {resolved['device']}, "
        f"{accelerator.mixed_precision} mixed precision, ZeRO stage {resolved['zero_stage']}"
    )
    if args.dry_run:
        say("dry run: nothing was trained")
        return
    name = output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        name, warning = find_repository(args.hub_model_id, output_dir)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)

    resume_from, manifest, passed_over = find_checkpoint(args, output_dir)
    accelerator.wait_for_everyone()  # all have looked at the folder before it changes
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_run_config(args, resolved, output_dir / "run_config.yaml")
        for folder, reason in passed_over.items():
            say(f"passing over {folder}: {reason}")
            append_event(output_dir, "checkpoint_passed_over", folder=folder, reason=reason)
    accelerator.init_trackers("vit_hf", config={k: v for k, v in identity(args).items() if v is not None})

    state = prepare(args, accelerator, model, plan)
    first_step = manifest.get("step", 0)
    if resume_from is not None:
        inexact = checkpoint.load(state, resume_from, manifest)
        say(f"resuming from {resume_from}, " + (f"not to the bit: {'; '.join(inexact)}" if inexact else "exactly"))
        if accelerator.is_main_process:
            append_event(
                output_dir, "resume", folder=str(resume_from), step=first_step, exact=not inexact, why=inexact
            )

    bad: dict[str, dict[int, str]] = {"train": {}, "eval": {}}
    train_batches = ImageBatches(
        splits.train,
        preprocessing,
        seed=args.seed,
        crop_scale=parse_random_crop(args.random_crop)[1] if args.random_crop.startswith("scale") else None,
        on_bad_image=args.on_bad_image,
        training=True,
    )
    train(
        state,
        device_batches(
            train_batches,
            TrainPlaces(
                num_samples=len(splits.train),
                seed=args.seed,
                first_step=first_step,
                total_steps=schedule.total_steps,
                num_processes=accelerator.num_processes,
                rank=accelerator.process_index,
                micro_batch_size=plan.micro_batch_size,
                accumulation=plan.accumulation,
            ),
            accelerator.device,
            args.dataloader_num_workers,
            bad["train"],
        ),
        plan=plan,
        schedule=schedule,
        settings=LoopSettings(
            output_dir=output_dir,
            run=identity(args),
            seed=args.seed,
            max_grad_norm=args.max_grad_norm,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            save_total_limit=args.save_total_limit,
        ),
        augment=make_augment(args, preprocessing, len(splits.class_names), accelerator, train_batches.crops_on_device),
        objective=soft_cross_entropy,
        evaluate=make_evaluate(args, state.engine, splits.eval, preprocessing, accelerator, bad["eval"]),
        extra_metrics=functools.partial(count_bad, args, accelerator, bad),
        first_step=first_step,
    )
    export(args, accelerator, state, preprocessing, resolved, count_bad(args, accelerator, bad), name, start_time)


def start(args: Any) -> accelerate.Accelerator:
    """The Accelerator, and libraries that keep quiet on all but the main process."""
    log_with = trackers(getattr(args, "report_to", "none"))
    for name in log_with:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: the package is not installed; pip install 'vit_hf[{name}]'")
    accelerator = build_accelerator(args.ddp_timeout, log_with, args.output_dir)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    return accelerator


def is_finished(args: RunArguments, output_dir: Path) -> bool:
    """Whether the folder holds this very run, exported. Raises UserError where it holds another one."""
    config = output_dir / "run_config.yaml"
    if not (output_dir / "all_results.json").exists() or not config.exists():
        return False
    before = yaml.safe_load(config.read_text())
    if before["resolved"]["run_hash"] != identity_hash(args):
        raise another_run(args, output_dir, before)
    return args.resume_from_checkpoint == "auto"


def find_checkpoint(args: RunArguments, output_dir: Path) -> tuple[Path | None, dict[str, Any], dict[str, str]]:
    """As checkpoint.find; raises UserError where the checkpoint is another run's."""
    folder, manifest, passed_over = checkpoint.find(output_dir, args.resume_from_checkpoint)
    if manifest and manifest["run"] != identity(args):
        raise another_run(args, folder, manifest["run"])
    return folder, manifest, passed_over


def another_run(args: RunArguments, folder: Path, before: dict[str, Any]) -> UserError:
    """The error for a folder in use, with the values that differ."""
    now = identity(args)
    differ = [f"--{name} {before.get(name)} there, {now[name]} now" for name in now if before.get(name) != now[name]]
    return UserError(
        f"{folder} belongs to another run ({'; '.join(differ[:5])}); choose another --output_dir, or remove it"
    )


@contextlib.contextmanager
def model_errors(args: Any) -> Iterator[None]:
    """Turns what models and transformers raise for a wrong name, field or file into one line."""
    source = getattr(args, "model_name_or_path", None) or getattr(args, "model", None)
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())
        if source is None:
            raise ArgumentError(f"--preset {args.preset}: {reason}") from None
        raise UserError(f"model {source}: {reason}") from None
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"model {source} cannot be loaded: {' '.join(str(error).split())[:400]}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("safetensors", "safetensors_rust", "huggingface_hub", "httpx"):
            raise UserError(f"model {source} cannot be loaded: {' '.join(str(error).split())[:400]}") from None
        raise


def load_splits(args: RunArguments, accelerator: accelerate.Accelerator) -> ImageSplits:
    """The two splits, on every process; the main process downloads or generates first."""
    subset = SubsetRule(
        fraction=args.subset_fraction,
        per_class=args.subset_per_class,
        classes=parse_subset_classes(args.subset_classes) if args.subset_classes else None,
        seed=args.subset_seed,
    )
    with accelerator.main_process_first():
        splits = load_image_splits(
            args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            image_column_name=args.image_column_name,
            label_column_name=args.label_column_name,
            train_split=args.train_split,
            eval_split=args.eval_split,
            subset=subset,
            max_train_samples=args.max_train_samples,
            max_eval_samples=args.max_eval_samples,
            seed=args.seed,
        )
    for note in splits.notes:
        accelerator.print(f"note: {note}")
    return splits


def make_preprocessing(args: RunArguments, config: Any, mean: list[float], std: list[float]) -> Preprocessing:
    """How an image becomes the model's input. ImageNet: the centre of an image whose shorter side is 256/224 of the
    size; all others: a resize of both sides."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    centre_crop = args.dataset_name in ("imagenet-1k", "ILSVRC/imagenet-1k")
    return Preprocessing(
        image_size=(height, width),
        shortest_edge=round(min(height, width) * 256 / 224) if centre_crop else None,
        image_mean=tuple(parse_channels("image_mean", args.image_mean) or mean),
        image_std=tuple(parse_channels("image_std", args.image_std) or std),
    )


def resolve(
    args: RunArguments,
    accelerator: accelerate.Accelerator,
    splits: ImageSplits,
    model: transformers.PreTrainedModel,
    preprocessing: Preprocessing,
    plan: BatchPlan,
    schedule: Schedule,
) -> dict[str, Any]:
    """The values that follow from the flags, for run_config.yaml and the card."""
    stage = zero_stage(accelerator)
    if args.ema_decay and stage:
        raise UserError(
            "--ema_decay does not work with DeepSpeed ZeRO, which splits the fp32 weights; use ddp, or drop the flag"
        )
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "run_hash": identity_hash(args),
        "train_split": splits.train_split,
        "eval_split": splits.eval_split,
        "train_samples": len(splits.train),
        "eval_samples": len(splits.eval),
        "num_classes": len(splits.class_names),
        "subset": splits.subset or None,
        "subset_hash": splits.subset.get("subset_hash"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": list(preprocessing.image_size),
        "image_mean": list(preprocessing.image_mean),
        "image_std": list(preprocessing.image_std),
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "num_processes": plan.num_processes,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation,
        "mixed_precision": accelerator.mixed_precision,
        "zero_stage": stage,
        "device": f"{plan.num_processes} x {name}" if device.type == "cuda" else name,
        "versions": {
            "vit_hf": vit_hf.__version__,
            "python": platform.python_version(),
            **{package.__name__: str(package.__version__) for package in (torch, transformers, accelerate, datasets)},
        },
    }


def prepare(
    args: RunArguments, accelerator: accelerate.Accelerator, model: transformers.PreTrainedModel, plan: BatchPlan
) -> TrainState:
    """Model and optimizer on the device, behind DDP or DeepSpeed where the launch says so."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.torch_compile:
        model.compile()  # in place: names in the state dict stay
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


def make_augment(
    args: RunArguments,
    preprocessing: Preprocessing,
    num_classes: int,
    accelerator: accelerate.Accelerator,
    crops_on_device: bool,
) -> Augment:
    """The device side of the training transforms."""
    crop = parse_random_crop(args.random_crop)
    return Augment(
        seed=args.seed,
        num_classes=num_classes,
        mean=preprocessing.image_mean,
        std=preprocessing.image_std,
        device=accelerator.device,
        crop=crop if crop[0] != "scale" or crops_on_device else ("none", 0.0),
        flip=args.random_flip,
        mixup_alpha=args.mixup_alpha,
        cutmix_alpha=args.cutmix_alpha,
        label_smoothing=args.label_smoothing_factor,
    )


def make_evaluate(
    args: Any,
    engine: torch.nn.Module,
    split: datasets.Dataset,
    preprocessing: Preprocessing,
    accelerator: accelerate.Accelerator,
    bad: dict[int, str],
    class_index: list[int] | None = None,
) -> Callable[[], dict[str, float]]:
    """A function that evaluates the model as it then is; decoding that can be kept is done once.

    Args:
        class_index: the model's index of each class of the dataset, where they differ.
    """
    batches = ImageBatches(split, preprocessing, on_bad_image=args.on_bad_image, class_index=class_index)
    mean = torch.tensor(preprocessing.image_mean, device=accelerator.device)
    std = torch.tensor(preprocessing.image_std, device=accelerator.device)
    places = EvalPlaces(
        num_samples=len(batches),
        num_processes=accelerator.num_processes,
        rank=accelerator.process_index,
        batch_size=args.per_device_eval_batch_size,
    )

    def evaluate() -> dict[str, float]:
        moved = device_batches(batches, places, accelerator.device, args.dataloader_num_workers, bad)
        return evaluate_model(engine, moved, functools.partial(normalise, mean=mean, std=std), accelerator)

    return evaluate


def export(
    args: RunArguments,
    accelerator: accelerate.Accelerator,
    state: TrainState,
    preprocessing: Preprocessing,
    resolved: dict[str, Any],
    counted: dict[str, int],
    name: str,
    start_time: float,
) -> None:
    """Makes the output folder a model repository, and pushes it where that is asked for."""
    output_dir = Path(args.output_dir)
    with state.ema.in_place() if state.ema is not None else contextlib.nullcontext():
        state_dict = full_fp32_state_dict(state.model, zero_stage(accelerator))
    if accelerator.is_main_process:
        save_model(state.model, state_dict, preprocessing.image_processor(), output_dir)
        lines = read_jsonl(output_dir / "metrics.jsonl")
        learning_curves({output_dir.name: lines}).savefig(output_dir / "learning_curves.png", dpi=120)
        results = {key: value for line in lines for key, value in line.items()}  # the last of each kind
        results |= {key: resolved[key] for key in ("train_samples", "num_parameters", "versions")} | counted
        results["peak_memory_bytes"] = peak_memory_bytes(accelerator.device)
        results["wall_time_seconds"] = round(time.perf_counter() - start_time, 2)
        write_card(output_dir, name, args, resolved, results, state.model.config)
        write_json(results, output_dir / "all_results.json")  # last: its presence says that the folder is complete
        accelerator.print(
            f"done: accuracy {results['eval_accuracy']:.4f} on {results['eval_samples']} images "
            f"({resolved['eval_split']}); {output_dir}"
        )
        if args.push_to_hub:
            accelerator.print(f"pushed to {push(output_dir, name, args.hub_private_repo)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # closes the trackers and the process group


def count_bad(args: Any, accelerator: accelerate.Accelerator, bad: dict[str, dict[int, str]]) -> dict[str, int]:
    """{"bad_images": distinct rows of both splits that were left out}, over all processes; {} where none may be."""
    if args.on_bad_image == "raise":
        return {}
    rows = [(split, row) for split, found in bad.items() for row in found]
    return {"bad_images": len(set(accelerate.utils.gather_object(rows)))}
