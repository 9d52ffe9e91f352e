"""The local test Hub, used by the real clients.

Each test runs its client code in a subprocess, because the clients read HF_ENDPOINT when they are imported. The code
asserts on its own; a failing assertion ends the subprocess with an error, which fails the test.
"""

import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from .hub_server import HubServer

TOKEN = "hf_test"
LABELS = ["cat", "dog"]


@pytest.fixture
def hub():
    with HubServer(tokens={TOKEN: "tester"}) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Runs client code against the Hub and returns what it printed."""

    def run(code: str, token: str | None = TOKEN) -> str:
        env = hub.env(token, home=tmp_path / "home")
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def image_parquet(rows: int) -> bytes:
    """A parquet file of images and labels, with the column types in its huggingface metadata, as the Hub has them."""
    images, labels = [], [row % 2 for row in range(rows)]
    for row in range(rows):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (row, 0, 0)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = {"image": {"_type": "Image"}, "label": {"names": LABELS, "_type": "ClassLabel"}}
    column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_upload_and_download_are_equal(hub, client, tmp_path):
    folder = tmp_path / "model"
    (folder / "logs").mkdir(parents=True)
    wanted = {"config.json": b'{"a": 1}', "logs/notes.txt": b"", "model.safetensors": bytes(range(256)) * 43_000}
    wanted["README.md"] = b"---\nlicense: mit\n---\n# Hello\n"
    for path, data in wanted.items():
        (folder / path).write_bytes(data)
    client("""
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
assert api.whoami()["name"] == "tester"
for _ in range(2):
    assert api.create_repo("tester/model", private=True, exist_ok=True).repo_id == "tester/model"
commit = api.upload_folder(repo_id="tester/model", folder_path="model", commit_message="First")
names = {".gitattributes", "README.md", "config.json", "logs/notes.txt", "model.safetensors"}
assert set(api.list_repo_files("tester/model")) == names
info = api.repo_info("tester/model")
assert info.private and info.sha == commit.oid
got = Path(snapshot_download("tester/model"))
for path in names - {".gitattributes"}:
    assert (got / path).read_bytes() == Path("model", path).read_bytes(), path
again = api.upload_folder(repo_id="tester/model", folder_path="model")
assert again.oid == commit.oid, "unchanged files must not make a new commit"
api.delete_folder("logs", repo_id="tester/model")
assert "config.json" in hf_hub_download("tester/model", "config.json", revision=commit.oid)
""")
    files = hub.files("model", "tester/model")
    assert files.pop(".gitattributes")
    assert files == {path: data for path, data in wanted.items() if not path.startswith("logs/")}
    assert {upload.path for upload in hub.uploads if upload.data is not None} == set(wanted)
    assert len(hub.lfs_objects) == 1
    puts = [request.path for request in hub.requests if request.method == "PUT"]
    assert len(puts) == 1, "the second upload must not send the large file again"
    assert hub.leaks(TOKEN) == []


def test_leaks_finds_a_secret_in_every_place(hub, client):
    client(f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("tester/leaky")
for name in ("small.txt", "large.bin"):
    api.upload_file(repo_id="tester/leaky", path_or_fileobj=b"xx{TOKEN}xx", path_in_repo=name,
                    commit_message="add {TOKEN}")
""")
    kinds = [place.split()[0] for place in hub.leaks(TOKEN)]
    assert kinds[:5] == ["file", "file", "LFS", "commit", "commit"]
    assert set(kinds[5:]) == {"POST", "PUT"}, "bodies, whatever they hold"


def test_load_dataset_by_id(hub, client):
    files = {f"data/{split}-00000-of-00001.parquet": image_parquet(8) for split in ("train", "test")}
    hub.add_repo("dataset", "someone/pets", files)
    client("""
from datasets import load_dataset
data = load_dataset("someone/pets")
assert {split: len(rows) for split, rows in data.items()} == {"train": 8, "test": 8}
assert data["train"].features["label"].names == ["cat", "dog"]
assert data["train"][3]["image"].getpixel((0, 0)) == (3, 0, 0)
""")


@pytest.mark.slow
def test_streaming_reads_ranges(hub, client):
    hub.add_repo("dataset", "someone/pets", {"data/train-00000-of-00001.parquet": image_parquet(8)})
    client("""
from datasets import load_dataset
data = load_dataset("someone/pets", split="train", streaming=True)
assert data.features["label"].names == ["cat", "dog"]
rows = list(data)
assert [row["label"] for row in rows] == [0, 1] * 4 and rows[3]["image"].getpixel((0, 0)) == (3, 0, 0)
""")
    assert 206 in {request.status for request in hub.requests}


