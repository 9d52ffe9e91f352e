"""What a run will cost on the present device, measured on a few steps of random images before anything is trained.

Must not know: the data itself (of a set on the Hub only its published size).
"""

import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

from vit_hf.arguments import parse_image_size
from vit_hf.data.sources import HUB_SETS, load_image_splits
from vit_hf.models.configuration_vit import pair
from vit_hf.models.presets import FAMILIES, build, make_config, parse_overrides, preset_config
from vit_hf.study.plan import Cell
from vit_hf.training.schedule import make_schedule

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
        ValueError: a preset or a field that does not exist.
    """
    changes = parse_overrides(cell.args.config_overrides)
    if cell.args.image_size is not None:
        changes["image_size"] = parse_image_size(cell.args.image_size)
    classes = num_classes(cell)
    if cell.args.preset is not None:
        return preset_config(cell.args.preset, changes, num_labels=classes)
    if cell.start_from is None:
        config = transformers.AutoConfig.from_pretrained(cell.args.model_name_or_path, revision=cell.args.revision)
        config = make_config(FAMILIES[config.model_type].config_class, config.to_dict())
    else:
        config = model_config(cell.start_from)
    heads = {"head_hidden_size": None} if hasattr(config, "head_hidden_size") else {}
    fields = {**config.to_dict(), **heads, **changes}
    for labels in ("id2label", "label2id"):
        fields.pop(labels, None)
    return make_config(type(config), {**fields, "num_labels": classes})


@functools.cache
def _sizes(name: str, config_name: str | None) -> tuple[int, int, int]:
    known = {**SIZES, **{HUB_SETS[short]: SIZES[short] for short in SIZES}}
    if name in known:
        return known[name]
    splits = load_image_splits(name, dataset_config_name=config_name)
    return len(splits.train), len(splits.eval), len(splits.class_names)


def num_classes(cell: Cell) -> int:
    """Classes of the set, after the subset filter."""
    listed = cell.args.subset_classes
    return len(listed.split(",")) if listed else _sizes(cell.args.dataset_name, cell.args.dataset_config_name)[2]


def image_counts(cell: Cell) -> tuple[int, int]:
    """Training and evaluation images, after the subset filter and the draws."""
    args = cell.args
    training, evaluation, classes = _sizes(args.dataset_name, args.dataset_config_name)
    share = num_classes(cell) / classes
    training, evaluation = training * share, evaluation * share
    training *= args.subset_fraction or 1
    if args.subset_per_class:
        training = args.subset_per_class * num_classes(cell)
    limits = (args.max_train_samples or training, args.max_eval_samples or evaluation)
    return round(min(training, limits[0])), round(min(evaluation, limits[1]))


def speed(step: Callable[[int], Any], images: int, device: torch.device) -> float:
    """Images a second of a step of so many images; the first step warms up, unless it alone takes long enough."""

    def timed() -> float:
        start = time.perf_counter()
        step(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if (first := timed()) > TRIAL_SECONDS:
        return images / first
    seconds = [timed()]
    while sum(seconds) < TRIAL_SECONDS:
        seconds.append(timed())
    return images * len(seconds) / sum(seconds)


def measure_speed(
    config: transformers.PreTrainedConfig,
    mixed_precision: str = "no",
    training: bool = True,
    images: int | None = None,
) -> float:
    """Images a second of one device that trains this model (AdamW), or only uses it; random weights and images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(config).to(device).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if training else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)

    def step(number: int) -> None:
        pixel_values = torch.randn(number, config.num_channels, *pair(config.image_size), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None), torch.set_grad_enabled(training):
            logits = model(pixel_values).logits
        if optimizer is not None:
            labels = torch.zeros(number, dtype=torch.int64, device=device)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return speed(step, images or TRIAL_IMAGES[device.type], device)


def same_speed(config: transformers.PreTrainedConfig) -> str:
    """A text that is the same for configurations that cost the same."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id")}
    return json.dumps(fields, sort_keys=True, default=str)


def estimate_cost(cell: Cell, images_per_second: float) -> Cost:
    """Time of training, evaluations (at three times the speed of training) and start; disk of the checkpoints and the
    export."""
    args = cell.args
    training, evaluation = image_counts(cell)
    schedule = make_schedule(
        num_samples=training,
        global_batch_size=args.global_batch_size,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        warmup_steps=None,
        warmup_ratio=None,
        learning_rate=args.learning_rate,
        kind=args.lr_scheduler_type,
    )

    def times(every: int | None) -> int:
        return max(1, round(schedule.total_steps / every if every else schedule.epochs_after(schedule.total_steps)))

    work = schedule.total_steps * args.global_batch_size + times(args.eval_steps) * evaluation / 3
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(model_config(cell)).parameters())
    # fp32: weights, two moments of AdamW or the momentum of SGD, an average of the weights where there is one
    states = 4 * parameters * (1 + (2 if args.optim == "adamw_torch" else 1) + bool(args.ema_decay))
    kept = min(times(args.save_steps), (args.save_total_limit or 10**9)) + 1  # a new one is written before one goes
    return Cost(START_SECONDS + work / images_per_second, kept * states + 4 * parameters)


def measured_costs(cells: list[Cell], mixed_precision: str, num_devices: int) -> dict[Cell, Cost]:
    """The cost of each cell; each distinct model is tried once.

    Args:
        num_devices: GPUs of one run; its speed is taken to grow with them.
    """
    speeds: dict[str, float] = {}
    costs = {}
    for cell in cells:
        config = model_config(cell)
        key = same_speed(config)
        if key not in speeds:
            speeds[key] = measure_speed(config, mixed_precision)
        costs[cell] = estimate_cost(cell, speeds[key] * num_devices)
    return costs
