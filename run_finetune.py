#!/usr/bin/env python
"""Fine-tunes a pretrained Vision Transformer on another set and saves it as a Hub model folder.

    accelerate launch run_finetune.py --config recipes/finetune/cifar10_vit_base.yaml --model_name_or_path DIR_OR_HUB_ID

The weights are loaded, the head is replaced by a zero-initialised linear layer for the new classes, the position
embeddings are resized when --image_size differs, and all layers are trained. With --preset in place of
--model_name_or_path the same course starts from random weights: the baseline at the same budget. With no flags at all
it runs the demo recipe on what run_pretrain.py's demo wrote.
"""

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import Any

from vit_hf import analysis, data, evaluation, hub, training
from vit_hf.arguments import RunArguments, check, differences, identity, parse, pick, plain
from vit_hf.errors import UserError, exit_with, model_errors

DEMO = Path(__file__).resolve().parent / "recipes/demo/finetune_digits.yaml"
DEMO_MODEL = Path("runs/demo/pretrain_glyphs")


def main() -> None:
    argv = sys.argv[1:]
    if not argv:
        if not (DEMO_MODEL / "all_results.json").exists():
            raise UserError(f"no flags given, and no {DEMO_MODEL} to start from; make it with: python run_pretrain.py")
        argv = ["--config", str(DEMO), "--model_name_or_path", str(DEMO_MODEL)]
        print(f"run_finetune.py: no flags given, running the demo: {' '.join(argv)}", file=sys.stderr)
    args = parse(RunArguments, argv, prog="run_finetune.py", description=__doc__.splitlines()[0])
    check(args)
    accelerator = training.build_accelerator(args.ddp_timeout, args.report_to, args.output_dir)
    with training.lost_process(accelerator, args.ddp_timeout):
        repository = finetune(args, accelerator)
        training.end(accelerator)
    repository.push()


def finetune(args: RunArguments, accelerator: Any) -> Any:
    """The course of a run. Returns where its folder goes when it is finished."""
    from vit_hf import models  # torch and what needs it only once the flags are right

    # Whose folder it is, and where the run goes on from
    started, flags, run = time.perf_counter(), plain(args), identity(args)
    training.check_drawing(accelerator, args.log_figures_steps)
    repository = hub.open_repository(accelerator, Path(args.output_dir), run, pick(hub.HubSettings, args))
    folder = training.open_folder(accelerator, repository.folder, repository.resume_from, differences(run, args.change), repository.fetch)  # fmt: skip
    started -= folder.seconds
    if folder.finished:
        return repository

    processes = data.Processes(**training.processes_of(accelerator))
    splits = data.load_splits(pick(data.SetSettings, args, revision=None), processes)  # args.revision is the model's
    rows, eval_rows = splits.rows("train"), splits.rows("eval")

    # The weights under a new linear head; or, with --preset, random weights under a linear head
    which = pick(models.ModelSettings, args)
    with model_errors(args.preset, args.model_name_or_path):
        model = models.make_model(splits.class_names, which)
        training.freeze_parameters(model, args.freeze)
        objective = training.choose_objective(args.loss, splits.multi_label, model.config)
        own = data.own_preprocessing(args.model_name_or_path, args.revision, models.published_image_size(which))
    preprocessing = data.fit_preprocessing(rows, processes, model.config.image_size, own, pick(data.PreprocessingSettings, args))  # fmt: skip

    schedule = training.make_schedule(len(rows), pick(training.ScheduleSettings, args), folder.step)
    plan = training.fit_batches(accelerator, model, objective, preprocessing.image_size, pick(training.BatchSettings, args))  # fmt: skip
    resolved = hub.resolve(accelerator, splits, model, which, preprocessing, plan, schedule, folder.changed)
    accelerator.print(hub.describe(flags, resolved, plan, schedule))
    if args.dry_run:
        accelerator.print("dry run: nothing was trained")
        return repository

    training.begin(accelerator, folder, {**flags, "resolved": resolved})
    training.open_trackers(accelerator, folder.path, args.run_name or folder.path.name, run, folder.step)

    # Model and optimizer on the device, as the checkpoint left them
    files = training.files_of(accelerator, model, preprocessing.image_processor())
    state = training.prepare(accelerator, model, plan, optimizer=pick(training.OptimizerSettings, args),
                             max_grad_norm=args.max_grad_norm, ema_decay=args.ema_decay,
                             gradient_checkpointing=args.gradient_checkpointing, torch_compile=args.torch_compile)  # fmt: skip
    record = training.resume(state, files, folder, run, plan, schedule, args.torch_compile)

    # Images to the device, and what is done to them there
    loading = pick(data.LoadingSettings, args)
    report = data.DataReport(accelerator, args.on_bad_image, folder.events(), folder.record)
    steps = data.StepPlan.of(processes, args.seed, folder.step, schedule.total_steps, plan.micro_batch_size, plan.accumulation)  # fmt: skip
    batches, crop = data.train_batches(rows, preprocessing, steps, processes, loading, report.train)
    eval_batches = data.eval_batches(eval_rows, preprocessing, processes, loading, report.eval)
    augment = data.make_augment(pick(data.AugmentSettings, args), preprocessing, accelerator.device, seed=args.seed,
                                num_classes=len(splits.class_names), crop=crop, first_step_of=schedule.first_step_of)  # fmt: skip

    # What falls due on the way, in the order in which it runs
    flops = models.training_flops(model.config)
    numbers = [data.StarvedNote.of(batches, processes, folder.record).numbers, report.numbers]
    checkpoints = training.Checkpoints(state, files, folder.path, total_limit=args.save_total_limit, whole=repository.whole,
                                       on_save_error=args.on_save_error, timeout_seconds=args.ddp_timeout)  # fmt: skip
    normalise = data.normaliser(preprocessing, accelerator.device)
    judging = pick(evaluation.JudgeSettings, args, class_names=splits.class_names, loss=objective.loss,
                   multi_label=splits.multi_label, source=data.identity_of(eval_rows), source_rows=eval_rows.source_rows)  # fmt: skip
    evaluate = functools.partial(evaluation.evaluate_model, state.engine, eval_batches, normalise, accelerator, judging)  # fmt: skip
    actions = [
        training.Log(schedule.cadence(args.logging_steps), numbers, training.mfu_scale(accelerator, flops)),
        training.Save(schedule.cadence(args.save_steps), checkpoints, record),
        training.Evaluate(schedule.cadence(args.eval_steps), evaluate),
        training.Push(schedule.cadence(args.save_steps), repository.due, repository.leave),
    ]
    if args.probe_steps:
        few = data.few_shot(splits, preprocessing, processes, loading)
        probe = functools.partial(evaluation.few_shot_probe, state.engine, few, eval_batches, normalise, accelerator)
        actions.append(training.Probe(schedule.cadence(args.probe_steps), probe))
    if args.log_figures_steps:
        draw = analysis.figure_drawer(state.model, eval_rows, preprocessing, folder.path / "figures", draws=accelerator.is_main_process)  # fmt: skip
        actions.append(training.Draw(schedule.cadence(args.log_figures_steps), draw))

    settings = pick(training.LoopSettings, args, output_dir=folder.path, start_time=started, first_step=folder.step,
                    training_flops_per_image=flops)  # fmt: skip
    with contextlib.closing(iter(batches)) as stream:
        training.train(state, stream, plan, schedule, settings, augment, objective, actions)

    hub.finish_run(state, files, folder.path, repository.name, flags, resolved, report.collect(), started)
    return repository


if __name__ == "__main__":
    exit_with(main)
