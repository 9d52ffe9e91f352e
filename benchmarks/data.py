"""Speed of the way from a dataset to the model, side by side with what others do, in one run.

    python benchmarks/data.py --output benchmarks/results/NAME.json
    python benchmarks/data.py --figures small,large
    pip install --no-deps --target FOLDER timm torchvision && python benchmarks/data.py --timm FOLDER
    python benchmarks/data.py --table benchmarks/results/*data.json

small     32-pixel PNGs, crop, flip and RandAugment: ours; a transform in Pillow for each sample (`with_transform`) in a
          DataLoader with as many workers as cores; timm's transforms in the same way (--timm); kornia's batched
          RandAugment, where it is installed
large     500x375 JPEGs, random resized crop to 224 and flip, on one core: the same transform in Pillow; timm's own
          (--timm); ours; ours from the copy that `vit-hf data prepare` makes; and what of it the host does where the rest
          is left to a GPU
fractal   pictures of the fractal set, computed as they are needed, on one core
training  a model end to end, augmentation on: our loop; transformers.Trainer; and the ceiling, the same model on one
          batch that lies on the device already

The ways take turns, in another order in each round; ratios are taken within a round, so that a machine that slows down
or is shared slows all of them.
"""

import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import torch
import transformers
from PIL import Image, ImageEnhance, ImageOps
from reports import environment, read_report
from torch.nn.functional import cross_entropy

from vit_hf.arguments import Parser, RandomCrop
from vit_hf.data.augment.mixing import Mixing
from vit_hf.data.augment.pipeline import Augment
from vit_hf.data.augment.policies import rand_augment
from vit_hf.data.batches import ImageBatches
from vit_hf.data.cache import decoded
from vit_hf.data.copy.prepare import prepare
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.order import StepPlan, TrainOrder
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.table import TableRows
from vit_hf.data.sets.fractals import FractalRows, parse_options
from vit_hf.data.sets.names import ImageSplits
from vit_hf.errors import ArgumentError, UserError, exit_with
from vit_hf.hub.export import write_json
from vit_hf.models.presets import from_preset
from vit_hf.training.accelerator import keep_freed_memory
from vit_hf.training.actions import Log
from vit_hf.training.loop import LoopSettings, train
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import Schedule, plan_batches
from vit_hf.training.state import TrainState
from vit_hf.training.state import prepare as prepare_state

HALF = [0.5, 0.5, 0.5]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
Turn = Callable[[], float]  # does some batches, and says how many images a second


# --- sets ---


