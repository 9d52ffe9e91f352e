"""The course of a training run, top to bottom, which both scripts share; they differ in how the model is made."""

import contextlib
import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
import yaml

import vit_hf
from vit_hf.analysis.curves import learning_curves
from vit_hf.analysis.gallery import figure_drawer
from vit_hf.arguments import RunArguments, identity, saved_identity, write_run_config
from vit_hf.data.faults import DataReport
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.sets.names import ImageSplits
from vit_hf.data.starved import StarvedNote
from vit_hf.errors import UserError
from vit_hf.hub.card import write_card
from vit_hf.hub.export import full_fp32_state_dict, save_model, write_json
from vit_hf.hub.push import find_repository, push
from vit_hf.models.summary import forward_flops
from vit_hf.parts import (
    image_sizes_of,
    load_splits,
    make_augment,
    make_evaluate,
    make_preprocessing,
    make_train_batches,
    model_errors,
    prepare,
    start,
)
from vit_hf.training import checkpoint
from vit_hf.training import manifest as manifests
from vit_hf.training.accelerator import end, zero_stage
from vit_hf.training.checkpoint import Checkpoints
from vit_hf.training.loop import LoopSettings, train
from vit_hf.training.model_folder import files_of
from vit_hf.training.objective import soft_cross_entropy
from vit_hf.training.schedule import BatchPlan, Schedule, make_schedule, plan_batches
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import append_event, peak_flops, peak_memory_bytes, read_jsonl

WRITTEN = (
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "metrics.jsonl",
    "all_results.json",
)
BuildModel = Callable[[RunArguments, list[str]], tuple[transformers.PreTrainedModel, Preprocessing | None]]


def run(args: RunArguments, build_model: BuildModel) -> None:
    """Trains, evaluates and exports one model as `args` say.

    Args:
        build_model: (args, class names) -> model in fp32 on the CPU, and what it says of its images, None: nothing.

    Raises:
        UserError: everything that is the user's to change.
    """
    start_time = time.perf_counter()
    accelerator = start(args)
    output_dir = Path(args.output_dir)
    if args.ema_decay and zero_stage(accelerator):
        raise UserError(
            "--ema_decay does not work with DeepSpeed ZeRO, which splits the fp32 weights; use ddp, or drop the flag"
        )
    if args.log_figures_steps and zero_stage(accelerator) == 3:
        raise UserError(
            "--log_figures_steps does not work with DeepSpeed ZeRO stage 3, which leaves no process the whole model; use "
            "stage 1 or 2, or drop the flag and draw the finished model: vit-hf figures"
        )
    if is_finished(args, output_dir):
        accelerator.print(
            f"{output_dir} holds this run, finished; nothing to do (a new run needs another --output_dir)"
        )
        if args.push_to_hub and accelerator.is_main_process:
            push_folder(args, output_dir, find_repository(args.hub_model_id, output_dir)[0])
        return

    splits = load_splits(args, accelerator)
    train_rows, eval_rows = splits.rows("train"), splits.rows("eval")
    torch.manual_seed(args.seed)  # the same initial weights on every process
    with model_errors(args):
        model, own = build_model(args, splits.class_names)
        if model.config.num_channels != 3:
            raise ValueError(f"num_channels is {model.config.num_channels}, and images are read as RGB: allowed is 3")
    preprocessing = make_preprocessing(
        args, model.config.image_size, own, functools.partial(image_sizes_of, train_rows, accelerator)
    )
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
    resolved = resolve(accelerator, splits, model, preprocessing, plan, schedule)
    describe(args, accelerator, resolved, plan, schedule)
    if args.dry_run:
        accelerator.print("dry run: nothing was trained")
        return

    name = output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        name, warning = find_repository(args.hub_model_id, output_dir)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    resume_from, manifest = open_folder(args, accelerator, resolved, output_dir)
    accelerator.init_trackers("vit_hf", config={k: v for k, v in identity(args).items() if v is not None})
    form = files_of(accelerator, model, preprocessing.image_processor())
    state = prepare(args, accelerator, model, plan)
    record = {"run": identity(args), "exactness": exactness(args, accelerator, plan)}
    if resume_from is not None:
        resume(state, form, resume_from, manifest, record["exactness"], output_dir)
        start_time -= manifest["wall_time_seconds"]

    flops_per_image = training_flops_per_image(model.config)
    draw = None
    if args.log_figures_steps and accelerator.is_main_process:
        draw = figure_drawer(state.model, splits.eval, preprocessing, output_dir / "figures")
    report = DataReport(
        accelerator,
        args.on_bad_image,
        read_jsonl(output_dir / "events.jsonl"),
        functools.partial(append_event, output_dir),
    )
    batches, crop = make_train_batches(
        args, train_rows, preprocessing, plan, schedule, manifest.get("step", 0), accelerator, report.train
    )
    starved = StarvedNote(
        None if batches.batches.decoded is not None else batches.loader.num_workers,
        accelerator.num_processes,
        say=accelerator.print,
        record=functools.partial(append_event, output_dir) if accelerator.is_main_process else None,
    )

    def extra_metrics(speed: dict[str, float]) -> dict[str, int]:
        starved.look(speed["images_per_second"], speed["data_wait_fraction"])
        return report.collect()

    stream = iter(batches)
    try:
        train(
            state,
            stream,
            plan=plan,
            schedule=schedule,
            settings=LoopSettings(
                output_dir=output_dir,
                record=record,
                start_time=start_time,
                seed=args.seed,
                max_grad_norm=args.max_grad_norm,
                logging_steps=args.logging_steps,
                eval_steps=args.eval_steps,
                save_steps=args.save_steps,
                checkpoints=Checkpoints(
                    state, form, output_dir, total_limit=args.save_total_limit, timeout_seconds=args.ddp_timeout
                ),
                log_figures_steps=args.log_figures_steps,
            ),
            augment=make_augment(
                args,
                preprocessing,
                len(splits.class_names),
                accelerator.device,
                crop,
                schedule.first_step_of,
            ),
            objective=soft_cross_entropy,
            evaluate=make_evaluate(args, state.engine, eval_rows, preprocessing, accelerator, report.eval),
            extra_metrics=extra_metrics,
            mfu_scale=mfu_scale(accelerator, flops_per_image),
            training_flops_per_image=flops_per_image,
            draw=draw,
            first_step=manifest.get("step", 0),
        )
    finally:
        stream.close()
    export(args, state, preprocessing, resolved, report.collect(), name, start_time)


