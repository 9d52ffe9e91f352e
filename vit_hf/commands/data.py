"""`vit-hf data`: a smaller copy of a set; what training makes of its images; how fast they come; what is kept."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_hf.arguments import (
    RandomCrop,
    RunArguments,
    check_augmentation,
    check_loading,
    check_one_model,
    check_subset,
    parse,
    pick,
)
from vit_hf.arguments.fields import DatasetArguments, SubsetArguments, flag
from vit_hf.errors import TOLD, ArgumentError, UserError, model_errors, nearest

USAGE = """usage: vit-hf data COMMAND ...

commands:
  prepare --dataset_name NAME --output_dir DIR   a copy of a set with smaller images, as parquet shards
  show --dataset_name NAME --config RECIPE       a picture: images of a set beside what training makes of them
  bench --config RECIPE                          images a second of the loader alone, on this machine
  cache [--clear] [--dataset_name NAME]          the sets that are kept decoded, or their end"""


@dataclass
class PrepareArguments(SubsetArguments, DatasetArguments):
    """Flags of `vit-hf data prepare`."""

    revision: str | None = flag(None, "branch, tag or commit of the Hub dataset")
    output_dir: str | None = flag(None, "folder of the copy, to be used as --dataset_name")
    shorter_side: int = flag(256, "most pixels of an image's shorter side", low=1)
    jpeg_quality: int = flag(90, "of the images that are made smaller", low=1, high=100)
    num_proc: int | None = flag(None, "worker processes (default: all cores)", low=1)


@dataclass
class CacheArguments:
    """Flags of `vit-hf data cache`."""

    clear: bool = flag(False, "remove them instead of listing them; what a running process uses stays")
    dataset_name: str | None = flag(None, "only those of this set, as it was named when it was decoded")


@dataclass
class ShowArguments(RunArguments):
    """Flags of `vit-hf data show`: those of a run, and the picture."""

    output_file: str = flag("contact_sheet.png", "the picture")


def main(argv: list[str]) -> None:
    """Runs one of the commands for sets."""
    from vit_hf.commands.data_bench import bench

    commands = {"prepare": prepare, "show": show, "bench": bench, "cache": cache}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in commands:
        raise ArgumentError(f"unknown command 'data {argv[0]}', {nearest(argv[0], commands)}")
    commands[argv[0]](argv[1:])


def prepare(argv: list[str]) -> None:
    """Writes a copy of a set whose images have at most --shorter_side pixels on their shorter side; started again after
    an interruption it makes only what is missing."""
    args = parse(PrepareArguments, argv, prog="vit-hf data prepare", description=prepare.__doc__)
    for needed in ("dataset_name", "output_dir"):
        if not getattr(args, needed):
            raise ArgumentError(f"--{needed} is missing")
    check_subset(args)
    from vit_hf.data.copy.prepare import prepare as prepare_copy
    from vit_hf.data.sets.load import SetSettings, load_set

    splits = load_set(pick(SetSettings, args))
    for note in splits.notes:
        print(f"note: {note}")
    decides = (
        "dataset_name",
        "dataset_config_name",
        "revision",
        "max_train_samples",
        "max_eval_samples",
        "split_seed",
    )
    try:
        written = prepare_copy(
            splits,
            Path(args.output_dir),
            source={name: getattr(args, name) for name in decides},
            shorter_side=args.shorter_side,
            jpeg_quality=args.jpeg_quality,
            rows_per_shard=min(4096, max(100, -(-len(splits.train) // 32))),  # small sets too have shards to deal out
            num_processes=args.num_proc,
            on_bad_image=args.on_bad_image,
        )
    except KeyboardInterrupt:
        print("\nstopped; finished shards are kept, and the same command goes on", file=sys.stderr)
        raise KeyboardInterrupt(TOLD) from None
    for split, counts in written.items():
        left_out = f", {counts['skipped']} left out" if counts["skipped"] else ""
        print(
            f"{split}: {counts['rows']} images in {counts['shards']} shards, {counts['bytes'] / 1e6:.1f} MB{left_out}"
        )
    print(f"use it by --dataset_name {args.output_dir}")


def show(argv: list[str]) -> None:
    """Draws a contact sheet: images of a set beside what the transforms of a recipe make of them, with labels."""
    args = parse(ShowArguments, argv, prog="vit-hf data show", description=show.__doc__)
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    check_subset(args)
    check_augmentation(args)
    check_loading(args)
    check_one_model(args)
    formats = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
    if Path(args.output_file).suffix.lower() not in formats:
        raise ArgumentError(f"--output_file: {args.output_file} is not a picture, allowed are {', '.join(formats)}")
    import numpy as np

    from vit_hf.analysis.figures import contact_sheet
    from vit_hf.data.sets.load import SetSettings, load_set

    size, own = model_input(args)
    splits = load_set(pick(SetSettings, args, revision=None))  # args.revision is the model's
    originals, augmented, labels, targets = show_augmentation(args, splits, size, own)

    def named(target: np.ndarray) -> str:
        largest = np.argsort(-target, kind="stable")[: 4 if splits.multi_label else 2]
        parts = [(target[k], splits.class_names[k]) for k in largest if target[k] > 0.005]
        if all(share == 1 for share, _ in parts):
            return ", ".join(name for _, name in parts)
        return parts[0][1] if len(parts) == 1 else " + ".join(f"{share:.2f} {name}" for share, name in parts)

    texts = [[named(target) for target in row] for row in targets]
    shown = [
        named(np.asarray(label, dtype=float)) if splits.multi_label else splits.class_names[label] for label in labels
    ]
    figure = contact_sheet(originals, augmented, shown, texts)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output_file, dpi=120)
    print(args.output_file)


def model_input(args: RunArguments) -> tuple[tuple[int, int], Any]:
    """The (height, width) in pixels that the model of the flags takes, 224 where they name none; and what the model says
    of its images, None: nothing."""
    from vit_hf.data.preprocessing import own_preprocessing
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.transfer import ModelSettings, published_image_size

    settings = pick(ModelSettings, args)
    with model_errors(args.preset, args.model_name_or_path):
        asked = settings.changes.get("image_size")
        size = pair(asked) if asked else published_image_size(settings)
        return size, own_preprocessing(args.model_name_or_path, args.revision, size)


def show_augmentation(args: Any, splits: Any, size: Any, own: Any = None, images: int = 8, visits: int = 5) -> tuple:
    """Some training images, and what becomes of them in the first epochs.

    Args:
        size: the model's input. own: what the model says of its images.

    Returns:
        originals uint8 (N, H, W, 3); augmented uint8 (N, M, H, W, 3); labels, N class numbers, or bool (N, K); targets float
        (N, M, K).
    """
    import functools

    import numpy as np
    import torch

    from vit_hf.data.augment.pipeline import AugmentSettings, make_augment
    from vit_hf.data.batches import ImageBatches
    from vit_hf.data.feed import LoadingSettings, fit_preprocessing, open_batches
    from vit_hf.data.order import BatchIndices, epoch_order
    from vit_hf.data.preprocessing import PreprocessingSettings
    from vit_hf.data.processes import Processes
    from vit_hf.data.rows.parquet import ParquetRows

    rows, crop = splits.rows("train"), args.random_crop
    device = torch.device("cpu")
    preprocessing = fit_preprocessing(rows, Processes(device), size, own, pick(PreprocessingSettings, args))
    if isinstance(rows, ParquetRows):
        rows.held_rows = len(rows)  # the few that are shown are read once
    settings = pick(LoadingSettings, args, data_on_device="never")
    make = functools.partial(
        open_batches, rows, preprocessing, device, settings, seed=args.seed, training=True, keep=False
    )
    batches, plain = make(crop=crop), make()
    augment = make_augment(  # the steps are counted in epochs: one of each is shown
        pick(AugmentSettings, args),
        preprocessing,
        device,
        seed=args.seed,
        num_classes=len(splits.class_names),
        crop=RandomCrop() if batches.crop.while_decoding else crop,
        first_step_of=lambda epoch: epoch,
    )
    mean, std = (numbers[:, None, None] for numbers in (augment.mean, augment.std))
    index = epoch_order(args.seed, 0, len(batches))[:images]

    def take(source: ImageBatches, visit: int) -> dict[str, Any]:
        places = BatchIndices(np.full_like(index, visit), index, np.ones(len(index), dtype=bool))
        batch = source[places]
        if batch["error"] is not None:
            raise UserError(batch["error"])
        return batch

    first = take(plain, 0)
    augmented, targets = [], []
    for visit in range(visits):
        batch = take(batches, visit)
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
        batch["labels"] = batch["labels"].float() if splits.multi_label else batch["labels"]
        pixel_values, target = augment(batch, step=visit, micro_step=0, rank=0)
        augmented.append(((pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
        targets.append(target)
    return (
        first["pixel_values"].numpy(),
        torch.stack(augmented, dim=1).numpy(),
        first["labels"].tolist(),
        torch.stack(targets, dim=1).numpy(),
    )


def cache(argv: list[str]) -> None:
    """Lists the sets that are kept decoded (set, split, size in pixels, rows of the split, megabytes on the disk, last
    use), or removes them, all or those of one set."""
    args = parse(CacheArguments, argv, prog="vit-hf data cache", description=cache.__doc__)
    from vit_hf.data.cache_folder import CACHE_BYTES, DIGESTS, cache_folder, cached_sets, drop

    folder = cache_folder()
    entries = cached_sets(folder)
    names = sorted({entry.description.get("set") or "-" for entry in entries})
    if args.dataset_name is not None:
        if entries and args.dataset_name not in names:
            raise UserError(f"--dataset_name {args.dataset_name}: is not kept, allowed is one of {', '.join(names)}")
        entries = [entry for entry in entries if entry.description.get("set") == args.dataset_name]
    elif args.clear:
        entries += cached_sets(cache_folder(name=DIGESTS))  # of the subset filter, small
    if not entries:
        print(f"{folder} holds no decoded sets")
        return
    if args.clear:
        dropped = [drop(entry) for entry in entries]
        freed = sum(entry.size_bytes for entry, done in zip(entries, dropped, strict=True) if done)
        in_use = f"; {dropped.count(False)} stay: in use, or not ours to remove" if not all(dropped) else ""
        print(f"{dropped.count(True)} removed, {freed / 1e6:.1f} MB{in_use}")
        return
    print(f"{'set':30} {'split':12} {'pixels':>11} {'rows':>9} {'MB':>9}  last used")
    for entry in entries:
        about = entry.description
        size = " x ".join(map(str, about.get("size", ["-"])))
        shown = f"{about.get('set') or '-':30} {about.get('split') or '-':12} {size:>11} {about.get('rows', '-'):>9}"
        in_use = ", in use" if entry.in_use else ""
        print(f"{shown} {entry.size_bytes / 1e6:9.1f}  {entry.used:%Y-%m-%d %H:%M}{in_use}")
    total = sum(entry.size_bytes for entry in entries)
    print(f"{total / 1e6:.1f} MB in {folder}; above {CACHE_BYTES >> 30} GiB what was used longest ago is dropped")
