"""`vit-hf data bench`: how many images a second the loader of a recipe gives on this machine, without a model."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from vit_hf.arguments import (
    RunArguments,
    check_augmentation,
    check_loading,
    check_one_model,
    check_subset,
    parse,
    pick,
)
from vit_hf.commands.data import model_input
from vit_hf.errors import ArgumentError

SECONDS = 8.0  # of each of the two measurements
MOST_IMAGES = 256  # of a micro-batch: more of them at once are no faster


def bench(argv: list[str]) -> None:
    """Measures images a second of a recipe's training batches on this machine, with one process and no model: the loader
    alone, and with the augmentation on the device."""
    args = parse(RunArguments, argv, prog="vit-hf data bench", description=bench.__doc__)
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    check_subset(args)
    check_augmentation(args)
    check_loading(args)
    check_one_model(args)

    import torch

    from vit_hf.data.augment.pipeline import AugmentSettings, make_augment
    from vit_hf.data.faults import Faults
    from vit_hf.data.feed import LoadingSettings, fit_preprocessing, train_batches
    from vit_hf.data.machine import AT_HAND, PREFETCHED, usable_cores
    from vit_hf.data.order import StepPlan
    from vit_hf.data.preprocessing import PreprocessingSettings
    from vit_hf.data.processes import Processes
    from vit_hf.data.sets.load import SetSettings, load_set
    from vit_hf.training.accelerator import keep_freed_memory

    keep_freed_memory()  # as a run does

    size, own = model_input(args)
    splits = load_set(pick(SetSettings, args, revision=None))  # args.revision is the model's
    rows = splits.rows("train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preprocessing = fit_preprocessing(rows, Processes(device), size, own, pick(PreprocessingSettings, args))
    asked = args.per_device_train_batch_size
    micro_batch = min(asked if isinstance(asked, int) else args.global_batch_size, MOST_IMAGES)
    endless = StepPlan(args.seed, 0, 1 << 40, num_processes=1, rank=0, micro_batch_size=micro_batch, accumulation=1)
    batches, crop = train_batches(
        rows,
        preprocessing,
        endless,
        Processes(device),
        pick(LoadingSettings, args),
        Faults(),
    )
    augment = make_augment(
        pick(AugmentSettings, args),
        preprocessing,
        device,
        seed=args.seed,
        num_classes=len(splits.class_names),
        crop=crop,
        first_step_of=lambda epoch: 1 + epoch,
    )  # all is measured at step 0, where mixing is still on
    workers = batches.loader.num_workers
    ahead = PREFETCHED * workers + AT_HAND  # these were made while nobody waited
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    stream = iter(batches)
    try:
        alone = images_per_second(stream, lambda batch: None, finish, ahead)
        augmented = images_per_second(stream, lambda batch: augment(batch, 0, 0, 0), finish, 1)
    finally:
        stream.close()
        batches.close()
    each = f", {alone / workers:,.0f} a worker" if workers else ""
    print(f"on: {usable_cores()} cores, {device.type}; batches of {micro_batch} images, {splits.train_split}")
    print(f"loader alone: {alone:,.0f} images/s{each}")
    print(f"with the augmentation on the {device.type}: {augmented:,.0f} images/s")


def images_per_second(
    batches: Iterator[dict[str, Any]], use: Callable[[dict[str, Any]], Any], finish: Callable[[], None], ahead: int
) -> float:
    """How fast batches come and are used, over SECONDS, at least one batch.

    Args:
        finish: waits for the device.
        ahead: batches that are left out of the measurement first.
    """
    for _ in range(ahead):
        use(next(batches))
    finish()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < SECONDS:
        batch = next(batches)
        use(batch)
        count += len(batch["labels"])
    finish()
    return count / (time.perf_counter() - start)