def natural_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture with the spectrum of natural images: amplitudes fall with the frequency, colours hang together."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(width, height)
    planes = [
        np.fft.irfft2(np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency, s=(height, width))
        for _ in range(4)
    ]
    picture = np.stack([planes[3] + 0.4 * plane for plane in planes[:3]], axis=2)
    picture = 120 + 55 * picture / picture.std() + rng.normal(0, 3, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def image_set(folder: Path, count: int, kind: str) -> datasets.Dataset:
    """A set on disk: `png`, 32 x 32 pixels, or `jpeg`, 500 x 375 on average, quality 90. Labels 0..9."""
    rng = np.random.default_rng(0)
    content = []
    for _ in range(count):
        scale = np.exp(rng.normal(-0.08, 0.4))  # as unlike in size as photographs on the web; 1 on average
        size = (32, 32) if kind == "png" else (round(500 * scale), round(375 * scale))
        buffer = io.BytesIO()
        natural_image(rng, *size).save(buffer, kind, quality=90)
        content.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"image": content, "label": [row % 10 for row in range(count)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return datasets.load_from_disk(folder)


# --- the peers' way: each sample alone, in Pillow ---


def pillow_rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """RandAugment of two operations at magnitude 9 of 30, torchvision's op set."""

    def affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
        return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    sign = rng.choice((-1, 1))
    shift = sign * int(150 / 331 * image.width * 0.3)
    operations = [
        lambda image: image,
        affine(1, sign * 0.09, 0, 0, 1, 0),
        affine(1, 0, 0, sign * 0.09, 1, 0),
        affine(1, 0, shift, 0, 1, 0),
        affine(1, 0, 0, 0, 1, shift),
        lambda image: image.rotate(sign * 9),
        lambda image: ImageEnhance.Brightness(image).enhance(1 + sign * 0.27),
        lambda image: ImageEnhance.Color(image).enhance(1 + sign * 0.27),
        lambda image: ImageEnhance.Contrast(image).enhance(1 + sign * 0.27),
        lambda image: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.27),
        lambda image: ImageOps.posterize(image, 7),
        lambda image: ImageOps.solarize(image, 178),
        ImageOps.autocontrast,
        ImageOps.equalize,
    ]
    for operation in rng.choices(operations, k=2):
        image = operation(image)
    return image


def to_tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def small_transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rng, images = random.Random(random.random()), []
    for image in batch["image"]:
        image = ImageOps.expand(image.convert("RGB"), 4)
        left, top = rng.randrange(9), rng.randrange(9)
        image = image.crop((left, top, left + 32, top + 32))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(to_tensor(pillow_rand_augment(image, rng)))
    return {"pixel_values": images, "labels": batch["label"]}


def large_transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rng, images = random.Random(random.random()), []
    for image in batch["image"]:
        image = image.convert("RGB")
        for _ in range(10):
            area = image.width * image.height * rng.uniform(0.08, 1)
            ratio = (4 / 3) ** rng.uniform(-1, 1)
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if width <= image.width and height <= image.height:
                break
        else:
            width = height = min(image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(to_tensor(image))
    return {"pixel_values": images, "labels": batch["label"]}


def timm_transform(size: int, **options: Any) -> Callable | None:
    """timm's training transform for a batch of `with_transform`; None where timm is not there."""
    if importlib.util.find_spec("timm") is None:
        return None
    # timm imports torchvision, whose wheel registers operators that a CPU build of torch has not; its transforms are
    # plain Python and need none of them
    register, torch.library.register_fake = torch.library.register_fake, lambda *_, **__: lambda function: function
    try:
        from timm.data import create_transform
    finally:
        torch.library.register_fake = register
    each = create_transform(size, is_training=True, color_jitter=None, interpolation="bilinear", **options)

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [each(image.convert("RGB")) for image in batch["image"]], "labels": batch["label"]}

    return transform


def peer_loader(dataset: datasets.Dataset, transform: Callable, batch_size: int, workers: int) -> Iterator[Any]:
    loader = torch.utils.data.DataLoader(
        dataset.with_transform(transform),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


# --- ours ---


def our_batches(
    batches: ImageBatches, batch_size: int, device: torch.device, workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    plan = StepPlan(
        seed=0, first_step=0, total_steps=10**9, num_processes=1, rank=0, micro_batch_size=batch_size, accumulation=1
    )
    order = TrainOrder(plan, num_samples=len(batches))
    return iter(DeviceBatches(batches, order, device, workers, Faults()))


def augmentation(device: torch.device, **options: Any) -> Augment:
    return Augment(seed=0, num_classes=10, mean=HALF, std=HALF, device=device, flip=0.5, **options)


def our_turn(batches: Iterator[Any], augment: Augment, batch_size: int, count: int) -> float:
    return turn((augment(batch, 0, 0, 0) for batch in batches), batch_size, count, spare=4)


def turn(batches: Iterator[Any], batch_size: int, count: int, spare: int) -> float:
    """Takes `count` batches after the `spare` ones that were prepared before the turn: images a second."""
    for _ in range(spare):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    rate = count * batch_size / (time.perf_counter() - start)
    time.sleep(1.0)  # what was asked for ahead is finished before the next way has its turn
    return rate


# --- figures ---


def small(folder: Path, device: torch.device) -> dict[str, Turn]:
    dataset = image_set(folder / "png", 10_000, "png")
    rows = TableRows(dataset.cast_column("image", datasets.Image(decode=False)))
    batches = ImageBatches(rows, Preprocessing((32, 32)), decoded(rows, Preprocessing((32, 32)), str(folder)))
    augment = augmentation(device, crop=RandomCrop("padding", 4), policies=[rand_augment])
    peer = peer_loader(dataset, small_transform, 256, CORES)
    ways = {
        "Pillow, each sample": lambda: turn(peer, 256, 12, spare=4 * CORES),
        "ours": functools.partial(our_turn, our_batches(batches, 256, device), augment, 256, 120),
    }
    if theirs := timm_transform(32, auto_augment="rand-m9-n2-p1.0"):  # both operations always, as the others do
        timm_loader = peer_loader(dataset, theirs, 256, CORES)
        ways["timm's transforms, each sample"] = lambda: turn(timm_loader, 256, 12, spare=4 * CORES)
    try:
        import kornia.augmentation as K
    except ImportError:
        return ways
    theirs = torch.nn.Sequential(
        K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip(), K.auto.RandAugment(n=2, m=9)
    )
    floats = ({**batch, "pixel_values": batch["pixel_values"] / 255} for batch in our_batches(batches, 256, device))
    kornia_batches = ((theirs(batch["pixel_values"]) - 0.5) / 0.5 for batch in floats)
    return ways | {"kornia": lambda: turn(kornia_batches, 256, 30, spare=4)}


def large(folder: Path, device: torch.device) -> dict[str, Turn]:
    dataset = image_set(folder / "jpeg", 400, "jpeg")
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    splits = ImageSplits(undecoded, undecoded.select(range(10)), dataset.features["label"].names, "train", "test")
    prepare(splits, folder / "copy", source={"dataset_name": "jpeg"}, num_processes=1)
    copy = datasets.load_dataset(str(folder / "copy"), cache_dir=str(folder / "cache"), split="train")
    augment, cpu = augmentation(torch.device("cpu")), torch.device("cpu")

    def ours(dataset: datasets.Dataset, finish: Callable[[Any], Any] = lambda batch: augment(batch, 0, 0, 0)) -> Turn:
        rows = TableRows(dataset.cast_column("image", datasets.Image(decode=False)))
        batches = ImageBatches(rows, Preprocessing((224, 224)), crop=RandomCrop("scale", 0.08))
        return functools.partial(turn, map(finish, our_batches(batches, 32, cpu)), 32, 8, spare=1)

    peer = peer_loader(dataset, large_transform, 32, 0)
    ways = {
        "Pillow, each sample": lambda: turn(peer, 32, 8, spare=1),
        "ours": ours(dataset),
        "ours, the host's share when a GPU does the rest": ours(dataset, lambda batch: batch),
        "ours, from the smaller copy": ours(copy),
        "ours, from the smaller copy, the host's share": ours(copy, lambda batch: batch),
    }
    if theirs := timm_transform(224):
        timm_loader = peer_loader(dataset, theirs, 32, 0)
        ways["timm's transforms, each sample"] = lambda: turn(timm_loader, 32, 8, spare=1)
    return {name: functools.partial(on_one_core, way) for name, way in ways.items()}


def on_one_core(way: Turn) -> float:
    """With all threads of this process on one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    for task in tasks:
        os.sched_setaffinity(task, {min(cores)})
    try:
        return way()
    finally:
        for task in tasks:
            os.sched_setaffinity(task, cores)
        torch.set_num_threads(threads)


def fractal(folder: Path, device: torch.device) -> dict[str, Turn]:
    def draw(options: str) -> float:
        rows = FractalRows(parse_options(options), "train")  # the search for the classes is done once a process
        start = time.perf_counter()
        rows.read(np.arange(600))
        return 600 / (time.perf_counter() - start)

    ways = {
        "64 pixels, in colour": "num_classes=100,image_size=64",
        "64 pixels, grey": "num_classes=100,image_size=64,colour=false",
        "224 pixels, in colour": "num_classes=100,image_size=224",
    }
    return {name: functools.partial(on_one_core, functools.partial(draw, text)) for name, text in ways.items()}


def training(folder: Path, device: torch.device) -> dict[str, Turn]:
    on_gpu = device.type == "cuda"
    preset, batch_size, steps = ("vit-small-patch4-32", 1024, 60) if on_gpu else ("vit-demo-patch8-32", 128, 30)
    dataset = image_set(folder / "training", 10_000, "png")
    rows = TableRows(dataset.cast_column("image", datasets.Image(decode=False)))
    batches = ImageBatches(rows, Preprocessing((32, 32)), decoded(rows, Preprocessing((32, 32)), str(folder)))
    batches.place_on_device(device)
    accelerator = accelerate.Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
    augment = augmentation(device, crop=RandomCrop("padding", 4), policies=[rand_augment], mixing=Mixing(0.2))

    def new_state() -> TrainState:
        torch.manual_seed(0)
        model = from_preset(preset, [str(k) for k in range(10)], {})
        return prepare_state(
            accelerator, model, plan, optimizer=OptimizerSettings("adamw_torch", 1e-3, 0.1), max_grad_norm=1.0
        )

    plan = plan_batches(batch_size, 1, None)
    state, ceiling_state = new_state(), new_state()
    stream, numbers = our_batches(batches, batch_size, device), itertools.count()

    def our_loop() -> float:
        output_dir = folder / f"run-{next(numbers)}"
        output_dir.mkdir()
        schedule = Schedule(len(batches), batch_size, steps, warmup_steps=0, learning_rate=1e-3, kind="constant")
        settings = LoopSettings(output_dir, start_time=0.0, seed=0, max_grad_norm=1.0)
        train(state, stream, plan, schedule, settings, augment, cross_entropy, [Log(schedule.cadence(steps))])
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        return lines[0]["images_per_second"]

    pixel_values, targets = augment(next(our_batches(batches, batch_size, device)), 0, 0, 0)

    def ceiling() -> float:
        engine, optimizer = ceiling_state.engine, ceiling_state.optimizer
        start = time.perf_counter()
        for _ in range(steps):
            accelerator.backward(cross_entropy(engine(pixel_values=pixel_values).logits.float(), targets))
            norm = accelerator.clip_grad_norm_(engine.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        norm.item()  # the device has finished
        return steps * batch_size / (time.perf_counter() - start)

    return {
        "one resident batch": ceiling,
        "ours": our_loop,
        "transformers.Trainer": functools.partial(trainer_loop, folder, dataset, preset, batch_size, steps, device),
    }


class Stopwatch(transformers.TrainerCallback):
    """The time of the second half of a run."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step in (args.max_steps // 2, args.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times = [*getattr(self, "times", []), time.perf_counter()]


def trainer_loop(folder, dataset, preset, batch_size, steps, device) -> float:
    """transformers.Trainer with the transform in Pillow, as its examples have it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    stopwatch = Stopwatch()
    on_gpu = device.type == "cuda"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=batch_size, max_steps=steps, report_to="none",
        save_strategy="no", logging_strategy="no", remove_unused_columns=False, disable_tqdm=True, use_cpu=not on_gpu,
        bf16=on_gpu, dataloader_num_workers=CORES if on_gpu else 0, learning_rate=1e-3, max_grad_norm=1.0,
    )  # fmt: skip
    model = from_preset(preset, [str(k) for k in range(10)], {})
    transformers.Trainer(
        model, arguments, train_dataset=dataset.with_transform(small_transform), callbacks=[stopwatch]
    ).train()
    first, last = stopwatch.times
    return (steps - steps // 2) * batch_size / (last - first)


FIGURES = {"small": small, "large": large, "fractal": fractal, "training": training}


def measure(ways: dict[str, Turn], rounds: int) -> list[dict[str, Any]]:
    """Rows {way, images_per_second, faster}: the median of the rounds, and how often faster than the first way, within
    a round: quartiles."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(ways), len(ways)):
            rate = ways[name]()
            if number:  # the first one warms up
                rates[name].append(rate)
    base = next(iter(ways))
    return [
        {
            "way": name,
            "images_per_second": statistics.median(found),
            "faster": np.quantile(np.array(found) / np.array(rates[base]), (0.25, 0.5, 0.75)).tolist(),
        }
        for name, found in rates.items()
    ]


def table(report: dict[str, Any]) -> str:
    """A report as Markdown."""
    machine, versions = report["machine"], report["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"{where}; {software}; commit {report['commit']}; {report['date'][:10]}", f"`{report['command']}`", ""]
    lines += ["| figure | way | images/s | times the first |", "|---|---|---:|---:|"]
    for row in report["rows"]:
        low, middle, high = row["faster"]
        lines.append(
            f"| {row['figure']} | {row['way']} | {row['images_per_second']:,.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", default=",".join(FIGURES), help="which, by comma")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timm", help="folder with timm and torchvision, to measure timm's transforms too")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of such files, and stop")
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(table(read_report(path)) for path in args.table))
        return
    chosen = args.figures.split(",")
    if not set(chosen) <= set(FIGURES):
        raise ArgumentError(f"--figures: {args.figures!r}, allowed are {', '.join(FIGURES)}")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output: {args.output.parent} is no folder")
    if args.timm:
        sys.path.append(args.timm)  # only now: transformers would take torchvision for its own use
    keep_freed_memory()
    datasets.disable_progress_bars()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    report = environment(device) | {"rows": []}
    others = [name for name in ("datasets", "timm", "torchvision", "kornia") if importlib.util.find_spec(name)]
    report["versions"] |= {name: importlib.metadata.version(name) for name in others}
    for figure in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(FIGURES[figure](Path(folder), device), args.rounds)
        report["rows"] += [{"figure": figure, **row} for row in rows]
    print(table(report))
    if args.output:
        write_json(report, args.output)


if __name__ == "__main__":
    exit_with(main)
