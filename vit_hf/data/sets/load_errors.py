"""What `datasets` and the Hub raise, as one line: what was asked for, what went wrong, what to do."""

import difflib
import os
import re

import datasets

from vit_hf.data.sets.names import GENERATED_SETS, HUB_SETS, NAMED_SETS
from vit_hf.errors import UserError


def cache_problem(error: BaseException, name: str, cache_dir: str | None) -> UserError | None:
    """The line for a set that cannot be written into the cache of `datasets`; None for another error."""
    folder = os.path.abspath(cache_dir or datasets.config.HF_DATASETS_CACHE)
    for cause in _causes(error):
        file = os.path.abspath(str(getattr(cause, "filename", None) or "/"))
        if isinstance(cause, OSError) and (file.startswith(folder) or folder.startswith(file + os.sep)):
            return UserError(
                f"--dataset_name {name}: the cache of `datasets` cannot be written ({cause.strerror}: {file}); make room or "
                "give access, or set HF_DATASETS_CACHE to another folder"
            )
    return None


def explained(error: Exception, name: str, path: str, is_folder: bool) -> UserError:
    """Turn a loading error into one line: what was asked for, what went wrong, what to do."""
    chain = _causes(error)
    text = " ".join(str(cause) for cause in chain)
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    cause = _one_line(chain[-1])
    flag = f"--dataset_name {name}"
    out_of_range = re.search(r"Class label (-?\d+) greater than configured num_classes (\d+)", text)
    if out_of_range:
        value, count = map(int, out_of_range.groups())
        return UserError(f"{flag}: a label is {value}, allowed are 0..{count - 1}: correct the labels or class names")
    empty_split = re.search(r'Instruction "(\w+)" corresponds to no data', text)
    if empty_split:
        return UserError(f"{flag}: zero samples in the {empty_split[1]} split: it needs at least one image")
    if re.search(r"Config name is missing|BuilderConfig '.*' not found", text):
        return UserError(f"{flag}: {_one_line(error)}: choose one with --dataset_config_name")
    if is_folder:
        empty = kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}
        problem = "no image, parquet or tar files found" if empty else f"cannot be read: {cause}"
        return UserError(
            f"{flag}: {problem} (a folder holds one folder of images a class, parquet files, or tar "
            "shards of image and class)"
        )
    if "gated dataset" in text or "GatedRepoError" in kinds:
        return UserError(
            f"{flag}: gated; ask for access at https://huggingface.co/datasets/{path} and log in with `hf auth login`"
        )
    if "Revision" in text and "doesn't exist" in text:
        return UserError(f"{flag}: {_one_line(error)}")
    unreachable = kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"}
    if unreachable or kinds & {"FileNotFoundError", "HFValidationError", "RepositoryNotFoundError"}:
        where = f"{path} is not in the cache" if name in HUB_SETS else "not a named set, not a folder"
        hub = f"the Hub cannot be reached ({cause})" if unreachable else "the Hub has no such set for this login"
        near = difflib.get_close_matches(name, NAMED_SETS, n=2, cutoff=0.5)
        nearest = f"; nearest: {' or '.join(near)}" if near and name not in NAMED_SETS else ""
        offline = f"; {', '.join(GENERATED_SETS)} need no network" if unreachable else ""
        return UserError(f"{flag}: {where}, and {hub}; named sets: {', '.join(NAMED_SETS)}{nearest}{offline}")
    return UserError(f"{flag}: cannot be loaded: {cause}")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it came from, outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