@pytest.mark.slow
def test_access_is_refused_as_on_the_hub(hub, client):
    hub.add_repo("dataset", "someone/gated", {"data/train.parquet": image_parquet(2)}, gated=True)
    hub.add_repo("model", "someone/secret", {"config.json": b"{}"}, private=True)
    for name in ("tester/open", "someone/public"):
        hub.add_repo("model", name, {"config.json": b"{}"})
    code = """
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError)

def refused(error, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error as caught:
        return caught
    raise AssertionError(f"{function.__name__}{args} was not refused")
"""
    client(
        code
        + """
gate = refused(GatedRepoError, hf_hub_download, "someone/gated", "data/train.parquet", repo_type="dataset")
assert gate.response.status_code == 403 and "not in the authorized list" in str(gate)
assert "gated dataset" in str(refused(DatasetNotFoundError, load_dataset, "someone/gated"))
for name in ("someone/secret", "someone/missing"):
    assert refused(RepositoryNotFoundError, hf_hub_download, name, "config.json").response.status_code == 404
refused(EntryNotFoundError, hf_hub_download, "tester/open", "missing.json")
refused(RevisionNotFoundError, hf_hub_download, "tester/open", "config.json", revision="v2")
assert refused(HfHubHTTPError, HfApi().create_repo, "someone/new").response.status_code == 403
wrong = refused(HfHubHTTPError, HfApi(token="hf_wrong").whoami)
assert wrong.response.status_code == 401
wrong = refused(HfHubHTTPError, hf_hub_download, "tester/open", "config.json", token="hf_wrong")
assert wrong.response.status_code == 401 and "Invalid credentials" in str(wrong)
upload = dict(repo_id="someone/public", path_or_fileobj=b"x", path_in_repo="x.txt")
assert refused(HfHubHTTPError, HfApi().upload_file, **upload).response.status_code == 403
"""
    )
    client(
        code
        + """
assert hf_hub_download("tester/open", "config.json")
gate = refused(GatedRepoError, hf_hub_download, "someone/gated", "data/train.parquet", repo_type="dataset")
assert gate.response.status_code == 401
assert "You must be authenticated" in str(refused(DatasetNotFoundError, load_dataset, "someone/gated"))
""",
        token=None,
    )
    hub.repos["dataset", "someone/gated"].readers.add("tester")
    client('from datasets import load_dataset; assert len(load_dataset("someone/gated")["train"]) == 2')


@pytest.mark.parametrize(("mode", "error"), [("forbidden", "403"), ("unavailable", "503"), ("drop", "disconnected")])
def test_failing_commits(hub, client, mode, error):
    hub.add_repo("model", "tester/model", {"config.json": b"{}"})
    hub.fail_commits(mode)
    code = """
from huggingface_hub import HfApi
try:
    HfApi().upload_file(repo_id="tester/model", path_or_fileobj=b"new", path_in_repo="new.txt")
    print("stored")
except Exception as error:
    print(type(error).__name__, error)
"""
    assert error in client(code)
    assert hub.files("model", "tester/model") == {"config.json": b"{}"}
    assert [(upload.path, upload.data) for upload in hub.uploads] == [("new.txt", b"new")], "what was sent is kept"
    hub.fail_commits(None)
    assert "stored" in client(code)


def test_outage_of_everything(hub, client):
    hub.add_repo("model", "tester/model", {"config.json": b"{}"})
    hub.fail_commits("unavailable", everything=True)
    client("""
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
try:
    HfApi().whoami()
except HfHubHTTPError as error:
    assert error.response.status_code == 503
else:
    raise AssertionError("whoami must fail")
""")


@pytest.mark.slow
def test_transformers_by_id(hub, client):
    client("""
import torch
from transformers import (
    AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor)
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8,
                   patch_size=4, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
model = ViTForImageClassification(config)
model.push_to_hub("tester/vit")
ViTImageProcessor(size={"height": 8, "width": 8}).push_to_hub("tester/vit")
loaded = AutoModelForImageClassification.from_pretrained("tester/vit")
assert loaded.config.id2label == {0: "cat", 1: "dog"}
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
assert AutoImageProcessor.from_pretrained("tester/vit").size["height"] == 8
""")
    assert {"model.safetensors", "config.json"} <= set(hub.files("model", "tester/vit"))
    assert not [request for request in hub.requests if request.path.startswith("/api/telemetry")]
