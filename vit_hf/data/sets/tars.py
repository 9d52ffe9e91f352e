"""Tar shards of an image and its class a sample (the layout of webdataset), as timm's users have them.

`datasets` reads them: train-0000.tar with 000001.jpg and 000001.cls, the class as a number, becomes a row with the
columns jpg, cls, __key__ and __url__. What is left to do is to name the classes.
"""

import os

import datasets
import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from vit_hf.data.sets.names import GENERATED_SETS, resolve_name
from vit_hf.errors import UserError

CLASS_FILES = ("classes.txt", "classnames.txt")  # one class a line, in the order of the numbers


def tar_class_names(dataset: datasets.Dataset, name: str, revision: str | None) -> list[str] | None:
    """The class names of a set of tar shards, from the file beside them; None for another set, and without the file.

    Raises:
        UserError: a line is empty, or a class comes twice; the Hub cannot be asked for the file.
    """
    if name in GENERATED_SETS or not {"__key__", "__url__"} <= set(dataset.column_names):
        return None
    path, is_folder = resolve_name(name)
    for file in CLASS_FILES:
        local = os.path.join(path, file)
        if not is_folder:
            where = {"repo_type": "dataset", "revision": revision}
            try:
                local = huggingface_hub.hf_hub_download(path, file, **where)
            except LocalEntryNotFoundError:  # no connection: was it asked for before?
                if huggingface_hub.try_to_load_from_cache(path, file, **where) is None:
                    raise UserError(
                        f"--dataset_name {name}: the Hub cannot be reached for {file}, which may name the classes; load "
                        "the set once with a connection"
                    ) from None
                continue
            except EntryNotFoundError:
                continue
        if os.path.isfile(local):
            with open(local, encoding="utf-8") as lines:
                names = [line.strip() for line in lines.read().rstrip().split("\n")]
            first = {class_name: number for number, class_name in reversed(list(enumerate(names)))}
            for number, class_name in enumerate(names):
                if not class_name or first[class_name] < number:
                    wrong = f"names {class_name!r} again" if class_name else "is empty"
                    raise UserError(f"--dataset_name {name}: line {number + 1} of {file} {wrong}; one class a line")
            return names
    return None
