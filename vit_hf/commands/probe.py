"""`vit-hf probe`: how well simple classifiers on a model's frozen features tell the classes of a set apart."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_hf.arguments import parse, pick
from vit_hf.arguments.fields import (
    DatasetArguments,
    GivenModelArguments,
    LoadingArguments,
    PreprocessingArguments,
    WaitingArguments,
    flag,
)
from vit_hf.arguments.values import Kind
from vit_hf.commands.given import open_images, open_model, set_settings
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import ArgumentError

METHODS = ("regression", "knn", "logistic")
FILE = "probe_results.json"


def _read_shots(text: Any) -> tuple[int | None, ...]:
    """5,10,all -> (5, 10, None)."""
    words = [word.strip() for word in str(text).split(",")]
    if not all(word == "all" or (word.isdigit() and int(word)) for word in words):
        raise ValueError(f"{text!r} is no list of numbers of images from 1 up, or all, by comma, e.g. 5,10,25,all")
    return tuple(dict.fromkeys(None if word == "all" else int(word) for word in words))


def _shots_text(shots: tuple[int | None, ...]) -> str:
    return ",".join("all" if number is None else str(number) for number in shots)


def _read_methods(text: Any) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in str(text).split(",")))
    for word in words:
        if word not in METHODS:
            raise ValueError(f"{word!r} is not one of {', '.join(METHODS)}")
    return words


SHOTS = Kind(_read_shots, _shots_text, "NUMBERS")
CHOSEN = Kind(_read_methods, ",".join, "NAMES")


@dataclass
class ProbeArguments(
    WaitingArguments, PreprocessingArguments, LoadingArguments, DatasetArguments, GivenModelArguments
):
    """Flags of `vit-hf probe`; the model is positional."""

    train_split: str | None = flag(None, "split whose images the probes are fitted on (default: train)")
    split_seed: int | None = flag(
        None,
        "which images are held out of a set without an evaluation split (default: the run's)",
        low=0,
        high=2**32 - 1,
    )
    shots: tuple[int | None, ...] = flag(
        (5, 10, 25, None), "training images of each class, several by comma; all: the whole split", kind=SHOTS
    )
    methods: tuple[str, ...] = flag(METHODS, f"what is fitted: {', '.join(METHODS)}", kind=CHOSEN)
    probe_draws: int = flag(3, "draws of the training images, for a mean and an interval", low=1)
    knn_k: int = flag(20, "neighbours that vote", low=1)
    output_dir: str | None = flag(None, f"where {FILE} goes (default: the model's folder, else here)")


@dataclass(frozen=True)
class ProbeSettings:
    """What is fitted, as the flags of the same names say."""

    shots: tuple[int | None, ...]
    methods: tuple[str, ...]
    probe_draws: int
    knn_k: int

    def draws(self, shots: int | None) -> range:
        return range(1 if shots is None else self.probe_draws)


def main(argv: list[str]) -> None:
    """Fits few-shot regression, nearest neighbours and logistic regression on a model's frozen features; writes
    probe_results.json."""
    args = parse(ProbeArguments, argv, prog="vit-hf probe", description=main.__doc__, positional="model")
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    folder = folder_of(args)
    check_folder(folder)
    from vit_hf.data.feed import LoadingSettings, eval_batches
    from vit_hf.data.preprocessing import PreprocessingSettings
    from vit_hf.data.processes import Processes
    from vit_hf.data.sets.draws import Draws
    from vit_hf.evaluation.features import extract_features
    from vit_hf.training.accelerator import build_accelerator, end
    from vit_hf.training.waiting import processes_of

    accelerator, settings = build_accelerator(args.ddp_timeout), pick(ProbeSettings, args)
    processes = Processes(**processes_of(accelerator))
    given = open_model(args.model, args.revision, args.trust_remote_code, need_head=False)
    loading = pick(LoadingSettings, args)
    sets = set_settings(args, args.model, train_split=args.train_split, need_train=True)
    images = open_images(given, accelerator, sets, pick(PreprocessingSettings, args), loading)
    accelerator.print(f"preprocessing: {images.preprocessing}")

    drawn = Draws(images.splits, "--shots")
    chosen = {(shots, draw): drawn.rows(shots, draw) for shots in settings.shots for draw in settings.draws(shots)}
    rows = np.unique(np.concatenate(list(chosen.values())))  # no other image is read
    model = given.model.to(accelerator.device)
    batches = eval_batches(
        drawn.images(rows), images.preprocessing, processes, loading, images.report.train, keep=False
    )
    train = extract_features(model, batches, images.normalise, accelerator)
    test = extract_features(model, images.batches, images.normalise, accelerator)
    places = {key: np.searchsorted(rows, value) for key, value in chosen.items()}
    fit = functools.partial(measure, settings, places, train, test, len(images.splits.class_names))
    results = processes.main_first(fit, "fitting the probes")

    about = {"model": args.model, "dataset_name": args.dataset_name, "preprocessing": str(images.preprocessing)}
    about |= {"train_split": images.splits.train_split, "eval_split": images.splits.eval_split}
    about |= {"eval_samples": len(test), "feature_size": test.values.shape[1], "knn_k": settings.knn_k}
    about |= images.report.collect()
    if accelerator.is_main_process:
        write(folder, about, results)
    end(accelerator)


def measure(
    settings: ProbeSettings, places: dict[tuple[int | None, int], np.ndarray], train: Any, test: Any, num_classes: int
) -> list[dict[str, Any]]:
    """For each method and number of images its accuracies on the evaluation images, of each draw.

    Args:
        places: for each (shots, draw) which of the training features it is.
        train, test: Features.
    """
    import torch

    from vit_hf.evaluation.probes import METHODS_BY_NAME, accuracy, interval_over_draws

    results = []
    for method in settings.methods:
        extra = {"k": settings.knn_k} if method == "knn" else {}
        for shots in settings.shots:
            found, strengths = [], []
            for draw in settings.draws(shots):
                few = train.at(torch.from_numpy(places[shots, draw]))
                predicted = METHODS_BY_NAME[method]((few.values, few.labels), test.values, num_classes, **extra)
                if method == "logistic":
                    predicted, l2 = predicted
                    strengths.append(l2)
                found.append(accuracy(predicted, test.labels))
            line = {"method": method, "shots": "all" if shots is None else shots, "train_samples": len(few)}
            line |= {"accuracy": float(np.mean(found)), "interval": interval_over_draws(found), "accuracies": found}
            results.append(line | ({"l2": strengths} if strengths else {}))
    return results


def folder_of(args: ProbeArguments) -> Path:
    default = Path(args.model) if Path(args.model).is_dir() else Path(".")
    return Path(args.output_dir) if args.output_dir else default


def write(folder: Path, about: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The table and the file, of the main process."""
    from vit_hf.hub.export import write_json

    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"features: {about['feature_size']} numbers; measured on {about['eval_samples']} images ({about['eval_split']})"
    )
    form = "{:12} {:>13}  {:>15}  {:>8}  {}"
    print(form.format("probe", "images/class", "training images", "accuracy", "95 % interval over the draws"))
    for line in results:
        interval = "-" if line["interval"] is None else "{:.4f} to {:.4f}".format(*line["interval"])
        print(form.format(line["method"], line["shots"], line["train_samples"], f"{line['accuracy']:.4f}", interval))
    write_json(about | {"results": results}, folder / FILE)
    print(f"written to {folder / FILE}")
