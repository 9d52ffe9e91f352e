"""Uploads while a run trains: order, patience, refusals, and that nobody waits. The real client in this process, pointed at a
local Hub by its argument; times are arguments too."""

import email.utils
import json
import os
import re
import shutil
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.hub.hub_server import HubServer
from vit_hf.errors import UserError
from vit_hf.hub import uploader as uploader_module
from vit_hf.hub.push import HubSettings, find_repository, folder_commit, open_repository, send_folder
from vit_hf.hub.run_uploads import Teller, Uploads
from vit_hf.hub.uploader import Commit, Patience, Target, Uploader, one_line, open_api
from vit_hf.training.files import describe
from vit_hf.training.manifest import FORMAT, prune, seal, shard_name

TOKEN = "hf_secret_token_of_the_test"
QUICK = Patience(first=0.01, longest=0.05, last_try=0.3, end=20.0)
NAME = "tester/tiny"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(tokens={TOKEN: "tester"}) as server:
        yield server


def client(hub, token=TOKEN):
    return open_api(hub.url, token)


class Told(list):
    """What an Uploader tells: (event, step), and the details of each."""

    def __init__(self):
        self.details = []

    def __call__(self, event, commit, **details):
        self.append((event, commit.step))
        self.details.append(details)


def files_of(step):
    return lambda: (f"step {step}", {"config.json": b"{}", "step.txt": str(step).encode()})


def uploader_of(hub, target=Target(NAME), told=None, **kwargs):
    return Uploader(client(hub, **kwargs), target, told if told is not None else Told(), QUICK)


def titles(hub, branch="main"):
    repo = hub.repos["model", NAME]
    return [repo.titles[oid] for oid in repo.commits if oid in repo.titles]


@pytest.mark.parametrize(
    ("mode", "retry_after"), [("unavailable", None), ("limited", "0"), ("drop", None), ("limited", "date")]
)
def test_an_outage_is_outlasted(hub, mode, retry_after):
    """Two failed commits, then it is there: once, and the order is kept."""
    if retry_after == "date":
        retry_after = email.utils.formatdate(time.time() - 5, usegmt=True)
    told = Told()
    uploader = uploader_of(hub, told=told)
    hub.fail_commits(mode, times=2, retry_after=retry_after)
    uploader.put(Commit(10, files_of(10)))
    assert uploader.wait(5)
    assert told == [("upload_failed", 10), ("upload_failed", 10), ("uploaded", 10)]
    assert titles(hub) == ["step 10"] and hub.files("model", NAME)["step.txt"] == b"10"
    assert hub.leaks(TOKEN) == []


def test_retry_after_is_respected_and_a_newer_commit_does_not_jump_it(hub):
    """Only the newest commit is tried when the time has come; without the header the pause would be 10 ms."""
    told = Told()
    uploader = uploader_of(hub, told=told)
    hub.fail_commits("limited", times=1, retry_after="1")
    uploader.put(Commit(10, files_of(10)))
    assert not uploader.wait(20, enough=lambda: bool(told))
    failed = time.monotonic()
    done = []
    uploader.put(Commit(20, files_of(20), done=lambda: done.append(20)))
    uploader.put(Commit(None, files_of(30), last=True))
    assert uploader.wait(5) and time.monotonic() - failed >= 0.9
    assert titles(hub) == ["step 30"] and told[-1] == ("uploaded", None)
    assert ("upload_superseded", 10) in told and ("upload_superseded", 20) in told and done == [20]


@pytest.mark.parametrize("mode", ["unauthorized", "forbidden", "missing"])
def test_a_refusal_is_said_once_and_not_tried_again_before_the_next_commit(hub, mode, tmp_path, capsys):
    uploader = uploader_of(hub, told=Teller(tmp_path))
    hub.fail_commits(mode)
    for step in (10, 20):
        uploader.put(Commit(step, files_of(step)))
        assert uploader.wait(5)
    status = {"unauthorized": 401, "forbidden": 403, "missing": 404}[mode]
    posts = [request for request in hub.requests if "/commit/" in request.path]
    assert [request.status for request in posts] == [status, status]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and str(status) in warnings[0] and "training goes on" in warnings[0]
    hub.fail_commits(None)
    uploader.put(Commit(None, files_of(30), last=True))
    assert uploader.wait(5) and titles(hub) == ["step 30"]


def test_a_dropped_upload_of_weights_is_sent_again(hub):
    uploader = uploader_of(hub)
    weights = b"\0" * 1000
    hub.drop_lfs(1)
    uploader.put(Commit(1, lambda: ("step 1", {"model.safetensors": weights, "config.json": b"{}"})))
    assert uploader.wait(5)
    puts = [request.status for request in hub.requests if request.method == "PUT"]
    assert puts == [None, 200] and hub.files("model", NAME)["model.safetensors"] == weights


