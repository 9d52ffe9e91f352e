"""What a command is given: a model by folder or Hub id, and the images of a set as that model takes them.

Shared by the commands that judge and use models; each opens what it needs and no more.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_hf.arguments import pick
from vit_hf.errors import UserError, model_errors, note_near


@dataclass(frozen=True)
class GivenModel:
    """A model as it was published.

    Args:
        name: its folder or Hub id. model: fp32, in evaluation mode, on the host.
        own: its own preprocessing; None where it says nothing.
        size: (height, width) of its input. class_names: of its head; None without one.
    """

    name: str
    model: Any
    own: Any
    size: tuple[int, int]
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class GivenImages:
    """The images of a set as a model takes them.

    Args:
        splits: the set. rows: its evaluation split by index.
        batches: of this process, each sample once over all: pixel_values uint8 (B, C, H, W), labels, index, valid.
        normalise: uint8 (B, C, H, W) on the device -> the model's input.
        class_index: the model's number of each class of the set; None: the numbers agree.
        report: what went wrong with the images (DataReport).
    """

    splits: Any
    rows: Any
    preprocessing: Any
    batches: Iterable[dict[str, Any]]
    normalise: Any
    class_index: list[int] | None
    report: Any


def open_model(model: str, revision: str | None, trust_remote_code: bool, need_head: bool = True) -> GivenModel:
    """
    Raises:
        UserError: it cannot be loaded, or has no head where one is needed.
    """
    from vit_hf.data.preprocessing import own_preprocessing
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.presets import PRESETS
    from vit_hf.models.transfer import load_pretrained

    note_near(model, tuple(PRESETS), "preset")
    with model_errors(model=model):
        loaded = load_pretrained(model, revision=revision, trust_remote_code=trust_remote_code, need_head=need_head)
        fixed = getattr(loaded.config, "image_size", None)
        own = own_preprocessing(model, revision, pair(fixed or 224))
        size = pair(fixed or (own.image_size if own else 224))
    names = tuple(loaded.config.id2label.values()) if need_head else None
    return GivenModel(model, loaded.eval(), own, size, names)


def split_revision(name: str) -> tuple[str, str | None]:
    """MODEL@REVISION of the Hub as (model, revision), where a command takes several models; a folder may have an @."""
    model, mark, revision = name.rpartition("@")
    return (model, revision) if mark and not Path(name).exists() else (name, None)


def with_tta(given: GivenModel, tta: str) -> GivenModel:
    """The model, or with tta flip one that looks at the mirror image too."""
    from vit_hf.evaluation.mirrored import Mirrored

    return dataclasses.replace(given, model=Mirrored(given.model).eval()) if tta == "flip" else given


def set_settings(args: Any, model: str, **instead: Any) -> Any:
    """Which images a command asks for: by default those of the evaluation split, which the run that made the model held
    out. (args.revision is the model's, not the set's.)"""
    from vit_hf.data.sets.load import SetSettings
    from vit_hf.data.sets.names import trained_split_seed

    seed = trained_split_seed(model) if args.split_seed is None else args.split_seed
    return pick(SetSettings, args, **{"revision": None, "split_seed": seed, "need_train": False} | instead)


def open_images(
    given: GivenModel,
    accelerator: Any,
    sets: Any,
    inputs: Any,
    loading: Any,
    class_index_of: Callable[[list[str]], list[int]] | None = None,
) -> GivenImages:
    """The evaluation split of a set, for one model; of a model that knows some of its classes, the images of those.

    Args:
        sets, inputs, loading: SetSettings (`set_settings`), PreprocessingSettings, LoadingSettings.
        class_index_of: the model's numbers of a set's classes, where another rule than `match_classes` tells them.

    Raises:
        UserError: the set cannot be loaded, or the model has other classes.
    """
    from vit_hf.data.processes import Processes
    from vit_hf.data.sets.load import load_splits
    from vit_hf.training.waiting import processes_of

    processes = Processes(**processes_of(accelerator))
    splits, class_index = load_splits(sets, processes), None
    if class_index_of is not None:
        class_index = class_index_of(splits.class_names)
    elif given.class_names is not None:
        known = list(given.class_names)
        if len(known) < len(splits.class_names) and set(known) < set(splits.class_names):  # --subset_classes
            splits = load_splits(dataclasses.replace(sets, subset_classes=tuple(known)), processes)
            accelerator.print(f"note: the model knows {len(known)} of the classes; only their images are evaluated")
        class_index = match_classes(splits.class_names, known)
        if class_index is None:
            accelerator.print(
                "note: the model and the dataset name their classes differently; they are compared by index"
            )
    return _as_input(given, accelerator, splits, splits.rows("eval"), class_index, inputs, loading)


def open_files(given: GivenModel, accelerator: Any, paths: list[str], inputs: Any, loading: Any) -> GivenImages:
    """Image files in their order, for one model; they have no labels (`splits` is None)."""
    from vit_hf.data.rows.files import FileRows

    return _as_input(given, accelerator, None, FileRows(paths), None, inputs, loading)


def _as_input(
    given: GivenModel, accelerator: Any, splits: Any, rows: Any, class_index: Any, inputs: Any, loading: Any
) -> GivenImages:
    """Rows as the batches that a model takes."""
    from vit_hf.data.augment.pipeline import normaliser
    from vit_hf.data.faults import DataReport
    from vit_hf.data.feed import eval_batches, fit_preprocessing
    from vit_hf.data.processes import Processes
    from vit_hf.training.waiting import processes_of

    processes = Processes(**processes_of(accelerator))
    preprocessing = fit_preprocessing(rows, processes, given.size, given.own, inputs)
    report = DataReport(accelerator, loading.on_bad_image)
    batches = eval_batches(rows, preprocessing, processes, loading, report.eval, class_index=class_index, keep=False)
    normalise = normaliser(preprocessing, accelerator.device)
    return GivenImages(splits, rows, preprocessing, batches, normalise, class_index, report)


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
        if sorted(dataset_names) == sorted(map(str, range(len(model_names)))):  # folders: "10" is listed before "2"
            return [int(name) for name in dataset_names]
        return None
    raise UserError(
        f"the model has {len(model_names)} classes ({', '.join(model_names[:3])}, ...), the dataset "
        f"{len(dataset_names)} others ({', '.join(dataset_names[:3])}, ...); choose another --dataset_name, or fine-tune"
    )
