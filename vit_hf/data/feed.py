"""Chooses the way that a split's images take to the device: decoded once, or read and decoded batch by batch.

This is all that a run calls once it has rows. It must not know models or training.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vit_hf.arguments import RandomCrop
from vit_hf.data.batches import ImageBatches
from vit_hf.data.cache import NotKept, decoded, sampled_sizes, worth_decoding
from vit_hf.data.device import DeviceBatches, promised_bytes
from vit_hf.data.faults import Faults
from vit_hf.data.machine import SHARED_MEMORY, processes_here, shared_memory_free, shared_memory_needed, usable_cores
from vit_hf.data.order import EvalOrder, StepPlan, StreamOrder, TrainOrder, stream_shape
from vit_hf.data.preprocessing import Preprocessing, PreprocessingSettings, choose_preprocessing
from vit_hf.data.processes import Processes
from vit_hf.data.rows.interface import Rows
from vit_hf.data.rows.labels import LabelLists
from vit_hf.data.rows.parquet import ParquetRows
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import UserError


@dataclass(frozen=True)
class LoadingSettings:
    """How images come to the device, as the flags of the same names say.

    Args:
        dataloader_num_workers: processes of each rank that read and decode; None takes this process's share of the cores.
        decoded_cache: auto or never: whether what fits is decoded once.
        data_on_device: auto or never: whether a decoded training set may lie in the memory of the device.
    """

    dataloader_num_workers: int | None = None
    decoded_cache: str = "auto"
    data_on_device: str = "auto"
    on_bad_image: str = "raise"
    shuffle_buffer_size: int = 32_768
    aug_repeats: int = 1
    class_balanced: bool = False
    per_device_eval_batch_size: int = 128
    random_crop: RandomCrop = RandomCrop()


def fit_preprocessing(
    rows: Rows,
    processes: Processes,
    image_size: int | list[int] | tuple[int, int],
    own: Preprocessing | None,
    settings: PreprocessingSettings,
) -> Preprocessing:
    """`choose_preprocessing`, by some images of a set where the images decide: the main process looks at them."""
    return choose_preprocessing(
        image_size, own, functools.partial(sampled_sizes, rows, processes.main_first), settings
    )


def workers_per_process(asked: int | None, num_processes: int) -> int:
    """How many worker processes each process starts where images are decoded as they are needed: as many as are asked
    for, or this process's share of the machine's cores, at most 16."""
    if asked is not None:
        return asked
    return min(16, max(1, usable_cores() // processes_here(num_processes)))


def to_device(
    batches: ImageBatches,
    order: Any,
    device: torch.device,
    faults: Faults,
    *,
    batch_size: int,
    num_workers: int,
    num_processes: int,
    say: Callable[[str], None],
    pieces: int = 1,
) -> DeviceBatches:
    """The micro-batches of an order on the device. Workers send them through shared memory where this process's share
    of what is free holds them, beside those of its other loaders; else through a pipe."""
    workers = 0 if batches.decoded is not None else num_workers
    height, width = batches.preprocessing.image_size
    needed = shared_memory_needed(batch_size * height * width * 3, workers)
    free = shared_memory_free()
    shared = free is None or needed == 0 or needed + promised_bytes() <= free // processes_here(num_processes)
    if not shared:
        here = processes_here(num_processes)
        each = f" in each of {here} processes" if here > 1 else ""
        say(
            f"note: {'training' if batches.training else 'evaluation'} images take up to {needed / 1e6:.1f} MB of shared "
            f"memory{each}, and {free / 1e6:.1f} MB are free in "
            f"{SHARED_MEMORY}: the {workers} workers send theirs through a pipe (more shared memory: docker's --shm-size)"
        )
    return DeviceBatches(batches, order, device, workers, faults, pieces=pieces, needed_bytes=needed, shared=shared)


def open_batches(
    rows: Rows,
    preprocessing: Preprocessing,
    device: torch.device,
    settings: LoadingSettings,
    *,
    seed: int = 0,
    crop: RandomCrop = RandomCrop(),
    training: bool = False,
    class_index: list[int] | None = None,
    keep: bool = True,
    say: Callable[[str], None] = print,
) -> ImageBatches:
    """A split's micro-batches on the host, decoded once where that pays.

    Args:
        crop: the random crop. The batches have it where it is cut while decoding: not where a set is worth decoding once,
            whether or not it is.
        class_index: another number for each label.
        keep: False decodes anew each time, for a set that is gone through once.
    """
    if class_index is not None:
        rows.renumber(class_index)
    if crop.while_decoding:  # the crop takes the place of the centre
        preprocessing = preprocessing.whole_image()
    cut, kept = crop if crop.while_decoding else RandomCrop(), None
    if isinstance(rows, TableRows) or not training:  # a training stream is larger than the disk
        keep = keep and settings.decoded_cache == "auto"
        if (keep or crop.while_decoding) and worth_decoding(rows, preprocessing, crop):
            cut = RandomCrop()
            try:
                kept = decoded(rows, preprocessing).resized(preprocessing) if keep else None
            except NotKept as reason:
                say(
                    f"note: decoded images are not kept ({reason}); they are decoded batch by batch. Make room, or set "
                    "HF_DATASETS_CACHE to a folder on a larger disk"
                )
    batches = ImageBatches(
        rows,
        preprocessing,
        kept,
        seed=seed,
        crop=cut,
        on_bad_image=settings.on_bad_image,
        training=training,
    )
    if training and settings.data_on_device == "auto":  # each process reads a part of an evaluation set alone
        batches.place_on_device(device)
    return batches


def train_batches(
    rows: Rows,
    preprocessing: Preprocessing,
    plan: StepPlan,
    processes: Processes,
    settings: LoadingSettings,
    faults: Faults,
) -> tuple[DeviceBatches, RandomCrop]:
    """The micro-batches of this process at the steps of the plan, and the crop that is left to the device."""
    make = functools.partial(_train_batches, rows, preprocessing, plan, processes, settings, faults)
    return processes.machine_first(make, "decoding the training images")


def _train_batches(
    rows: Rows,
    preprocessing: Preprocessing,
    plan: StepPlan,
    processes: Processes,
    settings: LoadingSettings,
    faults: Faults,
) -> tuple[DeviceBatches, RandomCrop]:
    device, say, crop = processes.device, processes.say, settings.random_crop
    batches = open_batches(rows, preprocessing, device, settings, seed=plan.seed, crop=crop, training=True, say=say)
    workers = workers_per_process(settings.dataloader_num_workers, plan.num_processes)
    pieces, how = 1, ""
    if isinstance(rows, ParquetRows):
        groups = rows.groups()
        num_streams, _ = stream_shape(groups, settings.shuffle_buffer_size)
        workers = min(workers, max(1, num_streams // plan.num_processes))  # another one would have no stream
        order = StreamOrder(plan, groups=groups, num_workers=workers, buffer_size=settings.shuffle_buffer_size)
        rows.held_rows, pieces = order.held_rows, order.pieces
        how = f" ({num_streams} streams of row groups of up to {np.diff(groups).max()} rows)"
    else:
        labels = batches.rows.labels if settings.class_balanced else None
        if isinstance(labels, LabelLists):
            raise UserError(
                "--class_balanced true: needs one label an image, and the label column holds lists of labels; leave it out"
            )
        order = TrainOrder(plan, num_samples=len(batches), repeats=settings.aug_repeats, labels=labels)
    if batches.decoded is not None:
        where = "on the device" if batches.on_device is not None else "in memory"
        height, width = batches.decoded.size
        say(f"images: decoded once, {width} x {height} pixels, {batches.decoded.nbytes / 1e6:.0f} MB {where}")
    else:
        say(f"images: read and decoded batch by batch, {workers} workers a process{how}")
    loader = to_device(
        batches,
        order,
        device,
        faults,
        batch_size=plan.micro_batch_size,
        num_workers=workers,
        num_processes=plan.num_processes,
        pieces=pieces,
        say=say,
    )
    return loader, RandomCrop() if batches.crop.while_decoding else crop


def eval_batches(
    rows: Rows,
    preprocessing: Preprocessing,
    processes: Processes,
    settings: LoadingSettings,
    faults: Faults,
    *,
    class_index: list[int] | None = None,
    keep: bool = True,
) -> DeviceBatches:
    """The evaluation batches of this process, each sample once over all processes; what can be kept decoded is decoded
    once.

    Args:
        class_index: the model's index of each class of the dataset, where they differ.
        keep: whether they will be gone through again and again.
    """
    make = functools.partial(_eval_batches, rows, preprocessing, processes, settings, faults, class_index, keep)
    return processes.machine_first(make, "decoding the evaluation images")


def _eval_batches(
    rows: Rows,
    preprocessing: Preprocessing,
    processes: Processes,
    settings: LoadingSettings,
    faults: Faults,
    class_index: list[int] | None,
    keep: bool,
) -> DeviceBatches:
    device, say = processes.device, processes.say
    batches = open_batches(rows, preprocessing, device, settings, class_index=class_index, keep=keep, say=say)
    workers = workers_per_process(settings.dataloader_num_workers, processes.num_processes)
    order = EvalOrder(
        num_samples=len(batches),
        num_processes=processes.num_processes,
        rank=processes.rank,
        batch_size=settings.per_device_eval_batch_size,
        num_workers=0 if batches.decoded is not None else workers,
    )
    return to_device(
        batches,
        order,
        device,
        faults,
        batch_size=order.batch_size,
        num_workers=workers,
        num_processes=processes.num_processes,
        say=say,
    )
