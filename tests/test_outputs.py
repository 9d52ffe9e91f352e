"""Where nothing can be written, every command says so before it works."""

import os

import pytest

from vit_hf.cli import dispatch
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import UserError

COMMANDS = {
    "evaluate": (["nowhere", "--dataset_name", "digits", "--output_dir"], "--output_dir"),
    "compare": (["nowhere", "neither", "--dataset_name", "digits", "--output_dir"], "--output_dir"),
    "probe": (["nowhere", "--dataset_name", "digits", "--output_dir"], "--output_dir"),
    "predict": (["nowhere", "digits", "--output_file"], "--output_file"),
    "predict, copies": (["nowhere", "{0}", "--copy_to"], "--copy_to"),
    "bench": (["vit-demo-patch8-32", "--output_dir"], "--output_dir"),
    "figures": (["nowhere", "--output_dir"], "--output_dir"),
    "report": (["nowhere", "--output_dir"], "--output_dir"),
    "space": (["nowhere", "--output_dir"], "--output_dir"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_on_the_way_is_told_before_any_work(tmp_path, name):
    file = tmp_path / "file.png"
    file.write_text("mine")
    words, flag = COMMANDS[name]
    inside = file / "answers.csv" if flag == "--output_file" else file / "deep" / "er"
    words = [word.format(file) for word in words]
    with pytest.raises(UserError, match=f"{flag}: .*file.png is a file; name a folder"):
        dispatch([name.split(",")[0], *words, str(inside)])
    assert file.read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a system without /proc")
def test_where_no_folder_can_be_made():
    with pytest.raises(UserError, match="--output_file: nothing can be written to /proc/nope .*; name another folder"):
        dispatch(["predict", "nowhere", "digits", "--output_file", "/proc/nope/a.csv"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    for folder in (tmp_path / "closed", tmp_path / "closed/new"):
        with pytest.raises(UserError, match=r"--output_dir: nothing can be written to .*\(Permission denied\)"):
            check_folder(folder)


def test_to_look_leaves_nothing_behind(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    for folder in ("full", "new/er", "full/new"):
        check_folder(tmp_path / folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine"]


def test_a_folder_that_is_no_finished_run_is_told_without_noise(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, why in (("nothing", "there is no such folder"), ("empty", "no run_config.yaml and no all_results.json")):
        with pytest.raises(UserError, match=f"{name} is no finished run: .*{why}") as told:
            dispatch(["verify", str(tmp_path / name)])
        assert "Errno" not in str(told.value)