def check_same_run(args: RunArguments, folder: Path, before: dict[str, Any]) -> None:
    """Raises UserError, with the values that differ, where a folder belongs to another run."""
    then, now = saved_identity(before), identity(args)
    differ = [f"--{name} {then[name]} there, {now[name]} now" for name in now if then[name] != now[name]]
    if differ:
        raise UserError(
            f"{folder} belongs to another run ({'; '.join(differ[:5])}); choose another --output_dir, or remove it"
        )


def is_finished(args: RunArguments, output_dir: Path) -> bool:
    """Whether the folder holds this very run, exported. Raises UserError where it holds another one, or is a file."""
    config = output_dir / "run_config.yaml"
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir: {output_dir} is a file; name a folder")
    foreign = [name for name in WRITTEN if not config.exists() and (output_dir / name).exists()]
    if foreign:
        raise UserError(
            f"--output_dir: {output_dir} holds {', '.join(foreign)} of something else, which the run would overwrite; "
            "name another folder"
        )
    if not (output_dir / "all_results.json").exists():
        return False
    check_same_run(args, output_dir, yaml.safe_load(config.read_text()) or {})
    return args.resume_from_checkpoint == "auto"


def open_folder(
    args: RunArguments, accelerator: accelerate.Accelerator, resolved: dict[str, Any], output_dir: Path
) -> tuple[Path | None, dict[str, Any]]:
    """Makes the output folder this run's, and finds the checkpoint to go on from with its manifest ({}: none).

    Raises:
        UserError: the folder holds another run's checkpoints, or a checkpoint asked for cannot be used.
    """
    folder, manifest, passed_over = manifests.find_together(accelerator, output_dir, args.resume_from_checkpoint)
    if manifest:
        check_same_run(args, folder, manifest["run"])
    accelerator.wait_for_everyone()  # all have looked at the folder before it changes
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "all_results.json").unlink(missing_ok=True)  # it says that a run is finished
        write_run_config(args, resolved, output_dir / "run_config.yaml")
        later = manifests.later_than(output_dir, manifest["step"]) if manifest else []
        reasons = {str(path): "later than the checkpoint asked for" for path in later} | passed_over
        for path, reason in reasons.items():
            aside = manifests.move_aside(Path(path))
            print(f"passing over {path}: {reason}; moved to {aside.name}")
            append_event(output_dir, "checkpoint_passed_over", folder=path, reason=reason, moved_to=aside.name)
        manifests.remove_unfinished(output_dir)
    accelerator.wait_for_everyone()
    return folder, manifest


def exactness(args: RunArguments, accelerator: accelerate.Accelerator, plan: BatchPlan) -> dict[str, Any]:
    """What must be the same for a resume that continues to the bit."""
    return {
        "num_processes": accelerator.num_processes,
        "zero_stage": zero_stage(accelerator),
        "mixed_precision": accelerator.mixed_precision,
        "micro_batch_size": plan.micro_batch_size,
        "device": accelerator.device.type,
        "vit_hf": vit_hf.__version__,
        "torch": torch.__version__,
        "torch_compile": args.torch_compile,
    }


