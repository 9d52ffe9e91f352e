import builtins
import os
import shutil
from pathlib import Path

import accelerate
import pytest
import torch

from vit_hf.errors import UserError
from vit_hf.training import checkpoint
from vit_hf.training.checkpoint import BrokenCheckpoint, TrainState
from vit_hf.training.ema import EMA


@pytest.fixture
def state():
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return TrainState(accelerator, model, engine, optimizer, EMA(model, 0.9))


def step(state):
    state.model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update()


class Killed(BaseException):
    """Not an Exception: nothing in the code may catch it, as nothing catches a kill."""


def test_a_kill_at_any_point_of_a_save_leaves_the_previous_checkpoint(state, tmp_path, monkeypatch):
    """Every call that touches the disk is once the last one."""
    step(state)
    checkpoint.save(state, tmp_path, 1, {"run": {}})
    step(state)
    calls = 0

    def guard(function):
        def guarded(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise Killed
            return function(*args, **kwargs)

        return guarded

    with monkeypatch.context() as patch:
        for owner, name in ((checkpoint, "save_file"), (torch, "save"), (Path, "write_text"), (Path, "mkdir"),
                            (Path, "rename"), (os, "fsync"), (shutil, "rmtree"), (builtins, "open")):  # fmt: skip
            patch.setattr(owner, name, guard(getattr(owner, name)))
        for die_at in range(1, 100):
            calls = 0
            try:
                checkpoint.save(state, tmp_path, 2, {"run": {}}, total_limit=1)
            except Killed:
                pass
            else:
                break
            die_at = 0
            folder, manifest, _ = checkpoint.find(tmp_path, "auto")
            assert manifest["step"] in (1, 2)
            if manifest["step"] == 2:  # renamed: whole, whatever of the pruning was left undone
                shutil.rmtree(folder)
    assert calls > 8  # the kills did come in between


def test_load_brings_back_weights_optimizer_and_average(state, tmp_path):
    step(state)
    checkpoint.save(state, tmp_path, 1, {"run": {}})
    step(state)
    expected = [state.model.weight.clone(), state.ema.state_dict()["weight"].clone()]
    folder, manifest, _ = checkpoint.find(tmp_path, "auto")
    checkpoint.load(state, folder, manifest)
    assert not torch.equal(state.model.weight, expected[0])
    step(state)  # Adam's moments have to be those of the first step too
    assert torch.equal(state.model.weight, expected[0]) and torch.equal(state.ema.state_dict()["weight"], expected[1])


def test_only_the_newest_are_kept(state, tmp_path):
    for number in (5, 10, 100, 20):
        checkpoint.save(state, tmp_path, number, {"run": {}}, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]


def test_folders_of_others_are_not_pruned(state, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500/trainer_state.json").write_text("{}")
    for number in (1, 2):
        checkpoint.save(state, tmp_path, number, {"run": {}}, total_limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-500"]
    assert checkpoint.move_aside(tmp_path / "checkpoint-500").name == "checkpoint-500.aside"
    assert (tmp_path / "checkpoint-500.aside/trainer_state.json").exists()


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest"])
def test_damage_is_seen_and_named(state, tmp_path, damage):
    checkpoint.save(state, tmp_path, 3, {"run": {}})
    path = tmp_path / "checkpoint-3/optimizer.pt"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "change":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        path.unlink()
    else:
        path = tmp_path / "checkpoint-3/manifest.json"
        path.write_text("{")
    with pytest.raises(BrokenCheckpoint, match=path.name):
        checkpoint.read_manifest(tmp_path / "checkpoint-3")
    assert checkpoint.find(tmp_path, "auto")[0] is None
    with pytest.raises(UserError, match="--resume_from_checkpoint: .*checkpoint-3 cannot be used"):
        checkpoint.find(tmp_path, str(tmp_path / "checkpoint-3"))


def test_optimizer_state_is_read_without_unpickling_code(state, tmp_path):
    """A file that would run code when unpickled is refused, even where its checksum is right."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "broken_into"),))

    checkpoint.save(state, tmp_path, 1, {"run": {}})
    torch.save(Evil(), tmp_path / "checkpoint-1/optimizer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpoint.load(state, tmp_path / "checkpoint-1", {**checkpoint.topology(state.accelerator)})
    assert not (tmp_path / "broken_into").exists()


def test_another_topology_is_refused_with_zero_alone(state, tmp_path):
    checkpoint.save(state, tmp_path, 1, {"run": {}})
    folder, manifest, _ = checkpoint.find(tmp_path, "auto")
    checkpoint.load(state, folder, {**manifest, "num_processes": 4})  # full weights: any number may go on
    with pytest.raises(UserError, match="another topology .*zero_stage 2 then, 0 now"):
        checkpoint.load(state, folder, {**manifest, "zero_stage": 2})
