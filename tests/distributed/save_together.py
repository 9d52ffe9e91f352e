"""Takes up a checkpoint under whatever engine it was launched with and writes it again, in fp32 and in bf16; under DDP, all
that can go wrong when processes save together too.

    accelerate launch --config_file F --num_processes 2 tests/distributed/save_together.py CHECKPOINT OUTPUT_DIR

The test compares the files. What went wrong is written to OUTPUT_DIR/found.json, as each process saw it.
"""

import json
import os
import sys
from pathlib import Path

import accelerate
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.families import FAMILIES
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.errors import UserError
from vit_hf.models.presets import from_preset
from vit_hf.training import checkpoint, manifest, shared_folder
from vit_hf.training.accelerator import build_accelerator, end
from vit_hf.training.checkpoint import Checkpoints, load
from vit_hf.training.manifest import find_together
from vit_hf.training.model_folder import files_of
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import plan_batches
from vit_hf.training.state import prepare

ADAMW = OptimizerSettings("adamw", 1e-2, weight_decay=0.1)


def start(precision="no", seed=0):
    """State and model folder of a small model with BatchNorm and an average, as if the process had just been launched."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    accelerator = build_accelerator(60)
    torch.manual_seed(seed)
    preset, changes = FAMILIES["conv"]
    model = from_preset(preset, ["a", "b", "c"], changes)
    form = files_of(accelerator, model, Preprocessing(image_size=(32, 32)).image_processor())
    plan = plan_batches(4 * accelerator.num_processes, accelerator.num_processes, 4)
    return prepare(accelerator, model, plan, optimizer=ADAMW, max_grad_norm=1.0, ema_decay=0.5), form


def again(source, output_dir, precision):
    """Loads and saves."""
    state, form = start(precision, seed=1)
    if not state.accelerator.is_main_process:
        manifest.describe = None  # the main process alone reads and hashes
    folder, found, _ = find_together(state.accelerator, source.parent, str(source))
    load(state, form, folder, found)
    checkpoints = Checkpoints(state, form, output_dir)
    record = {name: found[name] for name in ("run", "exactness", "wall_time_seconds")}
    assert checkpoints.save(found["step"], record) > 0 and checkpoints.wait() is None and not checkpoints.failed
    return state, form, record


def said(function, *args):
    """What a call raises, or gives."""
    try:
        return function(*args)
    except UserError as error:
        return str(error)


def faults(state, form, record, source, output_dir):
    """{what went wrong: [what each process was told]}"""
    rank, told = state.accelerator.process_index, {}

    def both(name, value):
        told[name] = accelerate.utils.gather_object([value])

    checkpoints = Checkpoints(state, form, output_dir / "warn")
    checkpoints.save(1, record)
    both("whole", checkpoints.wait())
    real = checkpoint.write_tensors
    if rank == 1:

        def full(path, tensors):
            real(path, dict(list(tensors.items())[:3]))  # some of it is there
            raise OSError(28, "No space left on device")

        checkpoint.write_tensors = full
    checkpoints.save(2, record)
    both("one fails", checkpoints.wait())
    stopping = Checkpoints(state, form, output_dir / "stop", on_save_error="stop")
    stopping.save(1, record)
    both("stop", said(stopping.save, 2, record))
    checkpoint.write_tensors = real

    tell = shared_folder.Answers.tell
    if rank == 1:
        shared_folder.Answers.tell = lambda *args: None
    hanging = Checkpoints(state, form, output_dir / "silent", timeout_seconds=1)
    hanging.save(1, record)
    both("silent", hanging.wait())
    shared_folder.Answers.tell = tell
    checkpoints.save(3, record)
    both("and goes on", checkpoints.wait())

    shared_folder.APPEARS_SECONDS = 0.5
    own = output_dir / f"machine-{rank}"
    own.mkdir()
    os.chdir(own)  # as two disks that are mounted at the same place
    both("unshared save", said(lambda: Checkpoints(state, form, Path("run")) and None))
    if rank == 0:
        os.symlink(source.parent, "there")
    both("unshared resume", said(find_together, state.accelerator, Path("there"), str(Path("there") / source.name)))
    return told


def main():
    source, output_dir = map(Path, sys.argv[1:])
    for precision in ("bf16", "no"):
        state, form, record = again(source, output_dir / precision, precision)
    if state.partition.name == "ddp":
        told = faults(state, form, record, source, output_dir)
        if state.accelerator.is_main_process:
            (output_dir / "found.json").write_text(json.dumps(told))
    end(state.accelerator)


if __name__ == "__main__":
    main()
