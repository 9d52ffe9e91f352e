"""Stopped and resumed = uninterrupted, to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.families import FAMILIES
from tests.runs import DEMO_DEFAULTS, in_process, lines, trajectory
from vit_hf.errors import UserError
from vit_hf.models.configuration_vit import ViTConfig
from vit_hf.models.summary import summarise
from vit_hf.training.manifest import seal

EVERYTHING_ON = dict(
    random_crop="padding=3",
    random_flip=0.5,
    mixup_alpha=0.3,
    cutmix_alpha=0.5,
    label_smoothing_factor=0.1,
    ema_decay=0.9,
    layer_decay=0.8,
    config_overrides=DEMO_DEFAULTS["config_overrides"]
    + ",hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1,drop_path_rate=0.2",
    per_device_train_batch_size=16,
    max_train_samples=100,  # an epoch is 3.1 steps: checkpoints fall into the middle of epochs
    max_steps=8,
)


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """Makes a run die, as by a kill, after the checkpoint at a step."""
    from vit_hf.training.checkpoint import Checkpoints

    def arrange(step):
        real = Checkpoints.save

        def save(self, done, record):
            stalled = real(self, done, record)
            if done == step:
                assert self.wait() is None
                raise Killed
            return stalled

        monkeypatch.setattr(Checkpoints, "save", save)

    return arrange


def test_resume_in_the_middle_of_an_epoch_is_exact(run, tmp_path, killed_after, monkeypatch):
    whole = run("pretrain", output_dir=tmp_path / "whole", save_steps=5, **EVERYTHING_ON)
    killed_after(5)
    with pytest.raises(Killed):
        run("pretrain", save_steps=5, **EVERYTHING_ON)
    monkeypatch.undo()
    resumed = run("pretrain", save_steps=5, **EVERYTHING_ON)
    assert trajectory(resumed) == trajectory(whole)
    assert [line["eval_loss"] for line in lines(resumed, "eval_loss")] == [
        line["eval_loss"] for line in lines(whole, "eval_loss")
    ]
    for name in (
        "model.safetensors",
        "checkpoint-8/training_state-00001-of-00001.safetensors",
        "checkpoint-8/model.safetensors",
    ):
        one, other = load_file(whole / name), load_file(resumed / name)
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one), name
    event = json.loads((resumed / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "resume" and event["step"] == 5 and event["exact"] is True


def test_lines_after_the_checkpoint_are_cut_not_doubled(run, tmp_path, killed_after, monkeypatch):
    killed_after(4)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run/checkpoint-4")  # steps 3 and 4 are to be done again
    run("pretrain", save_steps=2)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_truncated_checkpoint_is_passed_over(run, tmp_path, killed_after, monkeypatch):
    killed_after(4)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2)
    monkeypatch.undo()
    weights = tmp_path / "run/checkpoint-4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "run/checkpoint-900").mkdir()  # foreign: it has no manifest
    run("pretrain", save_steps=2)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    passed_over = {event["folder"].split("/")[-1]: event["reason"] for event in events[:2]}
    assert "bytes instead of" in passed_over["checkpoint-4"] and "no manifest" in passed_over["checkpoint-900"]
    assert events[2]["event"] == "resume" and events[2]["step"] == 2
    assert (tmp_path / "run/checkpoint-900.aside").exists()  # nothing was lost, and it is not in the way


def test_going_back_to_an_earlier_checkpoint_puts_the_later_ones_aside(run, tmp_path):
    folder = run("pretrain", save_steps=2)
    before = trajectory(folder)
    run("pretrain", save_steps=2, resume_from_checkpoint=folder / "checkpoint-2")
    assert trajectory(folder) == before
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-4.aside", "checkpoint-6", "checkpoint-6.aside"
    ]  # fmt: skip


def test_another_micro_batch_may_go_on_but_not_to_the_bit(run, tmp_path, killed_after, monkeypatch):
    killed_after(2)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2)
    monkeypatch.undo()
    run("pretrain", save_steps=2, per_device_train_batch_size=8)
    event = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[-1])
    assert event["exact"] is False and event["why"] == ["micro_batch_size 32 then, 8 now"]


def test_a_checkpoint_of_before_a_flag_existed_is_still_this_runs(run, tmp_path, killed_after, monkeypatch):
    killed_after(2)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2)
    monkeypatch.undo()
    path = tmp_path / "run/checkpoint-2/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["run"]["cutmix_alpha"], manifest["run"]["momentum"]
    path.write_text(json.dumps(seal(manifest)))
    run("pretrain", save_steps=2)
    assert lines(tmp_path / "run")[-1]["step"] == 6


def test_the_wall_time_counts_all_starts(run, tmp_path, killed_after, monkeypatch):
    killed_after(2)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2)
    monkeypatch.undo()
    path = tmp_path / "run/checkpoint-2/manifest.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), "wall_time_seconds": 1000.0})))
    run("pretrain", save_steps=2)
    assert 1000 < json.loads((tmp_path / "run/all_results.json").read_text())["wall_time_seconds"] < 1500
    clock = [(line["step"], line["wall_time_seconds"]) for line in lines(tmp_path / "run", "wall_time_seconds")]
    assert clock == sorted(clock) and all((seconds > 1000) == (step > 2) for step, seconds in clock)
    flops = 3 * summarise(ViTConfig.from_pretrained(tmp_path / "run")).forward_flops
    for line in lines(tmp_path / "run", "wall_time_seconds"):
        assert line["images_seen"] == 32 * line["step"] and line["training_flops"] == flops * line["images_seen"]


def test_a_finished_run_that_goes_on_is_not_finished_until_it_is(run, tmp_path, killed_after, monkeypatch):
    folder = run("pretrain", save_steps=2)
    killed_after(4)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2, resume_from_checkpoint=folder / "checkpoint-2")
    monkeypatch.undo()
    assert not (folder / "all_results.json").exists()
    run("pretrain", save_steps=2)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_started_again_says_so_and_does_nothing(run, tmp_path, capsys):
    folder = run("pretrain", max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run("pretrain", max_steps=2, logging_steps=7, per_device_eval_batch_size=16)  # these may change
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("change", [dict(learning_rate=5e-4), dict(seed=1), dict(random_flip=0.5), dict(max_steps=7)])
def test_another_run_in_the_same_folder_is_refused(run, tmp_path, killed_after, monkeypatch, change):
    killed_after(2)
    with pytest.raises(Killed):
        run("pretrain", save_steps=2)
    monkeypatch.undo()
    name, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"another run.*--{name} .* there, {value} now"):
        run("pretrain", save_steps=2, **change)
    run("pretrain", save_steps=2)  # nothing was lost
    with pytest.raises(UserError, match="another run"):
        run("pretrain", save_steps=2, **change)  # nor may it take over a finished run


def test_resume_none_does_not_run_over_checkpoints(run):
    run("pretrain", max_steps=2)
    with pytest.raises(UserError, match="resume_from_checkpoint is none"):
        run("pretrain", max_steps=2, resume_from_checkpoint="none")


def test_run_config_repeats_the_run(run, tmp_path):
    first = run("pretrain", random_flip=0.5, max_steps=3)
    in_process("pretrain", config=first / "run_config.yaml", output_dir=tmp_path / "again")
    assert trajectory(tmp_path / "again") == trajectory(first)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet", "conv"])
def test_models_with_batch_norm_resume_exactly(family, run, tmp_path, killed_after, monkeypatch):
    """Their statistics are part of a checkpoint; the evaluation reads them."""
    preset, changes = FAMILIES[family]
    changes = {name: value for name, value in changes.items() if name != "hidden_dropout_prob"}
    flags = {**EVERYTHING_ON, "preset": preset, "layer_decay": 1.0, "save_steps": 5}
    flags["config_overrides"] = ",".join(f"{name}={value}" for name, value in changes.items())
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    killed_after(5)
    with pytest.raises(Killed):
        run("pretrain", **flags)
    monkeypatch.undo()
    resumed = run("pretrain", **flags)
    assert trajectory(resumed) == trajectory(whole)
    assert lines(resumed, "eval_loss")[-1]["eval_loss"] == lines(whole, "eval_loss")[-1]["eval_loss"]
    one, two = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert any("running_mean" in name for name in one) and all(torch.equal(one[name], two[name]) for name in one)
