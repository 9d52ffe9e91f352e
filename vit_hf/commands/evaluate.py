"""`vit-hf evaluate`: accuracy and loss of a model on a split of a set."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_hf.arguments import parse, pick
from vit_hf.arguments.fields import (
    DatasetArguments,
    GivenModelArguments,
    LoadingArguments,
    PreprocessingArguments,
    WaitingArguments,
    flag,
)
from vit_hf.errors import ArgumentError, UserError, model_errors


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
    from vit_hf.data.augment.pipeline import normaliser
    from vit_hf.data.cache import sampled_sizes
    from vit_hf.data.faults import DataReport
    from vit_hf.data.feed import LoadingSettings, eval_batches
    from vit_hf.data.preprocessing import PreprocessingSettings, choose_preprocessing, own_preprocessing
    from vit_hf.data.processes import Processes
    from vit_hf.data.sets.load import SetSettings, load_splits
    from vit_hf.data.sets.names import trained_split_seed
    from vit_hf.evaluation.evaluate import evaluate_model
    from vit_hf.hub.export import write_json
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.transfer import load_pretrained
    from vit_hf.training.accelerator import build_accelerator, end
    from vit_hf.training.waiting import processes_of

    accelerator = build_accelerator(args.ddp_timeout)
    processes = Processes(**processes_of(accelerator))
    with model_errors(model=args.model):
        model = load_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code, need_head=True
        )
        fixed = getattr(model.config, "image_size", None)
        own = own_preprocessing(args.model, args.revision, pair(fixed or 224))
        size = pair(fixed or (own.image_size if own else 224))
    seed = trained_split_seed(args.model) if args.split_seed is None else args.split_seed
    chosen = pick(SetSettings, args, revision=None, split_seed=seed, need_train=False)  # args.revision is the model's
    known = list(model.config.id2label.values())
    splits = load_splits(chosen, processes)
    if len(known) < len(splits.class_names) and set(known) < set(splits.class_names):  # trained with --subset_classes
        splits = load_splits(dataclasses.replace(chosen, subset_classes=tuple(known)), processes)
        accelerator.print(f"note: the model knows {len(known)} of the classes; only their images are evaluated")
    class_index = match_classes(splits.class_names, known)
    if class_index is None:
        accelerator.print("note: the model and the dataset name their classes differently; they are compared by index")
    rows = splits.rows("eval")
    sizes = functools.partial(sampled_sizes, rows, processes.main_first)
    preprocessing = choose_preprocessing(size, own, sizes, pick(PreprocessingSettings, args))
    accelerator.print(f"preprocessing: {preprocessing}")
    report = DataReport(accelerator, args.on_bad_image)
    model.to(accelerator.device).eval()
    loading = pick(LoadingSettings, args)
    images = eval_batches(rows, preprocessing, processes, loading, report.eval, class_index=class_index, keep=False)
    with accelerator.autocast():
        results = evaluate_model(model, images, normaliser(preprocessing, accelerator.device), accelerator)
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
