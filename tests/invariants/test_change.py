"""A run that goes on with other flags, where --change names them: what is refused, what follows, and where it stands."""

import json
import shutil

import pytest
import yaml

from tests.runs import DEMO_DEFAULTS, lines, trajectory
from vit_hf.errors import ArgumentError, UserError

FLAGS = {**DEMO_DEFAULTS, "save_steps": 2, "save_total_limit": 9, "max_eval_samples": 20}


def rates(folder):
    return [line["learning_rate"] for line in lines(folder)]


def test_a_changed_learning_rate_stands_in_the_folder_and_is_carried_on(run, tmp_path, capsys):
    """From step 4 on the run has the new value; a start after that needs no other word, and says the same."""
    folder = tmp_path / "run"
    before = rates(run("pretrain", output_dir=folder, **FLAGS))
    slower = {**FLAGS, "learning_rate": 5e-4, "output_dir": folder, "resume_from_checkpoint": folder / "checkpoint-4"}
    with pytest.raises(UserError, match=r"--learning_rate 0.001 there, 0.0005 now.* --change learning_rate"):
        run("pretrain", **slower)
    run("pretrain", **slower, change="learning_rate")
    assert rates(folder) == before[:4] + [rate / 2 for rate in before[4:]]
    assert "changed from step 4 on: --learning_rate 0.001 until then, 0.0005 now" in capsys.readouterr().out
    changed = [{"step": 4, "total_steps": 6, "flags": {"learning_rate": [0.001, 0.0005]}}]
    assert yaml.safe_load((folder / "run_config.yaml").read_text())["resolved"]["changed"] == changed
    card = (folder / "README.md").read_text()
    assert "after step 4" in card and "learning_rate" in card and "0.0005" in card
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["flags"] for event in events if event["event"] == "changed"] == [changed[0]["flags"]]

    (folder / "all_results.json").unlink()
    shutil.rmtree(folder / "checkpoint-6")  # it was killed before its last save
    at_5 = trajectory(folder)
    run("pretrain", **{**slower, "resume_from_checkpoint": "auto"}, change="learning_rate")
    assert trajectory(folder) == at_5
    assert yaml.safe_load((folder / "run_config.yaml").read_text())["resolved"]["changed"] == changed


def test_what_was_changed_stays_in_later_checkpoints(run, tmp_path):
    folder = tmp_path / "run"
    run("pretrain", output_dir=folder, **{**FLAGS, "max_steps": 4})
    more = {**FLAGS, "output_dir": folder}
    run("pretrain", **more, change="max_steps")
    run("pretrain", **{**more, "max_steps": 8, "weight_decay": 0.2}, change="max_steps,weight_decay")
    changed = [
        {"step": 4, "total_steps": 4, "flags": {"max_steps": [4, 6]}},
        {"step": 6, "total_steps": 6, "flags": {"max_steps": [6, 8], "weight_decay": [0.1, 0.2]}},
    ]
    assert json.loads((folder / "checkpoint-8/manifest.json").read_text())["changed"] == changed
    with pytest.raises(UserError, match="--weight_decay 0.2 there, 0.1 now"):
        run("pretrain", **{**more, "max_steps": 8})


def test_a_longer_run_with_a_constant_rate_is_the_run_that_was_longer_from_the_start(run, tmp_path):
    """To the bit, also from its finished folder."""
    constant = {**FLAGS, "lr_scheduler_type": "constant"}
    whole = run("pretrain", output_dir=tmp_path / "whole", **{**constant, "max_steps": 8})
    folder = run("pretrain", output_dir=tmp_path / "raised", **constant)
    run("pretrain", output_dir=folder, **{**constant, "max_steps": 8}, change="max_steps")
    assert trajectory(folder) == trajectory(whole)
    assert json.loads((folder / "all_results.json").read_text())["step"] == 8


def test_a_decay_is_stretched_to_the_new_length_and_says_so(run, tmp_path, capsys):
    whole = run("pretrain", output_dir=tmp_path / "whole", **{**FLAGS, "max_steps": 8})
    folder = run("pretrain", output_dir=tmp_path / "raised", **FLAGS)
    before = rates(folder)
    capsys.readouterr()
    longer = {**FLAGS, "output_dir": folder, "resume_from_checkpoint": folder / "checkpoint-4", "change": "max_steps"}
    run("pretrain", **{**longer, "max_steps": 8})
    assert rates(folder) == before[:4] + rates(whole)[4:]
    assert "the cosine schedule is stretched to 8 steps" in capsys.readouterr().out
    with pytest.raises(ArgumentError, match="the run would end at step 2, and it goes on from step 4; give more"):
        run("pretrain", **{**longer, "max_steps": 2, "warmup_steps": 1, "change": "max_steps,warmup_steps"})


def test_a_change_is_undone_from_a_checkpoint_before_it(run, tmp_path):
    """With the flags of before, also in the finished folder; from another folder's checkpoint it stays another run's."""
    folder = run("pretrain", output_dir=tmp_path / "run", **FLAGS)
    before = trajectory(folder)
    run("pretrain", output_dir=folder, **{**FLAGS, "max_steps": 8}, change="max_steps")
    other = shutil.copytree(folder / "checkpoint-4", tmp_path / "other/checkpoint-4")
    with pytest.raises(UserError, match="--max_steps 8 there, 6 now"):
        run("pretrain", output_dir=folder, **FLAGS, resume_from_checkpoint=other)
    run("pretrain", output_dir=folder, **FLAGS, resume_from_checkpoint=folder / "checkpoint-4")
    assert trajectory(folder) == before
    assert "changed" not in yaml.safe_load((folder / "run_config.yaml").read_text())["resolved"]


def test_another_model_is_not_a_change(run, tmp_path):
    folder = run("pretrain", output_dir=tmp_path / "run", **FLAGS)
    with pytest.raises(ArgumentError, match="--change: seed makes another run"):
        run("pretrain", output_dir=folder, **{**FLAGS, "seed": 1}, change="seed")
