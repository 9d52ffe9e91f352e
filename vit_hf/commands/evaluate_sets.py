"""The sets that `vit-hf evaluate` judges a model on, one after the other, and what is kept of all of them."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_hf.arguments import pick
from vit_hf.commands.given import GivenImages, GivenModel, open_images, set_settings
from vit_hf.errors import ArgumentError

RESULTS = "eval_results.json"
COLUMNS = ("eval_accuracy", "eval_accuracy_top5", "eval_loss", "eval_samples")


def chosen_sets(args: Any) -> list[Any]:
    """The sets (EvalSet) that the flags name, looked at before anything is loaded.

    Raises:
        ArgumentError: none, both flags, or a name that cannot be right.
    """
    if args.dataset_name is None and not args.eval_datasets:
        raise ArgumentError("--dataset_name is missing; --eval_datasets names several sets")
    if args.dataset_name is not None and args.eval_datasets:
        raise ArgumentError(
            f"--dataset_name {args.dataset_name} and --eval_datasets {','.join(args.eval_datasets)} exclude each other: "
            "give one of them"
        )
    from vit_hf.data.sets.benchmarks import EvalSet, eval_sets

    return [EvalSet(args.dataset_name, args.dataset_name)] if args.dataset_name else eval_sets(args.eval_datasets)


def check_sets(sets: list[Any], args: Any, accelerator: Any) -> None:
    """Raises UserError where one of several sets cannot be had, before the first is evaluated."""
    from vit_hf.data.processes import Processes
    from vit_hf.data.sets.benchmarks import reassessed_labels
    from vit_hf.data.sets.load import check_available
    from vit_hf.training.waiting import processes_of

    def check() -> bool:
        for one in sets:
            if one.benchmark is not None and one.benchmark.relabelled:
                reassessed_labels()
            check_available(one.dataset_name, None if one.benchmark else args.dataset_config_name)
        return True

    if len(sets) > 1:
        Processes(**processes_of(accelerator)).main_first(check, "looking for the sets")


def open_set(given: GivenModel, accelerator: Any, one: Any, args: Any) -> tuple[GivenImages, Any]:
    """The images of one set with the model's labels, and the classes among which the model chooses, int64 (k,) (None:
    all).

    Raises:
        UserError: as `open_images`; a benchmark whose labels cannot be matched.
    """
    from vit_hf.data.feed import LoadingSettings
    from vit_hf.data.preprocessing import PreprocessingSettings
    from vit_hf.data.sets.benchmarks import label_map, reassess, reassessed_labels

    open_it = functools.partial(open_images, given, accelerator)
    inputs, loading = pick(PreprocessingSettings, args), pick(LoadingSettings, args)
    if one.benchmark is None:
        return open_it(set_settings(args, args.model, dataset_name=one.dataset_name), inputs, loading), None
    benchmark, known = one.benchmark, list(given.class_names)
    where = {"dataset_name": one.dataset_name, "dataset_config_name": None, "only_judged": True}
    if not one.is_copy:
        where |= {
            "eval_split": benchmark.split,
            "image_column_name": benchmark.image_column_name,
            "label_column_name": benchmark.label_column_name,
        }
    _, among = label_map([], known, benchmark)  # a model of other classes is told before images are loaded
    class_index_of = lambda names: label_map(names, known, benchmark)[0]  # noqa: E731
    images = open_it(set_settings(args, args.model, **where), inputs, loading, class_index_of)
    if benchmark.relabelled:
        place = label_map([str(number) for number in range(1000)], known, benchmark)[0]
        labels = [[place[number] for number in row] for row in reassess(images.rows, reassessed_labels())]
        images = dataclasses.replace(images, batches=Relabelled(images.batches, labels, len(known)))
    return images, among


class Relabelled:
    """Batches whose images have any number of labels: float (B, K) of 0 and 1; one without a label does not count.

    Args:
        labels: of each row, numbers of classes.
    """

    def __init__(self, batches: Any, labels: list[list[int]], num_classes: int):
        self.batches, self.labels, self.num_classes = batches, labels, num_classes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        for batch in self.batches:
            several = torch.zeros(len(batch["index"]), self.num_classes)
            for place, row in enumerate(batch["index"].tolist()):
                several[place, self.labels[row]] = 1
            valid, device = batch["valid"], batch["labels"].device
            valid = valid & (several.sum(1) > 0).to(valid.device)
            yield batch | {"labels": several.to(device), "valid": valid}


def about_set(one: Any, images: GivenImages, among: Any, config: str | None) -> dict[str, Any]:
    """What is told of a set beside its metrics; `config` is --dataset_config_name."""
    from vit_hf.hub.lineage import dataset_revision

    about = {"dataset_name": one.name, "eval_split": images.splits.eval_split}
    if one.benchmark is None:
        about["dataset_config"] = config
    else:
        about["copy" if Path(one.dataset_name).exists() else "hub_id"] = one.dataset_name
    if among is not None:
        about["classes"] = len(among)
    return about | {"revision": dataset_revision(images.splits)}


def folder_of(one: Any, sets: list[Any], folder: Path) -> Path:
    """Where the files of one set go: of several sets each has a folder of its own."""
    return folder if len(sets) == 1 else folder / one.name.strip("/.~").replace("/", "__")


def write_results(results: list[dict[str, Any]], folder: Path) -> Path:
    """Writes eval_results.json: at its top the first set, as ever, and in the list `sets` all sets that this model was
    evaluated on, those of earlier calls too unless the model's weights are newer than they are. Results of two passes an
    image (--tta) do not take the place of plain ones at the top."""
    from vit_hf.hub.export import write_json

    path = folder / RESULTS
    new = [_key(result) for result in results]
    top, earlier = _earlier(path, results[0]["model"])
    sets = [old for old in earlier if _key(old) not in new] + results
    top = results[0] if _is_plain(results[0]) or top is None or not _is_plain(top) else top
    write_json(top | {"sets": sets}, path)
    return path


def _key(result: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        str(result.get(name)) for name in ("dataset_name", "dataset_config", "eval_split", "eval_samples", "tta")
    )


def _is_plain(result: dict[str, Any]) -> bool:
    return result.get("tta", "none") == "none"


def _earlier(path: Path, model: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The top (None: there is none of this model) and the list of the file that is there."""
    try:
        written = path.stat().st_mtime_ns
        if any(file.stat().st_mtime_ns > written for file in Path(model).glob("*.safetensors")):
            return None, []
        top = json.loads(path.read_text())
        sets = top.pop("sets")
        return top if top["model"] == model else None, [one for one in sets if one["model"] == model]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, []


def table(results: list[dict[str, Any]]) -> str:
    """The metrics of all sets, a line each."""
    width = max(len(result["dataset_name"]) for result in results)
    lines = [f"{'set':{width}}  " + "  ".join(f"{name.removeprefix('eval_'):>13}" for name in COLUMNS)]
    for result in results:
        shown = (_cell(result.get(name)) for name in COLUMNS)
        lines.append(f"{result['dataset_name']:{width}}  " + "  ".join(shown))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:13.4f}" if isinstance(value, float) else f"{'' if value is None else value:>13}"