def resume(
    state: TrainState, form, folder: Path, manifest: dict[str, Any], now: dict[str, Any], output_dir: Path
) -> None:
    """Loads a checkpoint, and says and records whether it continues to the bit."""
    checkpoint.load(state, form, folder, manifest)
    then = manifest["exactness"]
    changed = [f"{key} {then.get(key)} then, {value} now" for key, value in now.items() if then.get(key) != value]
    state.accelerator.print(
        f"resuming from {folder}, " + (f"not to the bit: {'; '.join(changed)}" if changed else "exactly")
    )
    if state.accelerator.is_main_process:
        append_event(output_dir, "resume", folder=str(folder), step=manifest["step"], exact=not changed, why=changed)


def training_flops_per_image(config: transformers.PreTrainedConfig) -> float:
    """Operations of one image's forward and backward pass: 3 x those of the forward pass; what gradient checkpointing
    computes again is not counted. Source: arXiv 2204.02311, appendix B."""
    return 3.0 * forward_flops(config)


def mfu_scale(accelerator: accelerate.Accelerator, flops_per_image: float) -> float | None:
    """Model FLOPs utilisation for each image a second: an image's operations over the peak of all devices; None where
    no peak is known. Source: arXiv 2204.02311, appendix B."""
    if accelerator.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device), accelerator.mixed_precision)
    return None if peak is None else flops_per_image / (peak * accelerator.num_processes)


def resolve(
    accelerator: accelerate.Accelerator,
    splits: ImageSplits,
    model: transformers.PreTrainedModel,
    preprocessing: Preprocessing,
    plan: BatchPlan,
    schedule: Schedule,
) -> dict[str, Any]:
    """The values that follow from the flags, for run_config.yaml and the card."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "train_split": splits.train_split,
        "eval_split": splits.eval_split,
        "train_samples": len(splits.train),
        "eval_samples": len(splits.eval),
        "num_classes": len(splits.class_names),
        "subset": splits.subset or None,
        "subset_hash": splits.subset.get("subset_hash"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": list(preprocessing.image_size),
        "eval_resize": preprocessing.eval_resize,
        "resized_to": preprocessing.resized_to,
        "interpolation": preprocessing.interpolation,
        "preprocessing": str(preprocessing),
        "image_mean": list(preprocessing.image_mean),
        "image_std": list(preprocessing.image_std),
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "num_processes": plan.num_processes,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation,
        "mixed_precision": accelerator.mixed_precision,
        "zero_stage": zero_stage(accelerator),
        "device": f"{plan.num_processes} x {name}" if device.type == "cuda" else name,
        "versions": {
            "vit_hf": vit_hf.__version__,
            "python": platform.python_version(),
            **{package.__name__: str(package.__version__) for package in (torch, transformers, accelerate, datasets)},
        },
    }


def describe(
    args: RunArguments,
    accelerator: accelerate.Accelerator,
    resolved: dict[str, Any],
    plan: BatchPlan,
    schedule: Schedule,
) -> None:
    """Prints what will be run."""
    accelerator.print(
        f"model: {args.preset or args.model_name_or_path}, "
        f"from {'random' if args.preset else 'its'} weights, {resolved['num_parameters'] / 1e6:.2f} M parameters, "
        f"{resolved['num_classes']} classes, {'x'.join(map(str, resolved['image_size']))} pixels\n"
        f"data: {args.dataset_name}, {resolved['train_samples']} training images ({resolved['train_split']}), "
        f"{resolved['eval_samples']} evaluation images ({resolved['eval_split']})\n"
        f"preprocessing: {resolved['preprocessing']}\n"
        f"plan: {plan}; {schedule.total_steps} steps, {schedule.warmup_steps} of warm-up, "
        f"{schedule.epochs_after(schedule.total_steps):.1f} epochs\n"
        f"on: {resolved['device']}, mixed precision {accelerator.mixed_precision}, ZeRO stage {resolved['zero_stage']}"
    )


def export(
    args: RunArguments,
    state: TrainState,
    preprocessing: Preprocessing,
    resolved: dict[str, Any],
    counted: dict[str, int],
    name: str,
    start_time: float,
) -> None:
    """Makes the output folder a model repository called `name`, and pushes it where that is asked for."""
    accelerator, output_dir = state.accelerator, Path(args.output_dir)
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
        print(
            f"done: accuracy {results['eval_accuracy']:.4f} on {results['eval_samples']} images "
            f"({resolved['eval_split']}); {output_dir}"
            + (f"; {counted['bad_images']} bad images skipped" if counted.get("bad_images") else "")
        )
        if args.push_to_hub:
            push_folder(args, output_dir, name)
    end(accelerator)


def push_folder(args: RunArguments, output_dir: Path, name: str) -> None:
    """Uploads a finished folder and says where it is."""
    print(f"pushed to {push(output_dir, name, args.hub_private_repo)}")
