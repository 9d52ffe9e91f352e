"""The command `vit-hf`: what models there are, their evaluation and conversion; finished runs side by side."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import (
    EvaluateArguments,
    Parser,
    PrepareArguments,
    ShowArguments,
    check_augmentation,
    check_subset,
    parse,
    parse_image_size,
    parse_num_workers,
)
from vit_hf.errors import ArgumentError, UserError, exit_with, nearest

USAGE = """usage: vit-hf COMMAND ...

commands:
  models [NAME]                        the presets: size, operations and memory of each; the shapes inside one
  convert SOURCE DIR [--to timm]       weights of timm or google-research (.npz) as a model folder, or a model as timm's
  evaluate MODEL --dataset_name NAME   accuracy and loss of a folder or Hub id, also under accelerate launch
  data prepare --dataset_name NAME --output_dir DIR   a copy of a set with smaller images, as parquet shards
  data show --dataset_name NAME --config RECIPE       a picture: images of a set beside what training makes of them
  report RUN [RUN ...]                 finished runs side by side: a table and a PNG of their curves

vit-hf COMMAND --help says more."""


def main() -> None:
    """Entry point of the console script."""
    exit_with(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> None:
    """Runs one command. Raises ArgumentError for one that does not exist."""
    commands = {"models": models, "convert": convert, "evaluate": evaluate, "data": data, "report": report}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in commands:
        raise ArgumentError(f"unknown command {argv[0]!r}, {nearest(argv[0], commands)}")
    commands[argv[0]](argv[1:])


def models(argv: list[str]) -> None:
    """Lists the presets, one a line, at 1,000 classes; or shows what becomes of an image in one of them."""
    parser = Parser(prog="vit-hf models", description=models.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset")
    parser.add_argument("--config_overrides", help='with NAME: fields of its configuration, e.g. "pooling=mean"')
    args = parser.parse_args(argv)
    if args.config_overrides and not args.name:
        raise ArgumentError("--config_overrides goes with the NAME of a preset")
    from vit_hf.models.presets import PRESETS, parse_overrides, preset_config
    from vit_hf.models.summary import stages, summarise

    form = "{:38} {:>10}  {:>6}  {:>8}  {:>9}  {:>9}"
    header = form.format("preset", "parameters", "tokens", "GFLOPs", "states", "an image")
    try:
        changes = parse_overrides(args.config_overrides)
        configs = {
            name: preset_config(name, changes, num_labels=1000) for name in ([args.name] if args.name else PRESETS)
        }
        parts = stages(configs[args.name]) if args.name else []
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # the latter where torch has no such size
        raise ArgumentError(f"model {args.name}: {' '.join(str(error).split())[:300]}") from None
    print(header)
    for name, config in configs.items():
        size = summarise(config)
        row = form.format(
            name,
            f"{size.num_parameters / 1e6:.1f} M",
            size.num_tokens or "-",
            f"{size.forward_flops / 1e9:.{1 if size.forward_flops > 1e10 else 2}f}",
            f"{size.state_bytes / 2**30:.2f} GiB",
            f"{size.activation_bytes / 2**20:.1f} MiB",
        )
        print(row, flush=True)
    if args.name:
        width = max(len(part) for part, _ in parts)
        print(f"\n{'part':{width}}  shape, for one image")
        inner = [part for part, _ in parts if part.startswith("vit.layers.")][1:-1]  # all the same
        for part, shape in parts:
            if part not in inner:
                print(f"{part:{width}}  {' x '.join(map(str, shape))}")
            elif part == inner[0]:
                print("...")
    print(
        "\nGFLOPs: one image forward, two operations a multiply-add. Memory of training: states (fp32 weights,\n"
        "gradients, AdamW) + images at once x an image (bf16 mixed precision), and what the framework takes."
    )


def convert(argv: list[str]) -> None:
    """Converts weights: from timm (a Hub folder, or a .safetensors file), google-research/vision_transformer (.npz) or a
    model folder, to a model folder or to timm's."""
    parser = Parser(prog="vit-hf convert", description=convert.__doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder, .safetensors or .npz file")
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write; it must not hold a model yet")
    parser.add_argument("--to", default="vit_hf", metavar="{vit_hf,timm}", help="whose format (default: vit_hf)")
    args = parser.parse_args(argv)
    if args.to not in ("vit_hf", "timm"):
        raise ArgumentError(f"--to: {args.to!r} is not one of vit_hf, timm")
    if (args.directory / "config.json").exists() or args.directory.is_file():
        raise UserError(f"{args.directory} holds a model already, or is a file; name another folder")
    import transformers
    from safetensors import SafetensorError

    from vit_hf.data.decode import Preprocessing, processor_normalisation
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.convert import load_source, save_timm

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, normalisation = load_source(args.source)
        mean, std = normalisation or processor_normalisation(str(args.source), None)
        if args.to == "timm":
            save_timm(model, args.directory, mean, std)
        else:
            size = pair(model.config.image_size)
            model.save_pretrained(args.directory)
            Preprocessing(size, image_mean=tuple(mean), image_std=tuple(std)).image_processor().save_pretrained(
                args.directory
            )
    except (ValueError, OSError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{args.source}: {' '.join(str(error).split())[:400]}") from None
    if args.to == "timm" and model.config.layer_norm_eps != 1e-6:
        print(
            f"note: timm's norms have an eps of 1e-6, this model {model.config.layer_norm_eps:g}; logits differ by it"
        )
    kind = "timm" if args.to == "timm" else ("stock vit" if model.config.is_stock else model.config.model_type)
    print(f"{args.directory}: {kind}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def evaluate(argv: list[str]) -> None:
    """Evaluates a model on a split of a dataset; writes eval_results.json."""
    args = parse(EvaluateArguments, argv, prog="vit-hf evaluate", description=evaluate.__doc__, positional="model")
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    parse_num_workers(args.dataloader_num_workers)
    from vit_hf.data.decode import Preprocessing, processor_config
    from vit_hf.data.sources import load_image_splits
    from vit_hf.data.subset import SubsetRule
    from vit_hf.hub.export import write_json
    from vit_hf.models.presets import load_pretrained
    from vit_hf.parts import DataReport, main_process_first, make_evaluate, model_errors, start
    from vit_hf.training.accelerator import end

    accelerator = start(args)
    with model_errors(args):
        model = load_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code, need_head=True
        )
        size = getattr(model.config, "image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        preprocessing = Preprocessing.from_config(processor_config(args.model, args.revision), size)
    load = functools.partial(
        load_image_splits,
        args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name,
        eval_split=args.eval_split,
        max_eval_samples=args.max_eval_samples,
        seed=trained_seed(args) if args.seed is None else args.seed,
        need_train=False,
        streaming=args.streaming,
    )
    known = list(model.config.id2label.values())
    splits = main_process_first(accelerator, load)
    if len(known) < len(splits.class_names) and set(known) < set(splits.class_names):  # trained with --subset_classes
        splits = main_process_first(accelerator, functools.partial(load, subset=SubsetRule(classes=known)))
        accelerator.print(f"note: the model knows {len(known)} of the classes; only their images are evaluated")
    class_index = match_classes(splits.class_names, known)
    if class_index is None:
        accelerator.print("note: the model and the dataset name their classes differently; they are compared by index")
    report = DataReport(accelerator, args.on_bad_image)
    model.to(accelerator.device).eval()
    run = make_evaluate(args, model, splits.eval, preprocessing, accelerator, report.eval, class_index, keep=False)
    with accelerator.autocast():
        results = run()
    results |= report.collect()
    results |= {"model": args.model, "dataset_name": args.dataset_name, "eval_split": splits.eval_split}
    if accelerator.is_main_process:
        default = Path(args.model) if Path(args.model).is_dir() else Path(".")
        folder = Path(args.output_dir) if args.output_dir else default
        folder.mkdir(parents=True, exist_ok=True)
        write_json(results, folder / "eval_results.json")
        print("\n".join(f"{key:20} {_show(value)}" for key, value in results.items()))
        print(f"written to {folder / 'eval_results.json'}")
    end(accelerator)


def trained_seed(args: EvaluateArguments) -> int:
    """The seed of the run that made a local model: it decides which images were held out of a set that has no
    evaluation split of its own."""
    try:
        return int(yaml.safe_load((Path(args.model) / "run_config.yaml").read_text())["seed"])
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return 0


def match_classes(dataset_names: list[str], model_names: list[str]) -> list[int] | None:
    """For each class of the dataset its index in the model; None: the names tell nothing, the numbers agree. (Names may
    repeat: many models of ImageNet have two cranes, and a name that repeats finds no index.)

    Raises:
        UserError: the model has no such classes.
    """
    if dataset_names == model_names:
        return list(range(len(model_names)))
    if set(dataset_names) <= set(model_names) and len(set(model_names)) == len(model_names):
        return [model_names.index(name) for name in dataset_names]
    if len(dataset_names) == len(model_names):
        return None
    raise UserError(
        f"the model has {len(model_names)} classes ({', '.join(model_names[:3])}, ...), the dataset "
        f"{len(dataset_names)} others ({', '.join(dataset_names[:3])}, ...); choose another --dataset_name, or fine-tune"
    )


def data(argv: list[str]) -> None:
    """Copies a set with smaller images, or shows what training makes of one."""
    commands = {"prepare": prepare_data, "show": show_data}
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(line for line in USAGE.splitlines() if line.startswith("  data ")))
        return
    if argv[0] not in commands:
        raise ArgumentError(f"unknown command 'data {argv[0]}', {nearest(argv[0], commands)}")
    commands[argv[0]](argv[1:])


def prepare_data(argv: list[str]) -> None:
    """Writes a copy of a set whose images have at most --shorter_side pixels on their shorter side; started again after
    an interruption it makes only what is missing."""
    args = parse(PrepareArguments, argv, prog="vit-hf data prepare", description=prepare_data.__doc__)
    for needed in ("dataset_name", "output_dir"):
        if not getattr(args, needed):
            raise ArgumentError(f"--{needed} is missing")
    check_subset(args)
    from vit_hf.data.prepare import prepare
    from vit_hf.parts import splits_loader

    splits = splits_loader(args)(revision=args.revision)
    for note in splits.notes:
        print(f"note: {note}")
    decides = ("dataset_name", "dataset_config_name", "revision", "max_train_samples", "max_eval_samples", "seed")
    try:
        written = prepare(
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
        raise
    for split, counts in written.items():
        left_out = f", {counts['skipped']} left out" if counts["skipped"] else ""
        print(
            f"{split}: {counts['rows']} images in {counts['shards']} shards, {counts['bytes'] / 1e6:.1f} MB{left_out}"
        )
    print(f"use it by --dataset_name {args.output_dir}")


def show_data(argv: list[str]) -> None:
    """Draws a contact sheet: images of a set beside what the transforms of a recipe make of them, with labels."""
    args = parse(ShowArguments, argv, prog="vit-hf data show", description=show_data.__doc__)
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    check_subset(args)
    check_augmentation(args)
    formats = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
    if Path(args.output_file).suffix.lower() not in formats:
        raise ArgumentError(f"--output_file: {args.output_file} is not a picture, allowed are {', '.join(formats)}")
    import numpy as np

    from vit_hf.analysis.figures import contact_sheet
    from vit_hf.parts import model_errors, show_augmentation, splits_loader

    with model_errors(args):
        size = parse_image_size(args.image_size) or model_image_size(args)
    splits = splits_loader(args)(streaming=args.streaming)
    originals, augmented, labels, targets = show_augmentation(args, splits, size)

    def named(target: np.ndarray) -> str:
        parts = [(target[k], splits.class_names[k]) for k in np.argsort(-target)[:2] if target[k] > 0.005]
        return parts[0][1] if len(parts) == 1 else " + ".join(f"{share:.2f} {name}" for share, name in parts)

    texts = [[named(target) for target in row] for row in targets]
    figure = contact_sheet(originals, augmented, [splits.class_names[label] for label in labels], texts)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output_file, dpi=120)
    print(args.output_file)


def model_image_size(args: ShowArguments) -> Any:
    """The input of the model that the flags name, in pixels; 224 where they name none."""
    if args.preset is not None:
        from vit_hf.models.presets import preset_config

        return preset_config(args.preset).image_size
    if args.model_name_or_path is not None:
        import transformers

        import vit_hf.models  # noqa: F401  (its classes register themselves)

        return transformers.AutoConfig.from_pretrained(args.model_name_or_path, revision=args.revision).image_size
    return 224


def report(argv: list[str]) -> None:
    """Prints a table of finished runs and draws their learning curves."""
    parser = Parser(prog="vit-hf report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output_dir", type=Path, help="where learning_curves.png goes (default: beside the runs)")
    args = parser.parse_args(argv)
    from vit_hf.analysis.figures import learning_curves
    from vit_hf.training.tracking import read_jsonl

    rows, curves = [["run", "parameters", "images/s", "accuracy", "wall time"]], {}
    for run in args.runs:
        try:
            results: dict[str, Any] = json.loads((run / "all_results.json").read_text())
        except OSError:
            raise UserError(f"{run} holds no finished run (all_results.json is missing)") from None
        name = run.name if [other.name for other in args.runs].count(run.name) == 1 else str(run)
        curves[name] = read_jsonl(run / "metrics.jsonl")
        speeds = sorted(line["images_per_second"] for line in curves[name] if "images_per_second" in line)
        rows.append(
            [
                name,
                f"{results['num_parameters'] / 1e6:.2f} M",
                f"{speeds[len(speeds) // 2]:.0f}",  # the median line: the first one holds the warm-up of the machine
                f"{results['eval_accuracy']:.4f}",
                f"{results['wall_time_seconds']:.0f} s",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    folder = args.output_dir or args.runs[0].resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    learning_curves(curves).savefig(folder / "learning_curves.png", dpi=120)
    print(f"\nlearning curves: {folder / 'learning_curves.png'}")


def _show(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
