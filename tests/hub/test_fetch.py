"""A checkpoint from the Hub: taken when each of its files is that of the manifest, and not otherwise."""

import json
import os
import signal
from functools import partial

import huggingface_hub
import pytest

from tests.hub.test_uploads import NAME, TOKEN, client, model_folder, run_folder, uploader_of
from tests.hub.test_uploads import hub as hub  # noqa: PLC0414 - a fixture
from tests.runs import DEMO_DEFAULTS, evaluation, in_process, trajectory
from vit_hf.commands.push import main
from vit_hf.errors import UserError
from vit_hf.hub.fetch import fetch_checkpoint
from vit_hf.hub.run_uploads import Uploads
from vit_hf.training.manifest import read_manifest


@pytest.fixture
def fetch(hub, tmp_path):
    """The Hub holds step 10 of a run; fetches it into a folder of another machine."""
    run = run_folder(tmp_path)
    uploader = uploader_of(hub)
    uploads = Uploads(uploader, run, with_state=True)
    uploads.whole(model_folder(run / "checkpoint-10", 10))
    uploads.due(10)
    assert uploader.wait(5)
    here = {"dataset_name": "/elsewhere/data", "seed": 0}
    return partial(fetch_checkpoint, client(hub), NAME, None, tmp_path / "new", here)


def test_it_becomes_a_whole_checkpoint_with_the_paths_of_this_machine(fetch, hub, tmp_path):
    assert f"checkpoint-10 comes from {NAME}" in fetch()
    found = read_manifest(tmp_path / "new/checkpoint-10")
    assert found["step"] == 10 and found["run"] == {"dataset_name": "/elsewhere/data", "seed": 0}
    lines = (tmp_path / "new/checkpoint-10/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10]
    assert "going on from checkpoint-10 of the output folder" in fetch() and hub.leaks(TOKEN) == []


def test_a_changed_file_is_refused_and_leaves_nothing(fetch, hub, tmp_path):
    files = hub.files("model", NAME)
    hub.add_repo("model", NAME, files | {"last-checkpoint/model.safetensors": b"weights of 99"})
    with pytest.raises(UserError, match="model.safetensors"):
        fetch()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", [NAME, "tester/other"])
def test_without_a_checkpoint_no_run_is_begun_by_mistake(hub, tmp_path, name):
    hub.add_repo("model", NAME, {"config.json": b"{}"})
    with pytest.raises(UserError, match="holds no last-checkpoint/"):
        fetch_checkpoint(client(hub), name, None, tmp_path / "new", {})


def test_a_dry_run_of_push_lists_what_would_go_and_asks_nobody(tmp_path, capsys):
    folder = model_folder(run_folder(tmp_path) / "checkpoint-10", 10)
    main([str(folder), "--hub_strategy", "checkpoint", "--dry_run"])
    told = capsys.readouterr().out
    assert "last-checkpoint/manifest.json" in told and "README.md" in told
    assert 'would go to run (main) as "step 10: eval_accuracy 0.1000"' in told
    with pytest.raises(UserError, match="no model's folder"):
        main([str(tmp_path), "--dry_run"])


@pytest.fixture
def run_with(hub, tmp_path, monkeypatch):
    """Runs the pretraining script in this process, with the local Hub for the Hub."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(folder, **flags):
        in_process("pretrain", **DEMO_DEFAULTS | FLAGS | flags, output_dir=tmp_path / folder)
        return tmp_path / folder

    return run


FLAGS = {"max_steps": 60, "save_steps": 10, "eval_steps": 30, "ema_decay": 0.9, "mixup_alpha": 0.2}
PUSHING = {"push_to_hub": "true", "hub_strategy": "checkpoint", "hub_model_id": "tiny"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_elsewhere_to_the_bit(run_with, hub, capsys):
    """Two runs with a Hub that fails, the first stopped in the middle and the second with what the Hub has of it, do what
    one run does that uploads nothing. The finished checkpoint is there at last, and another run's is refused."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a signal that comes too late fails the test and no more
    hub.before_commit = lambda: os.kill(os.getpid(), signal.SIGTERM)
    try:
        with pytest.raises(UserError, match="stopped by SIGTERM"):
            run_with("here", **PUSHING)
    finally:
        signal.signal(signal.SIGTERM, before)
    hub.before_commit = lambda: None
    hub.fail_commits("limited", times=1, retry_after="0")
    hub.drop_lfs(1)
    kept = json.loads(hub.files("model", NAME)["last-checkpoint/manifest.json"])["step"]
    assert 0 < kept < 60
    capsys.readouterr()
    elsewhere = run_with("elsewhere", resume_from_checkpoint="hub", **PUSHING)
    told = capsys.readouterr().out
    assert f"checkpoint-{kept} comes from {NAME}" in told and "exactly" in told
    alone = run_with("alone")
    assert trajectory(elsewhere) == trajectory(alone) and evaluation(elsewhere) == evaluation(alone)
    assert hub.files("model", NAME)["model.safetensors"] == (alone / "model.safetensors").read_bytes()
    assert json.loads(hub.files("model", NAME)["last-checkpoint/manifest.json"])["step"] == 60
    assert hub.leaks(TOKEN) == []
    with pytest.raises(UserError, match="seed") as refused:
        run_with("other", resume_from_checkpoint="hub", seed=5, **PUSHING)
    assert len(str(refused.value).splitlines()) == 1
