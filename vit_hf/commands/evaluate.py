"""`vit-hf evaluate`: accuracy and loss of a model on a split of a set."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import parse
from vit_hf.arguments.fields import (
    DatasetArguments,
    GivenModelArguments,
    LoadingArguments,
    PreprocessingArguments,
    WaitingArguments,
    flag,
)
from vit_hf.errors import ArgumentError, UserError


@dataclass
class EvaluateArguments(
    WaitingArguments, PreprocessingArguments, LoadingArguments, DatasetArguments, GivenModelArguments
):
    """Flags of `vit-hf evaluate`; the model is positional."""

    output_dir: str | None = flag(None, "where eval_results.json goes (default: the model's folder, else here)")
    split_seed: int | None = flag(
        None,
        "which images are held out of a set without an evaluation split (default: the run's)",
        low=0,
        high=2**32 - 1,
    )


def main(argv: list[str]) -> None:
    """Evaluates a model on a split of a dataset; writes eval_results.json."""
    args = parse(EvaluateArguments, argv, prog="vit-hf evaluate", description=main.__doc__, positional="model")
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    from vit_hf.data.faults import DataReport
    from vit_hf.data.preprocessing import own_preprocessing
    from vit_hf.data.sets.load import load_image_splits
    from vit_hf.data.sets.subset import SubsetRule
    from vit_hf.hub.export import write_json
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.presets import load_pretrained
    from vit_hf.parts import image_sizes_of, make_evaluate, make_preprocessing, model_errors, start
    from vit_hf.training.accelerator import end
    from vit_hf.training.waiting import main_process_first

    accelerator = start(args)
    with model_errors(args):
        model = load_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code, need_head=True
        )
        fixed = getattr(model.config, "image_size", None)
        own = own_preprocessing(args.model, args.revision, pair(fixed or 224))
        size = pair(fixed or (own.image_size if own else 224))
    load = functools.partial(
        load_image_splits,
        args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name,
        eval_split=args.eval_split,
        max_eval_samples=args.max_eval_samples,
        split_seed=trained_split_seed(args.model) if args.split_seed is None else args.split_seed,
        need_train=False,
        streaming=args.streaming,
    )
    known = list(model.config.id2label.values())
    doing = f"loading {args.dataset_name}"
    splits = main_process_first(accelerator, load, doing)
    if len(known) < len(splits.class_names) and set(known) < set(splits.class_names):  # trained with --subset_classes
        load = functools.partial(load, subset=SubsetRule(classes=known))
        splits = main_process_first(accelerator, load, doing)
        accelerator.print(f"note: the model knows {len(known)} of the classes; only their images are evaluated")
    class_index = match_classes(splits.class_names, known)
    if class_index is None:
        accelerator.print("note: the model and the dataset name their classes differently; they are compared by index")
    preprocessing = make_preprocessing(
        args, size, own, functools.partial(image_sizes_of, splits.rows("eval"), accelerator)
    )
    accelerator.print(f"preprocessing: {preprocessing}")
    report = DataReport(accelerator, args.on_bad_image)
    model.to(accelerator.device).eval()
    run = make_evaluate(
        args, model, splits.rows("eval"), preprocessing, accelerator, report.eval, class_index, keep=False
    )
    with accelerator.autocast():
        results = run()
    results |= report.collect()
    results |= {"model": args.model, "dataset_name": args.dataset_name, "eval_split": splits.eval_split}
    results["preprocessing"] = str(preprocessing)
    if accelerator.is_main_process:
        default = Path(args.model) if Path(args.model).is_dir() else Path(".")
        folder = Path(args.output_dir) if args.output_dir else default
        folder.mkdir(parents=True, exist_ok=True)
        write_json(results, folder / "eval_results.json")
        print("\n".join(f"{key:20} {_show(value)}" for key, value in results.items()))
        print(f"written to {folder / 'eval_results.json'}")
    end(accelerator)


def trained_split_seed(model: str) -> int:
    """The --split_seed of the run that made a local model: it decides which images were held out of a set that has no
    evaluation split of its own."""
    try:
        config = yaml.safe_load((Path(model) / "run_config.yaml").read_text())
        return int(config.get("split_seed", config["seed"]))  # an older run had one seed for both
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
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


def _show(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
