"""Push and load by id, with the real clients against a local Hub."""

import hashlib
import io
import json
import os
import re
import shlex
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.hub.hub_server import HubServer
from tests.runs import DEMO_DEFAULTS, ROOT, launch, python, scripts_of, words

pytestmark = pytest.mark.slow
TOKEN = "hf_secret_token_of_the_test"
FAST = {**DEMO_DEFAULTS, "max_steps": 2, "push_to_hub": "true"}


@pytest.fixture
def hub():
    with HubServer(tokens={TOKEN: "tester"}) as server:
        yield server


def script(hub, tmp_path, name, token=TOKEN, **flags):
    flags = {key: value for key, value in flags.items() if value is not None}
    return python(ROOT / f"run_{name}.py", *words(flags), env=hub.env(token=token, home=tmp_path / "home"))


def test_the_finished_folder_is_pushed_and_loads_by_id(hub, tmp_path):
    """Model, processor, card, curves and figures go up; checkpoints and the token do not; transformers, evaluate and
    run_finetune.py take the repository by its id."""
    folder = tmp_path / "tiny-vit"
    result = script(hub, tmp_path, "pretrain", output_dir=folder, hub_private_repo="true", log_figures_steps=2, **FAST)
    assert result.returncode == 0, result.stderr
    assert "pushed to" in result.stdout and hub.repos["model", "tester/tiny-vit"].private
    files = hub.files("model", "tester/tiny-vit")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "run_config.yaml", "metrics.jsonl",
            "all_results.json", "learning_curves.png"} == {name for name in files if "/" not in name} - {".gitattributes"}  # fmt: skip
    figures = {name for name in files if "/" in name}
    assert "figures/attention_rollout.png" in figures and all(
        f"]({name})" in files["README.md"].decode() for name in figures
    )
    assert '"tester/tiny-vit"' in files["README.md"].decode()  # the card's example loads this repository
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert (folder / "checkpoint-2").exists() and hub.leaks(TOKEN) == []
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())

    loaded = python(
        "-c",
        "import torch, transformers\n"
        "model = transformers.AutoModelForImageClassification.from_pretrained('tester/tiny-vit')\n"
        "processor = transformers.AutoImageProcessor.from_pretrained('tester/tiny-vit')\n"
        "print(type(model).__module__, list(processor.image_mean), model.config.id2label[3])",
        env=hub.env(token=TOKEN, home=tmp_path / "home"),
    )
    assert loaded.stdout.strip() == "transformers.models.vit.modeling_vit [0.5, 0.5, 0.5] 3", loaded.stderr
    evaluated = python(
        "-m", "vit_hf.cli", "evaluate", "tester/tiny-vit", "--dataset_name", "digits", "--max_eval_samples", 101,
        "--output_dir", tmp_path / "eval", env=hub.env(token=TOKEN, home=tmp_path / "home"),
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    before, after = (
        json.loads(path.read_text()) for path in (folder / "all_results.json", tmp_path / "eval/eval_results.json")
    )
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    flags = {
        **FAST,
        "preset": None,
        "config_overrides": None,
        "push_to_hub": None,
        "model_name_or_path": "tester/tiny-vit",
    }
    tuned = script(hub, tmp_path, "finetune", output_dir=tmp_path / "tuned", **flags)
    assert tuned.returncode == 0, tuned.stderr
    assert "base_model: tester/tiny-vit" in (tmp_path / "tuned/README.md").read_text()


def test_a_refused_token_warns_at_the_start_and_ends_with_the_command_to_repeat(hub, tmp_path):
    folder = tmp_path / "tiny-vit"
    result = script(hub, tmp_path, "pretrain", token="hf_wrong", output_dir=folder, **FAST)
    assert result.returncode == 1
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: --push_to_hub")]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(warnings) == len(errors) == 1 and "training goes on" in warnings[0]
    assert (
        f"the model is complete in {folder}" in errors[0]
        and "401" in errors[0]
        and f"vit-hf push {folder} --hub_model_id tiny-vit" in errors[0]
    )
    assert (folder / "model.safetensors").exists() and (folder / "all_results.json").exists()
    assert "Traceback" not in result.stderr and "hf_wrong" not in result.stdout + result.stderr


def test_a_hub_lost_at_the_end_leaves_the_model_and_exits_1(hub, tmp_path):
    """Both ways that the line names bring the folder to the Hub later, and no path of this machine goes along. The card
    tells that the weights are an average."""
    hub.fail_commits("forbidden")
    folder, flags = tmp_path / "tiny-vit", {**FAST, "ema_decay": 0.5}
    result = script(hub, tmp_path, "pretrain", output_dir=folder, **flags)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "Traceback" not in result.stderr and "403" in errors[0]
    command = re.search(r"hf auth login && vit-hf (push .*)", errors[0])[1]
    assert (folder / "model.safetensors").exists()
    hub.fail_commits(None)
    environment = hub.env(token=TOKEN, home=tmp_path / "home")
    done = python("-m", "vit_hf.cli", *shlex.split(command), env=environment)
    assert done.returncode == 0 and "pushed to" in done.stdout, done.stderr
    again = script(hub, tmp_path, "pretrain", output_dir=folder, **flags)
    assert again.returncode == 0 and "nothing to do" in again.stdout and "pushed to" in again.stdout, again.stderr
    repo = hub.repos["model", "tester/tiny-vit"]
    assert len(repo.titles) == 1, "the second one finds all of it there"
    files = hub.files("model", "tester/tiny-vit")
    assert {"config.json", "model.safetensors", "README.md", "metrics.jsonl", "run_config.yaml"} < set(files)
    assert not any(name.startswith("checkpoint") or "events" in name for name in files)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    card = files["README.md"].decode()
    assert (
        "exponential moving average" in card and "`ema_decay: 0.5`" in card and "those of the last step;" not in card
    )


def test_two_processes_are_stopped_and_go_on_from_the_hub_elsewhere(hub, tmp_path):
    """SIGTERM in the middle, when the second commit is sent. Each commit is a whole state, and the Hub takes the
    last one only when the other process has ended: who waits for the upload waits for ever."""

    def stop():
        commits.append(1)
        if len(commits) == 2 and 0 in scripts_of(folder):
            os.kill(scripts_of(folder)[0], signal.SIGTERM)

    def wait():
        deadline = time.monotonic() + 20
        while 1 in scripts_of(elsewhere) and time.monotonic() < deadline:
            time.sleep(0.1)
        ended.append(1 not in scripts_of(elsewhere))

    commits, ended, folder, elsewhere = [], [], tmp_path / "tiny", tmp_path / "elsewhere"
    hub.before_commit = stop
    flags = {**DEMO_DEFAULTS, "max_steps": 120, "save_steps": 5, "logging_steps": 5, "eval_steps": 100}
    flags |= {"push_to_hub": "true", "hub_strategy": "checkpoint", "hub_model_id": "tiny"}
    env = hub.env(token=TOKEN, home=tmp_path / "home")
    stopped = launch("pretrain", "cpu_2proc", env=env, output_dir=folder, **flags)
    assert stopped.returncode == 1 and "stopped by SIGTERM" in stopped.stderr, stopped.stderr[-3000:]
    kept = json.loads(hub.files("model", "tester/tiny")["last-checkpoint/manifest.json"])["step"]
    assert 0 < kept < 120
    hub.before_commit = wait
    flags |= {"save_steps": 1000, "resume_from_checkpoint": "hub"}
    resumed = launch("pretrain", "cpu_2proc", env=env, output_dir=elsewhere, **flags)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"checkpoint-{kept} comes from tester/tiny" in resumed.stdout and "exactly" in resumed.stdout
    assert ended[-1] is True and "pushed to" in resumed.stdout
    weights = (elsewhere / "model.safetensors").read_bytes()
    assert hub.files("model", "tester/tiny")["model.safetensors"] == weights

    repo = hub.repos["model", "tester/tiny"]
    for oid in repo.titles:  # each commit is whole
        files = hub.files("model", "tester/tiny", oid)
        manifest = json.loads(files["last-checkpoint/manifest.json"])
        assert {name for name in files if name.startswith("last-checkpoint/")} == {
            f"last-checkpoint/{name}" for name in [*manifest["files"], "manifest.json"]
        }
        assert all(hashlib.sha256(files[f"last-checkpoint/{name}"]).hexdigest() == one["sha256"]
                   for name, one in manifest["files"].items())  # fmt: skip
        assert files["last-checkpoint/model.safetensors"] == files["model.safetensors"]
        assert not any(str(tmp_path).encode() in content for content in files.values())
    assert hub.leaks(TOKEN) == [] and not any(TOKEN in done.stdout + done.stderr for done in (stopped, resumed))
    written = [path for path in (*folder.rglob("*"), *elsewhere.rglob("*")) if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def picture(grey, side=32):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), grey, dtype=np.uint8)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def parquet(column, labels, names, label="label", side=32):
    """A parquet file as the Hub's own have it, with the features in its metadata."""
    features = {column: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    table = pa.table({column: [picture(40 * (number % 5), side) for number in range(len(labels))], label: labels})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def test_cifar10_by_its_short_name(hub, tmp_path):
    """The Hub's schema: uoft-cs/cifar10, configuration plain_text, column img, splits train and test."""
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    hub.add_repo("dataset", "uoft-cs/cifar10", {
        "plain_text/train-00000-of-00001.parquet": parquet("img", list(range(10)) * 6, names),
        "plain_text/test-00000-of-00001.parquet": parquet("img", list(range(10)) * 2, names),
        "README.md": b"---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n"
                     b"  - split: test\n    path: plain_text/test-*\n---\n",
    })  # fmt: skip
    flags = {
        **FAST,
        "push_to_hub": None,
        "dataset_name": "cifar10",
        "max_eval_samples": None,
        "subset_classes": "ship,cat",
    }
    result = script(hub, tmp_path, "pretrain", output_dir=tmp_path / "run", **flags)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "ship"}
    results = json.loads((tmp_path / "run/all_results.json").read_text())
    assert results["eval_samples"] == 4 and results["train_samples"] == 12
    card = (tmp_path / "run/README.md").read_text()
    resolved = __import__("yaml").safe_load((tmp_path / "run/run_config.yaml").read_text())["resolved"]
    assert (
        len(resolved["dataset_revision"]) == 40 and resolved["dataset_revision"] in card
    )  # of the evaluated split too
    assert "uoft-cs/cifar10" in card and "subset_hash" in card