def test_a_commit_waits_for_no_pool_of_threads(hub):
    """Python waits for a pool of the client before it ends, however long that takes: several files, no thread but ours."""
    before, seen = set(threading.enumerate()), set()
    hub.before_commit = lambda: seen.update(thread.name for thread in set(threading.enumerate()) - before)
    uploader = uploader_of(hub)
    names = ["model.safetensors", "training_state-00001-of-00001.safetensors", "a.bin"]
    uploader.put(Commit(1, lambda: ("step 1", {name: name.encode() * 99 for name in names})))
    assert uploader.wait(5) and "uploads" in seen
    assert not [name for name in seen if name.startswith("ThreadPoolExecutor")]


def test_a_hub_that_hangs_holds_nobody(hub, monkeypatch):
    """`put` returns at once, the waiting ends when it is to end, and a silent socket is given up and tried again."""
    monkeypatch.setattr(uploader_module, "SOCKET_SECONDS", 0.2)
    told = Told()
    uploader = uploader_of(hub, told=told)
    hub.slow(60, "/commit/")
    start = time.monotonic()
    uploader.put(Commit(10, files_of(10)))
    assert time.monotonic() - start < 0.2
    assert not uploader.wait(0.05) and uploader.unsent() == [10]
    assert not uploader.wait(60, enough=lambda: True)
    assert not uploader.wait(20, enough=lambda: len(told) == 2)
    assert told == [("upload_failed", 10)] * 2 and "Timeout" in told.details[0]["why"]
    hub.slow(0)
    assert uploader.wait(5) and titles(hub)[-1] == "step 10"


def test_a_slow_hub_gets_the_newest_commit_only(hub):
    told, reached, go_on = Told(), threading.Event(), threading.Event()

    def hold():
        reached.set()
        assert go_on.wait(20)

    uploader = uploader_of(hub, told=told)
    hub.before_commit = hold
    uploader.put(Commit(10, files_of(10)))
    assert reached.wait(20)
    uploader.put(Commit(20, files_of(20)))
    uploader.put(Commit(30, files_of(30)))
    go_on.set()
    assert uploader.wait(5) and titles(hub) == ["step 10", "step 30"]
    assert sorted(told) == [("upload_superseded", 20), ("uploaded", 10), ("uploaded", 30)]


def test_a_commit_of_somebody_else_in_between_is_kept(hub):
    """The Hub refuses a commit on an older state (412); the next try begins with the newer one."""
    hub.add_repo("model", NAME, {"mine.txt": b"1"})
    others = iter([{"mine.txt": b"1", "last-checkpoint/theirs": b"2"}])
    told = Told()
    uploader = uploader_of(hub, told=told)
    hub.before_commit = lambda: [hub.add_repo("model", NAME, files) for files in others]
    uploader.put(Commit(10, files_of(10), mirrored=("last-checkpoint/",)))
    assert uploader.wait(5)
    assert told == [("upload_failed", 10), ("uploaded", 10)] and "412" in told.details[0]["why"]
    assert set(hub.files("model", NAME)) == {"mine.txt", "config.json", "step.txt"}


def test_a_token_that_may_only_read_is_a_refusal(hub):
    hub.tokens["hf_reader"] = "reader"
    hub.add_repo("model", NAME, {"old.txt": b"1"})
    uploader = uploader_of(hub, token="hf_reader")
    uploader.put(Commit(10, files_of(10)))
    assert uploader.wait(5) and "403" in uploader.why and set(hub.files("model", NAME)) == {"old.txt"}


def test_what_a_killed_run_kept_for_its_upload_is_removed_at_the_next_start(tmp_path):
    for name in (".upload-10", ".upload-mine", "checkpoint-10"):
        (tmp_path / name).mkdir()
    settings = HubSettings()
    open_repository(SimpleNamespace(is_main_process=True), tmp_path, {}, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".upload-mine", "checkpoint-10"]


def test_a_branch_is_made_from_main_and_main_stays(hub):
    hub.add_repo("model", NAME, {"old.txt": b"1"})
    uploader = uploader_of(hub, Target(NAME, revision="try/two"))
    for step in (10, 20):
        uploader.put(Commit(step, files_of(step)))
        assert uploader.wait(5)
    assert hub.files("model", NAME) == {"old.txt": b"1"}
    assert hub.files("model", NAME, "try/two")["step.txt"] == b"20" and uploader.why is None


