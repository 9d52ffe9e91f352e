"""The command `vit-hf`: evaluate a model on all processes; put finished runs side by side."""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import EvaluateArguments, parse
from vit_hf.errors import ArgumentError, UserError, exit_with, nearest

USAGE = """usage: vit-hf COMMAND ...

commands:
  evaluate MODEL --dataset_name NAME   accuracy and loss of a folder or Hub id, also under accelerate launch
  report RUN [RUN ...]                 finished runs side by side: a table and a PNG of their curves

vit-hf COMMAND --help says more."""


def main() -> None:
    """Entry point of the console script."""
    exit_with(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> None:
    """Runs one command. Raises ArgumentError for one that does not exist."""
    commands = {"evaluate": evaluate, "report": report}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in commands:
        raise ArgumentError(f"unknown command {argv[0]!r}, {nearest(argv[0], commands)}")
    commands[argv[0]](argv[1:])


def evaluate(argv: list[str]) -> None:
    """Evaluates a model on a split of a dataset; writes eval_results.json."""
    args = parse(EvaluateArguments, argv, prog="vit-hf evaluate", description=evaluate.__doc__, positional="model")
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    from vit_hf.data.decode import Preprocessing, processor_config
    from vit_hf.data.sources import load_image_splits
    from vit_hf.data.subset import SubsetRule
    from vit_hf.hub.export import write_json
    from vit_hf.models.presets import load_pretrained
    from vit_hf.parts import count_bad, main_process_first, make_evaluate, model_errors, start

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
    )
    known = list(model.config.id2label.values())
    splits = main_process_first(accelerator, load)
    if len(known) < len(splits.class_names) and set(known) < set(splits.class_names):  # trained with --subset_classes
        splits = main_process_first(accelerator, functools.partial(load, subset=SubsetRule(classes=known)))
        accelerator.print(f"note: the model knows {len(known)} of the classes; only their images are evaluated")
    class_index = match_classes(splits.class_names, known)
    if class_index is None:
        accelerator.print("note: the model and the dataset name their classes differently; they are compared by index")
    bad: dict[int, str] = {}
    model.to(accelerator.device).eval()
    run = make_evaluate(args, model, splits.eval, preprocessing, accelerator, bad, class_index)
    with accelerator.autocast():
        results = run()
    results |= count_bad(args, accelerator, {"eval": bad})
    results |= {"model": args.model, "dataset_name": args.dataset_name, "eval_split": splits.eval_split}
    if accelerator.is_main_process:
        default = Path(args.model) if Path(args.model).is_dir() else Path(".")
        folder = Path(args.output_dir) if args.output_dir else default
        folder.mkdir(parents=True, exist_ok=True)
        write_json(results, folder / "eval_results.json")
        print("\n".join(f"{key:20} {_show(value)}" for key, value in results.items()))
        print(f"written to {folder / 'eval_results.json'}")
    accelerator.end_training()


def trained_seed(args: EvaluateArguments) -> int:
    """The seed of the run that made a local model: it decides which images were held out of a set that has no
    evaluation split of its own."""
    try:
        return int(yaml.safe_load((Path(args.model) / "run_config.yaml").read_text())["seed"])
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return 0


def match_classes(dataset_names: list[str], model_names: list[str]) -> list[int] | None:
    """For each class of the dataset its index in the model; None: the names tell nothing, the numbers agree. (Names may
    repeat: ImageNet's WordNet lemmas have two cranes, and a name that repeats finds no index.)

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


def report(argv: list[str]) -> None:
    """Prints a table of finished runs and draws their learning curves."""
    parser = argparse.ArgumentParser(prog="vit-hf report", description=report.__doc__)
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