def test_imagenet_without_access_says_where_to_ask_and_with_access_crops_the_centre(hub, tmp_path):
    names = [f"class {number}" for number in range(6)]
    hub.add_repo("dataset", "ILSVRC/imagenet-1k", {
        "data/train-00000-of-00001.parquet": parquet("image", list(range(6)) * 6, names, side=40),
        "data/validation-00000-of-00001.parquet": parquet("image", list(range(6)), names, side=40),
        "data/test-00000-of-00001.parquet": parquet("image", [-1] * 6, names, side=40),
    }, gated=True)  # fmt: skip
    flags = {
        **FAST,
        "push_to_hub": None,
        "dataset_name": "imagenet-1k",
        "max_eval_samples": None,
        "subset_fraction": 0.6667,
    }
    flags["random_crop"] = "scale=0.3"
    refused = script(hub, tmp_path, "pretrain", output_dir=tmp_path / "run", **flags)
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.returncode == 1 and len(errors) == 1 and "Traceback" not in refused.stderr
    assert "https://huggingface.co/datasets/ILSVRC/imagenet-1k" in errors[0] and "hf auth login" in errors[0]
    hub.repos["dataset", "ILSVRC/imagenet-1k"].readers.add("tester")
    result = script(hub, tmp_path, "pretrain", output_dir=tmp_path / "run", **flags)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run/all_results.json").read_text())
    assert results["train_samples"] == 24 and results["eval_samples"] == 6  # validation: test has no labels
    processor = json.loads((tmp_path / "run/preprocessor_config.json").read_text())
    assert processor["do_center_crop"] and processor["size"] == {"shortest_edge": 36}