def test_the_last_commit_is_given_up_in_time(hub):
    hub.fail_commits("unavailable")
    told = Told()
    uploader = uploader_of(hub, told=told)
    uploader.put(Commit(None, files_of(10), last=True))
    assert uploader.wait(5) and "503" in uploader.why
    assert told.details[-1]["seconds"] is None and len(told) > 2


def model_folder(folder, step=None):
    """The files of a model, or of a checkpoint with two files of training state."""
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights of %d" % (step or 0))
    if step is not None:
        for rank in range(2):
            (folder / shard_name(rank, 2)).write_bytes(b"state %d of %d" % (step, rank))
        files = {path.name: describe(path) for path in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, "step": step, "run": {"dataset_name": str(folder.parent / "data"), "seed": 0},
                    "exactness": {}, "wall_time_seconds": 1.0, "optimizer_steps": step, "scaler": None, "versions": {},
                    "files": files}  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    return folder


def run_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_config.yaml").write_text(f"dataset_name: {tmp_path}/data\nseed: 0\n")
    lines = [{"step": step, "eval_accuracy": step / 100, "eval_loss": 1.0} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_each_commit_is_one_whole_state_whatever_is_pruned_meanwhile(hub, tmp_path):
    """A checkpoint is removed while it waits for the Hub; what is gone of the older state is deleted by the same commit; and
    neither a path of this machine nor the token is sent or written."""
    run = run_folder(tmp_path)
    uploader = uploader_of(hub, told=Teller(run))
    uploads = Uploads(uploader, run, with_state=True)
    hub.fail_commits("unavailable", times=1)
    for step in (10, 20):
        checkpoint = model_folder(run / f"checkpoint-{step}", step)
        if step == 20:  # another number of processes: one file less
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            (checkpoint / shard_name(1, 2)).unlink()
            (checkpoint / shard_name(0, 2)).rename(checkpoint / shard_name(0, 1))
            manifest["files"] = {
                path.name: describe(path) for path in checkpoint.iterdir() if path.name != "manifest.json"
            }
            (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
        uploads.whole(checkpoint)
        uploads.due(step)
        shutil.rmtree(checkpoint)
        assert uploader.wait(5)
    assert titles(hub) == ["step 10: eval_accuracy 0.1000", "step 20: eval_accuracy 0.2000"]
    repo = hub.repos["model", NAME]
    for oid, step in zip(repo.titles, (10, 20), strict=True):
        files = hub.files("model", NAME, oid)
        manifest = json.loads(files["last-checkpoint/manifest.json"])
        assert manifest["step"] == step and manifest["run"]["dataset_name"] == "data" and seal(manifest) == manifest
        state = {name.removeprefix("last-checkpoint/") for name in files if name.startswith("last-checkpoint/")}
        assert state == {*manifest["files"], "manifest.json"}
        assert files["model.safetensors"] == files["last-checkpoint/model.safetensors"] == b"weights of %d" % step
        assert [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()] == list(
            range(10, step + 1, 10)
        )
        assert not any(str(tmp_path).encode() in content for content in files.values())
    assert not list(run.glob(".upload-*")) and hub.leaks(TOKEN) == []
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written and b'"event": "uploaded"' in written


def test_a_model_alone_goes_without_its_state(hub, tmp_path):
    run = run_folder(tmp_path)
    uploader = uploader_of(hub)
    uploads = Uploads(uploader, run, with_state=False)
    uploads.due(10)  # the evaluation may be over before the checkpoint is whole
    uploads.whole(model_folder(run / "checkpoint-10", 10))
    assert uploader.wait(5)
    assert set(hub.files("model", NAME)) - {".gitattributes"} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "run_config.yaml", "metrics.jsonl",
    }  # fmt: skip


def test_a_full_disk_is_a_warning(hub, tmp_path, monkeypatch, capsys):
    """No second names, and no room for copies."""

    def full(*_):
        raise OSError(28, "No space left on device")

    run = run_folder(tmp_path)
    uploader = uploader_of(hub)
    uploads = Uploads(uploader, run, with_state=True)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    uploads.whole(model_folder(run / "checkpoint-10", 10))
    uploads.due(10)
    assert uploader.wait(1) and "No space left" in capsys.readouterr().err and not list(run.glob(".upload-*"))


@pytest.mark.parametrize("second", [False, True], ids=["one signal", "two signals"])
def test_a_stopped_run_waits_for_a_while_and_says_what_is_not_sent(hub, tmp_path, capsys, second):
    run = run_folder(tmp_path)
    uploader = uploader_of(hub)
    uploads = Uploads(uploader, run, with_state=True, stop_seconds=60.0 if second else 0.1)
    reached, go_on = threading.Event(), threading.Event()

    def hold():
        again = reached.is_set()
        reached.set()
        if second and not again:
            os.kill(os.getpid(), 15)
        go_on.wait(20)

    hub.before_commit = hold
    uploads.whole(model_folder(run / "checkpoint-10", 10))
    if not second:
        uploads.due(10)
        assert reached.wait(20)
    start = time.monotonic()
    try:
        with pytest.raises(UserError):
            try:
                raise UserError("stopped by SIGTERM")
            finally:
                if second:
                    uploader.wait = waiting_for(uploader.wait, lambda: uploads.due(10), reached)
                uploads.leave()
    finally:
        go_on.set()
    assert uploader.wait(5), "nothing of it is left for the next test"
    assert time.monotonic() - start < 20
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "step 10" in warnings[0] and f"vit-hf push {run}" in warnings[0]


def waiting_for(wait, send, reached):
    """A `wait` that sends first, and begins when the Hub has got the commit: the signal meets who listens."""

    def later(seconds, enough=lambda: False):
        send()
        assert reached.wait(20)
        return wait(seconds, enough)

    return later


def test_the_finished_folder_fails_in_one_line_that_names_the_command(hub, tmp_path):
    folder = model_folder(tmp_path / "model")
    hub.fail_commits("drop")
    with pytest.raises(UserError) as raised:
        send_folder(uploader_of(hub), folder, False, QUICK, "vit-hf push")
    assert "the model is complete" in str(raised.value) and "vit-hf push" in str(raised.value)
    hub.fail_commits(None)
    assert send_folder(uploader_of(hub), folder, False, QUICK, "").endswith(NAME)


def test_only_what_may_go_goes(tmp_path):
    folder = model_folder(tmp_path / "model")
    for name in ("events.jsonl", ".env", "token", "optimizer.pt", "notes.txt", "config.json.tmp", "checkpoint-1.tmp"):
        (folder / name).write_text("secret")
    assert set(folder_commit(folder, False)[1]) == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


def test_what_commands_measured_goes_too_without_paths(tmp_path):
    folder = model_folder(tmp_path / "model")
    one = {
        "model": str(folder),
        "dataset_name": str(tmp_path / "birds"),
        "eval_accuracy": 0.5,
        "average_precision": {"a": 0.1},
    }
    (folder / "eval_results.json").write_text(json.dumps(one | {"sets": [one]}))
    (folder / "verified.json").write_text(json.dumps({"results": [], "met": True}))
    files = folder_commit(folder, False)[1]
    sent = json.loads(files["eval_results.json"])
    assert sent["sets"] == [{**one, "model": "model", "dataset_name": "birds"}] and "verified.json" in files
    (folder / "verified.json").write_text("{")
    with pytest.raises(UserError, match="verified.json is not JSON"):
        folder_commit(folder, False)


def test_no_line_holds_a_token(monkeypatch, hub):
    """The client itself shows a token that cannot be sent."""
    api = HfApi(endpoint=hub.url, token="secret\nword")
    with pytest.raises(Exception, match="secret"):
        api.whoami()
    name, warning = find_repository(api, "tiny")
    assert name == "tiny" and "(hidden)" in warning and "secret" not in warning
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for text in (f"Bearer {TOKEN}", f"x {TOKEN} y", "https://s3.example.com/object?X-Amz-Signature=abc"):
        assert not re.search(f"{TOKEN}|abc", one_line(RuntimeError(text)))


def test_a_wrong_token_is_a_refusal(hub, tmp_path, capsys):
    uploader = uploader_of(hub, token="hf_wrong", told=Teller(tmp_path))
    uploader.put(Commit(1, files_of(1)))
    assert uploader.wait(5) and "401" in uploader.why
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 and "hf_wrong" not in told
    assert "hf_wrong" not in (tmp_path / "events.jsonl").read_text()


def test_what_a_run_sends_is_unlinked_from_what_it_prunes(tmp_path, hub):
    """The files keep second names, no second room, until the commit is made."""
    run = run_folder(tmp_path)
    uploader = uploader_of(hub)
    uploads = Uploads(uploader, run, with_state=True)
    first = model_folder(run / "checkpoint-10", 10)
    inode = (first / "model.safetensors").stat().st_ino
    uploads.whole(first)
    model_folder(run / "checkpoint-20", 20)
    prune(run, 1)
    assert not first.exists() and (run / ".upload-10/model.safetensors").stat().st_ino == inode
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-20"}
