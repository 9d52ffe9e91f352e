"""A model as a folder of files: configuration, weights under the names that transformers gives them, image processor, and
the code of a model that needs it. An export is such a folder, and so is every checkpoint.

This module must not know which models there are: their own `save_pretrained` tells what a folder holds, once a run.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from vit_hf.training.files import Description, write_bytes, write_tensors

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelFolder:
    """What a model's folder holds beside its weights, and how these are called there.

    Args:
        names: {name in the model's state dict: name in model.safetensors}.
        shapes: {name in the model's state dict: shape}.
        files: {file name: content} of all others.
    """

    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, bytes]

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Description]:
        """Writes the files into a folder that is there.

        Args:
            tensors: {name in the state dict: tensor on the CPU}, fp32 weights and the buffers that are saved.

        Returns:
            {file name: its size and SHA-256}

        Raises:
            OSError: of the disk.
        """
        written = {name: write_bytes(folder / name, content) for name, content in self.files.items()}
        written[WEIGHTS] = write_tensors(
            folder / WEIGHTS, {self.names[name]: tensor for name, tensor in tensors.items()}
        )
        return written


def files_of(accelerator: accelerate.Accelerator, model: PreTrainedModel, processor: Any) -> ModelFolder:
    """The folder that `save_pretrained` of a model and of its image processor write, on every process. Collective.

    Args:
        model: only its class and its configuration are looked at; its weights may be anywhere.
        processor: has `save_pretrained`.

    Raises:
        ValueError: a model that is saved in another form than it is trained in.
    """
    found: ModelFolder | ValueError | None = None
    if accelerator.is_main_process:  # transformers writes on no other process
        try:
            found = _files_of(model, processor)
        except ValueError as error:
            found = error
    if accelerator.num_processes > 1:
        (found,) = accelerate.utils.broadcast_object_list([found])
    if isinstance(found, ValueError):
        raise found
    return found


def _files_of(model: PreTrainedModel, processor: Any) -> ModelFolder:
    with torch.device("meta"):
        form = type(model)(copy.deepcopy(model.config))  # saving changes a configuration
    tensors = form.state_dict()
    numbers = {name: torch.tensor([number]) for number, name in enumerate(tensors)}  # in the place of the weights
    with tempfile.TemporaryDirectory() as temporary:
        form.save_pretrained(temporary, state_dict=dict(numbers))
        processor.save_pretrained(temporary)
        stored = {number.item(): name for name, number in load_file(Path(temporary) / WEIGHTS).items()}
        files = {path.name: path.read_bytes() for path in sorted(Path(temporary).iterdir()) if path.name != WEIGHTS}
    if sorted(stored) != list(range(len(tensors))):
        raise ValueError(
            f"{type(model).__name__} leaves tensors out or joins them when it is saved: no checkpoint could go on from it"
        )
    return ModelFolder(
        names={name: stored[number.item()] for name, number in numbers.items()},
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        files=files,
    )
