"""One format: a checkpoint that goes through any engine comes out with the same tensors, to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.save_together import start
from tests.runs import ROOT, launch
from vit_hf.training.checkpoint import Checkpoints
from vit_hf.training.manifest import find, read_manifest

pytestmark = pytest.mark.slow
TWO = ("--num_processes", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """checkpoint-3 of one process after two steps, with moments, statistics and an average that differ from the start."""
    state, form = start()
    state.engine.train()
    for seed in range(2):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        state.accelerator.backward(state.engine(pixel_values=images).logits.square().mean())
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update()
    folder = tmp_path_factory.mktemp("source")
    checkpoints = Checkpoints(state, form, folder)
    checkpoints.save(3, {"run": {"seed": 0}, "exactness": {}, "wall_time_seconds": 1.5})
    assert checkpoints.wait() is None
    return folder / "checkpoint-3"


def tensors_of(folder):
    """(the model's, those of the training state of all processes)"""
    state = {}
    for path in folder.glob("training_state-*"):
        part = load_file(path)
        assert not part.keys() & state.keys()
        state |= part
    return load_file(folder / "model.safetensors"), state


def walked(config, source, folder):
    result = launch([ROOT / "tests/distributed/save_together.py", source, folder], config, launcher=TWO)
    assert result.returncode == 0, result.stderr[-3000:]
    expected, before = tensors_of(source), read_manifest(source)
    assert any(name.startswith("buffer.") for name in expected[1])
    for precision in ("no", "bf16"):
        written = folder / precision / "checkpoint-3"
        for one, two in zip(tensors_of(written), expected, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
        after = read_manifest(written)
        assert (
            (after["optimizer_steps"], after["run"]) == (2, {"seed": 0}) == (before["optimizer_steps"], before["run"])
        )
        sizes = {name: description["bytes"] for name, description in after["files"].items()}
        first, second = (sizes[f"training_state-0000{rank}-of-00002.safetensors"] for rank in (1, 2))
        largest = 4 * max(tensor.numel() for tensor in expected[0].values())
        assert abs(sizes["model.safetensors"] + first - second) < largest + 4096  # the work is shared


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])  # ZeRO-1 and ZeRO-2 hold what ZeRO-3 holds, less of it
def test_an_engine_reads_what_another_wrote_and_writes_the_same(config, source, tmp_path):
    walked(config, source, tmp_path)


def test_ddp_writes_the_same_and_what_goes_wrong_is_told_to_all(source, tmp_path):
    walked("cpu_2proc", source, tmp_path)
    told = json.loads((tmp_path / "found.json").read_text())
    for name, (one, other) in told.items():
        assert one == other, name  # alike on both processes
    assert told["whole"][0] is None is told["and goes on"][0]
    assert told["one fails"][0] == "No space left on device"
    assert sorted(path.name for path in (tmp_path / "warn").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert find(tmp_path / "warn", "auto")[0].name == "checkpoint-3"
    assert "checkpoint-1 could not be written: No space left" in told["stop"][0]
    assert "process 1 has not written its part within 1 s (--ddp_timeout)" in told["silent"][0]
    assert not list((tmp_path / "silent").glob("checkpoint-*"))
    assert "process 1 does not see what the main process writes into run" in told["unshared save"][0]
    assert "process 1 does not see there/checkpoint-3" in told["unshared resume"][0]
    assert all("--output_dir must be on a disk that all machines share" in told[f"unshared {what}"][0]
               for what in ("save", "resume"))  # fmt: skip
