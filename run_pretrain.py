#!/usr/bin/env python
"""Trains a Vision Transformer from scratch and saves it as a Hub model folder.

    accelerate launch run_pretrain.py --config recipes/pretrain/cifar10_vit_small.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml run_pretrain.py --config RECIPE.yaml --output_dir DIR

Every flag can stand in the YAML file under its own name; a flag wins over the file. With no flags at all it runs the
demo recipe. Where it runs (devices, precision, ZeRO) is the business of `accelerate launch`.
"""

import functools
import time
from pathlib import Path

from vit_hf import analysis, data, evaluation, hub, training
from vit_hf.arguments import RunArguments, changes, check, identity, parse, pick, plain
from vit_hf.errors import exit_with, model_errors

DEMO = Path(__file__).resolve().parent / "recipes/demo/pretrain_glyphs.yaml"


def main() -> None:
    args = parse(RunArguments, prog="run_pretrain.py", description=__doc__.splitlines()[0], default_config=DEMO)
    check(args)
    from torch.nn.functional import cross_entropy  # torch and what needs it only once the flags are right

    from vit_hf import models

    started = time.perf_counter()
    accelerator = training.build_accelerator(args.ddp_timeout, args.report_to, args.output_dir)
    training.check_drawing(accelerator, args.log_figures_steps)
    processes = data.Processes(**training.processes_of(accelerator))

    # Whose folder is it, and where does the run go on from?
    same = functools.partial(changes, now=identity(args), allowed=args.change)
    folder = training.open_folder(accelerator, Path(args.output_dir), args.resume_from_checkpoint, same)
    repository = hub.open_repository(accelerator, folder.path, pick(hub.HubSettings, args))
    if folder.finished:
        accelerator.print(f"{folder.path} holds this run, finished; nothing to do (a new run needs another --output_dir)")
        return repository.push()

    splits = data.load_splits(pick(data.SetSettings, args, revision=None), processes)  # args.revision is the model's
    rows, eval_rows, num_classes = splits.rows("train"), splits.rows("eval"), len(splits.class_names)

    # A preset with random weights; or given weights that go on training, under their own head where the classes are theirs
    with model_errors(args.preset, args.model_name_or_path):
        model = models.make_model(splits.class_names, pick(models.ModelSettings, args), keep_head=True)
        own = data.own_preprocessing(args.model_name_or_path, args.revision, models.published_image_size(args.preset, args.model_name_or_path, args.revision))
    sizes = functools.partial(data.sampled_sizes, rows, processes.main_first)
    preprocessing = data.choose_preprocessing(model.config.image_size, own, sizes, pick(data.PreprocessingSettings, args))

    # How the global batch is cut, and how the learning rate runs
    plan = training.plan_batches(accelerator, model, pick(training.BatchSettings, args))
    schedule = training.make_schedule(len(rows), pick(training.ScheduleSettings, args), folder.lengths)
    resolved = hub.resolve(accelerator, splits, model, preprocessing, plan, schedule, folder.changed)
    accelerator.print(hub.describe(resolved, plan, schedule, args.dataset_name, args.preset, args.model_name_or_path))
    if args.dry_run:
        return accelerator.print("dry run: nothing was trained")

    training.begin(accelerator, folder, {**plain(args), "resolved": resolved})
    training.open_trackers(accelerator, folder.path, args.run_name or folder.path.name, identity(args), folder.step)
    files = training.model_folder(accelerator, model, preprocessing.image_processor())
    state = training.prepare(accelerator, model, plan, pick(training.StateSettings, args))
    record = training.record_of(state, folder, identity(args), plan, schedule, args.torch_compile)
    training.resume(state, files, folder, record)

    # Images to the device, and what is done to them there
    loading, report = pick(data.LoadingSettings, args), data.DataReport(...)
    steps = data.StepPlan(args.seed, folder.step, schedule.total_steps, plan.num_processes, accelerator.process_index, plan.micro_batch_size, plan.accumulation)
    batches, crop = data.train_batches(rows, preprocessing, steps, processes, loading, report.train, crop=args.random_crop)
    eval_images = data.eval_batches(eval_rows, preprocessing, processes, loading, report.eval)
