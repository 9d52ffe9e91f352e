"""What a run will cost on the present device, measured on a few steps of random images before anything is trained.

Must not know: the data itself (of a set on the Hub only its published size).
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from vit_hf.arguments import pick
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.names import GENERATED_SETS, HUB_SETS
from vit_hf.errors import UserError
from vit_hf.models.configuration_vit import pair
from vit_hf.models.presets import FAMILIES, build, make_config, preset_config
from vit_hf.study.execute import Launcher
from vit_hf.study.plan import Cell
from vit_hf.training.schedule import ScheduleSettings, make_schedule

TRIAL_SECONDS = 1.0
TRIAL_IMAGES = {"cpu": 4, "cuda": 64}  # at once; a larger batch is not faster by much there
START_SECONDS = 10.0  # of one launch: imports, model, data, export; seen on 2 CPU cores
# training images, evaluation images, classes. Source: the sets' pages on the Hub
SIZES = {"cifar10": (50_000, 10_000, 10), "imagenet-1k": (1_281_167, 50_000, 1000)}


class Cost(NamedTuple):
    seconds: float
    disk_bytes: int


def model_config(cell: Cell) -> transformers.PreTrainedConfig:
    """The configuration that the cell trains: its preset's, or that of the cell it starts from at its own image size.

    Raises:
        ValueError: a preset or a field that does not exist, a family that is not trained here.
        UserError: the number of classes is not known, since the set cannot be had.
    """
    changes = dict(cell.args.config_overrides)
    if cell.args.image_size is not None:
        changes["image_size"] = cell.args.image_size
    classes = image_counts(cell)[2]
    if cell.args.preset is not None:
        return preset_config(cell.args.preset, changes, num_labels=classes)
    if cell.start_from is None:
        config = family_config(cell.args.model_name_or_path, cell.args.revision)
    else:
        config = model_config(cell.start_from)
    heads = {"head_hidden_size": None} if hasattr(config, "head_hidden_size") else {}
    fields = {**config.to_dict(), **heads, **changes}
    for labels in ("id2label", "label2id"):
        fields.pop(labels, None)
    return make_config(type(config), {**fields, "num_labels": classes})


def family_config(name_or_path: str, revision: str | None = None) -> transformers.PreTrainedConfig:
    """The configuration of a folder or Hub id as one of ours. Raises ValueError for another family."""
    config = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name_or_path}: its family (model_type) is {config.model_type}, known: {', '.join(FAMILIES)}"
        )
    return make_config(FAMILIES[config.model_type].config_class, config.to_dict())


@functools.cache
def _sizes(name: str, **options: str | None) -> tuple[int, int, int]:
    """Training images, evaluation images and classes of a set; of one on the Hub without downloading it."""
    known = {**SIZES, **{HUB_SETS[short]: SIZES[short] for short in SIZES}}
    if name in known:
        return known[name]
    if name not in GENERATED_SETS and not Path(name).expanduser().is_dir():
        raise UserError(f"--dataset_name {name}: its size is not known before it is downloaded")
    splits = load_image_splits(name, **options)
    return len(splits.train), len(splits.eval), len(splits.class_names)


def image_counts(cell: Cell) -> tuple[int, int, int]:
    """Training and evaluation images and classes, after the subset filter and the draws.

    Raises:
        UserError: the set is not here, and its size not known.
    """
    args = cell.args
    names = ("dataset_config_name", "image_column_name", "label_column_name", "train_split", "eval_split")
    training, evaluation, all_classes = _sizes(args.dataset_name, **{name: getattr(args, name) for name in names})
    classes = len(args.subset_classes) if args.subset_classes else all_classes
    training, evaluation = training * classes / all_classes, evaluation * classes / all_classes
    training *= args.subset_fraction or 1
    if args.subset_per_class:
        training = min(training, args.subset_per_class * classes)
    training = min(training, args.max_train_samples or training)
    evaluation = min(evaluation, args.max_eval_samples or evaluation)
    return round(training), round(evaluation), classes


def trial_device(launcher: Launcher) -> tuple[torch.device, int, str]:
    """Where a trial is made, the number of such devices that a run takes, and both in words."""
    settings = launcher.settings
    if settings.get("use_cpu") or not torch.cuda.is_available():
        note = "this CPU" if settings.get("use_cpu") else "this CPU, since there is no GPU here"
        return torch.device("cpu"), 1, note
    wanted = len(launcher.devices) // launcher.jobs or int(settings.get("num_processes") or 1)
    number = min(wanted, torch.cuda.device_count())
    return torch.device("cuda"), number, f"{torch.cuda.get_device_name()}, times {number}"


def speed(step: Callable[[], Any], images: int, device: torch.device) -> float:
    """Images a second of a step of so many images: the fastest of some, after one to warm up. What else runs on the
    machine only ever makes a step slower."""

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    seconds = [timed(), timed()]
    while sum(seconds) < TRIAL_SECONDS:
        seconds.append(timed())
    return images / min(seconds)


def measure_speed(
    config: transformers.PreTrainedConfig,
    device: torch.device,
    images: int,
    *,
    mixed_precision: str = "no",
    training: bool = True,
) -> float:
    """Images a second of a device that trains this model (AdamW), or only uses it, on so many images at a time; random
    weights and images. Raises RuntimeError where they do not fit."""
    model = build(config).to(device).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if training else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)

    def step() -> None:
        pixel_values = torch.randn(images, config.num_channels, *pair(config.image_size), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None), torch.set_grad_enabled(training):
            logits = model(pixel_values).logits
        if optimizer is not None:
            labels = torch.zeros(images, dtype=torch.int64, device=device)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return speed(step, images, device)


def estimate_cost(cell: Cell, images_per_second: float) -> Cost:
    """Time of training, evaluations (at three times the speed of training) and start; disk of the checkpoints and the
    export."""
    args = cell.args
    training, evaluation, _ = image_counts(cell)
    settings = pick(ScheduleSettings, args, warmup_steps=None, warmup_ratio=None)
    schedule = make_schedule(training, settings)
    work = schedule.total_steps * args.global_batch_size + schedule.cadence(args.eval_steps).times * evaluation / 3
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(model_config(cell)).parameters())
    # fp32: weights, two moments of AdamW or the momentum of SGD, an average of the weights where there is one
    states = 4 * parameters * (1 + (2 if args.optim == "adamw_torch" else 1) + bool(args.ema_decay))
    saves = schedule.cadence(args.save_steps).times
    kept = min(saves, (args.save_total_limit or saves) + 1)  # a new one is written before one goes
    return Cost(START_SECONDS + work / images_per_second, kept * states + 4 * parameters)


def measured_costs(
    cells: list[Cell], device: torch.device, num_devices: int, mixed_precision: str
) -> dict[Cell, Cost]:
    """The cost of each cell whose set's size is known; each distinct model is tried once.

    Args:
        num_devices: of one run; its speed is taken to grow with them.

    Raises:
        ValueError: a model that does not exist. RuntimeError: one that does not fit.
    """
    speeds: dict[tuple[str, int], float] = {}
    costs = {}
    for cell in cells:
        try:
            config = model_config(cell)
        except UserError:  # the size of its set is not known
            continue
        except (ValueError, OSError) as error:
            raise ValueError(f"{cell}: {error}") from None
        images = min(TRIAL_IMAGES[device.type], cell.args.per_device_train_batch_size or cell.args.global_batch_size)
        fields = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
        key = json.dumps(fields, sort_keys=True, default=str), images
        if key not in speeds:
            speeds[key] = measure_speed(config, device, images, mixed_precision=mixed_precision)
        costs[cell] = estimate_cost(cell, speeds[key] * num_devices)
    return costs
