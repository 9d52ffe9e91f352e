"""The two named sets that lie on the Hub, cifar10 and imagenet-1k, stored and streamed, from a local Hub that has both
in small: the same repositories, cards, configurations, columns, splits and kinds of files.

Client code runs in processes of its own, because the clients read HF_ENDPOINT when they are imported. What they load
is compared with what was put on the Hub, image by image.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.hub.hub_server import HubServer
from tests.runs import DEMO_DEFAULTS, ROOT, words

READER, STRANGER = "hf_token_with_access", "hf_token_without_access"
CIFAR10, IMAGENET = "uoft-cs/cifar10", "ILSVRC/imagenet-1k"
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Names hold commas and quotes. WordNet calls two classes "crane"; `datasets` wants each name once, so that on the Hub one
# of them is "crane2".
IMAGENET_CLASSES = [
    "tench, Tinca tinca",
    "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias",
    "crane",
    "carpenter's kit, tool kit",
    "crane2",
    "jack-o'-lantern",
    "maillot",
    "maillot, tank suit",
    "sunglass",
    "sunglasses, dark glasses, shades",
]
ROW_GROUP = 6
FRACTION = 0.6667  # the recipes' two thirds

# What a set consists of: rows {split: [(encoded image, label)]} in the order of the shards, and shards {path: bytes}.
Content = namedtuple("Content", "rows shards")


# --- the sets ---


pytestmark = pytest.mark.slow  # each starts processes that load, and some that train


def picture(number: int, kind="JPEG", mode="RGB", size=None, padding=0) -> bytes:
    """An encoded image that no other number gives; `size` is (width, height), `padding` the bytes that follow it."""
    random = np.random.RandomState(number)
    size = size or tuple(random.randint(30, 80, 2).tolist())
    pixels = random.randint(0, 256, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue() + random.bytes(padding)


def card(column: str, classes: list[str], rows: dict, folder: str, config: str) -> bytes:
    """The head of the README.md, as the Hub's converter writes it."""
    names = {str(number): name for number, name in enumerate(classes)}
    features = [{"name": column, "dtype": "image"}, {"name": "label", "dtype": {"class_label": {"names": names}}}]
    sizes = {split: sum(len(data) for data, _ in content) for split, content in rows.items()}
    info = {"config_name": config} if config != "default" else {}
    info |= {"features": features, "download_size": sum(sizes.values()), "dataset_size": sum(sizes.values())}
    info["splits"] = [{"name": split, "num_bytes": sizes[split], "num_examples": len(rows[split])} for split in rows]
    files = [{"split": split, "path": f"{folder}/{split}-*"} for split in rows]
    head = {"dataset_info": info, "configs": [{"config_name": config, "data_files": files, "default": True}]}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# Dataset Card\n".encode()


def add_set(hub, repo_id, rows, num_shards, *, column, classes, folder="data", config="default", gated=False):
    """Puts a set on the Hub. `rows`: {split: [(encoded image, label)]}; `num_shards`: {split: number}."""
    features = {column: {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shards = {}
    for split, content in rows.items():
        for number, part in enumerate(np.array_split(np.arange(len(content)), num_shards[split])):
            images = [{"bytes": content[row][0], "path": f"{split}_{row:08d}.JPEG"} for row in part]
            labels = [content[row][1] for row in part]
            table = pa.table({column: pa.array(images, kind), "label": pa.array(labels, pa.int64())})
            buffer = io.BytesIO()
            pq.write_table(table.replace_schema_metadata(metadata), buffer, row_group_size=ROW_GROUP)
            shards[f"{folder}/{split}-{number:05d}-of-{num_shards[split]:05d}.parquet"] = buffer.getvalue()
    hub.add_repo("dataset", repo_id, {"README.md": card(column, classes, rows, folder, config), **shards}, gated=gated)
    return Content(rows, shards)


def add_cifar10(hub) -> Content:
    rows = {
        split: [(picture(first + row, "PNG", size=(32, 32)), row * 7 % 10) for row in range(count)]
        for split, first, count in (("train", 0, 60), ("test", 1000, 20))
    }
    return add_set(
        hub, CIFAR10, rows, {"train": 1, "test": 1},
        column="img", classes=CIFAR10_CLASSES, folder="plain_text", config="plain_text",
    )  # fmt: skip


def add_imagenet(hub, padding=0) -> Content:
    """Classes of 8 to 17 training images, shuffled over four shards; a few files are what the real set has a few of."""
    unusual = [dict(mode="L"), dict(mode="CMYK"), dict(kind="PNG")]
    counts = [8 + number for number in range(10)]
    labels = {
        "test": [-1] * 7,
        "train": np.random.RandomState(0).permutation(np.repeat(np.arange(10), counts)).tolist(),
        "validation": [row * 3 % 10 for row in range(23)],
    }
    rows = {}
    for first, (split, numbers) in enumerate(labels.items()):
        kinds = unusual * 3 + [{}] * len(numbers)
        rows[split] = [
            (picture(2000 + 1000 * first + row, padding=padding, **kinds[row]), label)
            for row, label in enumerate(numbers)
        ]
    num_shards = {"test": 2, "train": 4, "validation": 2}
    return add_set(hub, IMAGENET, rows, num_shards, column="image", classes=IMAGENET_CLASSES, gated=True)


def new_hub() -> HubServer:
    return HubServer(tokens={READER: "reader", STRANGER: "stranger"})


def give_access(hub) -> None:
    hub.repos["dataset", IMAGENET].readers.add("reader")


@pytest.fixture(scope="module")
def named():
    """The Hub with both sets: (server, cifar10, imagenet)."""
    with new_hub() as hub:
        sets = add_cifar10(hub), add_imagenet(hub)
        give_access(hub)
        yield hub, *sets


# --- the clients ---


def start(hub, home, *command, token=READER) -> subprocess.CompletedProcess:
    """Python in a process of its own, with this Hub and with the project on its path."""
    env = {**hub.env(token, home=home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


LOAD = """
import datasets, hashlib, json, sys
import numpy as np
from vit_hf.data.rows.table import TableRows
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule

def read(split):
    rows = TableRows(split) if isinstance(split, datasets.Dataset) else split
    images, labels = rows.read(np.arange(len(rows)))
    return [[hashlib.sha256(image["bytes"]).hexdigest(), label] for image, label in zip(images, labels.tolist())]

name, fraction, streaming = json.loads(sys.argv[1])
splits = load_image_splits(name, subset=SubsetRule(fraction=fraction), streaming=streaming)
names = ("class_names", "train_split", "eval_split", "subset", "notes")
found = {name: getattr(splits, name) for name in names} | {"train": read(splits.train), "eval": read(splits.eval)}
if not streaming:
    found["columns"] = {name: str(kind) for name, kind in splits.train.features.items()}
print(json.dumps(found))
"""


def load(hub, home, name, fraction=None, streaming=False) -> dict:
    """What `load_image_splits` finds; rows are [sha256 of the encoded image, label]."""
    done = start(hub, home, "-c", LOAD, json.dumps([name, fraction, streaming]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pretrain(hub, home, *, token=READER, **flags) -> subprocess.CompletedProcess:
    flags = {**DEMO_DEFAULTS, "max_eval_samples": None, **flags}
    flags = {name: value for name, value in flags.items() if value is not None}
    return start(hub, home, ROOT / "run_pretrain.py", *words(flags), token=token)


def as_loaded(rows) -> list:
    return [[hashlib.sha256(data).hexdigest(), label] for data, label in rows]


def copies(home, content: Content) -> list[str]:
    """The files below a folder that hold encoded images of a set."""
    pieces = [data[len(data) // 2 :][:24] for rows in content.rows.values() for data, _ in rows]
    files = [path for path in home.rglob("*") if path.is_file()]
    return [path.name for path in files if any(piece in path.read_bytes() for piece in pieces)]


def shard_reads(requests) -> list[tuple[str, int, int]]:
    """(path, first byte, last byte) of each part of a shard that was sent; a whole shard counts as a failure."""
    reads = []
    for request in requests:
        path = re.search(r"/resolve/\w+/(.+\.parquet)", request.path)
        if path is not None and request.method == "GET":
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
            assert span is not None and request.status == 206, f"not a part: {request}"
            reads.append((path[1], int(span[1]), int(span[2])))
    return reads


def assert_refused(result) -> None:
    """One line for the user, and nothing of the machinery."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert "--dataset_name imagenet-1k: gated" in errors[0] and "hf auth login" in errors[0]
    assert f"https://huggingface.co/datasets/{IMAGENET}" in errors[0]
    assert READER not in result.stderr and STRANGER not in result.stderr


# --- cifar10 ---


def test_cifar10_is_loaded_by_its_short_name(named, tmp_path):
    hub, cifar10, _ = named
    found = load(hub, tmp_path, "cifar10")
    assert found["class_names"] == CIFAR10_CLASSES and list(found["columns"]) == ["image", "label"]
    assert "decode=False" in found["columns"]["image"] and "ClassLabel" in found["columns"]["label"]
    assert (found["train_split"], found["eval_split"]) == ("train", "test") and found["notes"] == []
    assert found["train"] == as_loaded(cifar10.rows["train"]) and len(found["train"]) == 60
    assert found["eval"] == as_loaded(cifar10.rows["test"]) and len(found["eval"]) == 20
    assert copies(tmp_path, cifar10) != []  # a stored set is; a streamed one must not be


def test_cifar10_streams(named, tmp_path):
    """One shard a split; the images are those of the stored set, and nothing of them stays on the disk."""
    hub, cifar10, _ = named
    hub.requests.clear()
    found = load(hub, tmp_path, "cifar10", streaming=True)
    assert found["class_names"] == CIFAR10_CLASSES and (found["train_split"], found["eval_split"]) == ("train", "test")
    assert found["train"] == as_loaded(cifar10.rows["train"]) and found["eval"] == as_loaded(cifar10.rows["test"])
    assert {path for path, _, _ in shard_reads(hub.requests)} == set(cifar10.shards)
    assert copies(tmp_path, cifar10) == []


def test_cifar10_trains(named, tmp_path):
    hub, _, _ = named
    folder = tmp_path / "run"
    result = pretrain(hub, tmp_path / "home", output_dir=folder, dataset_name="cifar10", max_steps=2)
    assert result.returncode == 0, result.stderr
    results = json.loads((folder / "all_results.json").read_text())
    assert (results["step"], results["train_samples"], results["eval_samples"]) == (2, 60, 20)
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == CIFAR10_CLASSES
    assert CIFAR10 in (folder / "README.md").read_text()


# --- imagenet-1k ---


def test_two_thirds_of_imagenet_are_stratified_and_the_same_everywhere(named, tmp_path):
    """Each class keeps two thirds up to one image, chosen alike by processes that share nothing; evaluation takes all
    of validation, because the test split has no labels."""
    hub, _, imagenet = named
    found, again = (load(hub, tmp_path / home, "imagenet-1k", FRACTION) for home in ("one", "other"))
    assert found["class_names"] == IMAGENET_CLASSES and list(found["columns"]) == ["image", "label"]
    assert (found["train_split"], found["eval_split"]) == ("train", "validation")
    assert found["notes"] == ["The test split has no labels, so it is not the evaluation split."]
    assert found["eval"] == as_loaded(imagenet.rows["validation"]) and len(found["eval"]) == 23

    every = as_loaded(imagenet.rows["train"])
    kept = [row for row in every if row in found["train"]]
    assert found["train"] == kept and len(kept) == round(FRACTION * len(every)) == 83
    before, after = (Counter(label for _, label in rows) for rows in (every, kept))
    assert all(abs(after[label] - FRACTION * before[label]) < 1 for label in range(10)), (before, after)
    assert found["subset"]["train_samples"] == 83 and found["subset"]["rule"] == {"fraction": FRACTION, "seed": 0}
    positions = np.array([every.index(row) for row in kept])
    assert found["subset"]["subset_hash"] == hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()
    assert again == found
    assert copies(tmp_path / "one", imagenet) != []


@pytest.mark.parametrize(("token", "streaming"), [(None, "false"), (STRANGER, "true")])
def test_imagenet_without_access_is_one_line(named, tmp_path, token, streaming):
    flags = dict(output_dir=tmp_path / "run", dataset_name="imagenet-1k", streaming=streaming)
    assert_refused(pretrain(named[0], tmp_path / "home", token=token, **flags))
    assert not (tmp_path / "run").exists()


def test_two_thirds_of_imagenet_stream(named, tmp_path):
    """The share is met up to chance, and which rows are kept is known from their numbers: the same everywhere."""
    hub, _, imagenet = named
    hub.requests.clear()
    found = load(hub, tmp_path, "imagenet-1k", FRACTION, streaming=True)
    assert found["class_names"] == IMAGENET_CLASSES and found["eval_split"] == "validation"
    assert found["eval"] == as_loaded(imagenet.rows["validation"])
    every = as_loaded(imagenet.rows["train"])
    kept = [row for row in every if row in found["train"]]
    assert found["train"] == kept and 0.55 < len(kept) / len(every) < 0.78
    positions = np.array([every.index(row) for row in kept])
    assert found["subset"]["subset_hash"] == hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()
    assert found["subset"]["train_samples"] == len(kept)
    read = {path for path, _, _ in shard_reads(hub.requests)}
    assert {path for path in imagenet.shards if "/test-" not in path} <= read
    assert copies(tmp_path, imagenet) == []


def test_a_stream_reads_the_parts_that_it_needs(tmp_path):
    """Shards of 25 MB: opening them takes their ends; a row group takes itself, and a shard that is read in order is sent
    once."""
    with new_hub() as hub:
        imagenet = add_imagenet(hub, padding=800_000)
        give_access(hub)
        code = f"""
import numpy as np
from vit_hf.data.sets.load import load_image_splits
rows = load_image_splits("imagenet-1k", streaming=True).train
shard = rows.group_file[np.searchsorted(rows.groups(), np.arange(len(rows)), side="right") - 1]
rows.read(np.arange({ROW_GROUP}))
second = np.flatnonzero(shard == 1)
print(sum(len(image["bytes"]) for start in range(0, len(second), 4) for image in rows.read(second[start : start + 4])[0]))
"""
        done = start(hub, tmp_path, "-c", code)
        assert done.returncode == 0, done.stderr
        sent = Counter()
        for path, first, last in shard_reads(hub.requests):
            sent[path] += last + 1 - first
    size = {path: len(data) for path, data in imagenet.shards.items()}
    one, two, *others = sorted(path for path in size if "/train-" in path)
    assert 0.95 * size[two] < int(done.stdout) < size[two]
    assert sent[one] < 0.3 * size[one] and sent[two] < 1.01 * size[two], (sent, size)
    assert all(0 < sent[path] < 200_000 for path in others), (sent, size)
    assert copies(tmp_path, imagenet) == []


@pytest.fixture(scope="module")
def streamed(named, tmp_path_factory):
    """A run that streams imagenet-1k: (folder, home, what it asked the Hub for)."""
    hub, _, _ = named
    path = tmp_path_factory.mktemp("streamed")
    hub.requests.clear()
    result = pretrain(
        hub, path / "home", output_dir=path / "run", dataset_name="imagenet-1k", streaming="true", max_steps=3,
        subset_fraction=FRACTION, random_crop="scale=0.3", dataloader_num_workers=1, per_device_eval_batch_size=5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return path / "run", path / "home", list(hub.requests)


def test_imagenet_trains_from_a_stream(named, streamed):
    _, _, imagenet = named
    folder, home, requests = streamed
    results = json.loads((folder / "all_results.json").read_text())
    assert (results["step"], results["eval_samples"]) == (3, 23) and 60 < results["train_samples"] < 98
    resolved = yaml.safe_load((folder / "run_config.yaml").read_text())["resolved"]
    assert resolved["dataset_revision"] == named[0].repos["dataset", "ILSVRC/imagenet-1k"].branches["main"]
    assert resolved["eval_split"] == "validation" and resolved["subset"]["train_samples"] == results["train_samples"]
    assert resolved["subset_hash"] and resolved["subset_hash"] in (folder / "README.md").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if np.isfinite(line.get("loss", np.nan))]) == 3
    read = {path for path, _, _ in shard_reads(requests)}
    assert {path for path in imagenet.shards if "/validation-" in path} <= read
    assert any("/train-" in path for path in read)
    assert copies(home, imagenet) == [] and copies(folder, imagenet) == []
    kept = [json.loads(path.read_text()) for path in home.rglob("vit_hf_pixels/*.json")]
    assert [entry["split"] for entry in kept] == ["validation"]  # decoded once; not the training split


def test_a_stream_evaluates_as_the_stored_set_does(named, streamed, tmp_path):
    """By `vit-hf evaluate`: both agree with what the run itself found, and count each image once. The second model has
    the class names that most ImageNet models come with, two of them "crane", and is compared by index."""
    hub, _, imagenet = named
    folder, _, _ = streamed
    trained = json.loads((folder / "all_results.json").read_text())
    cranes = tmp_path / "cranes"
    shutil.copytree(folder, cranes, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = (folder / "config.json").read_text()
    assert "crane2" in config
    (cranes / "config.json").write_text(config.replace("crane2", "crane"))
    for model, streaming in ((folder, "true"), (cranes, "false")):
        home, output = tmp_path / f"home_{streaming}", tmp_path / streaming
        flags = dict(dataset_name="imagenet-1k", streaming=streaming, per_device_eval_batch_size=5, output_dir=output)
        result = start(hub, home, "-m", "vit_hf.cli", "evaluate", model, *words(flags))
        assert result.returncode == 0, result.stderr
        found = json.loads((output / "eval_results.json").read_text())
        assert found["eval_split"] == "validation" and found["eval_samples"] == trained["eval_samples"] == 23
        assert found["eval_accuracy"] == trained["eval_accuracy"]
        assert found["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
        assert ("compared by index" in result.stdout) == (model == cranes)
        assert (copies(home, imagenet) == []) == (streaming == "true")


# --- copies and tar shards on the Hub ---

SUBSET = """
import json, sys
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule

name, streaming, rules = json.loads(sys.argv[1])
for rule in rules:
    found = load_image_splits(name, subset=SubsetRule(**rule), streaming=streaming)
    print(json.dumps([found.class_names, found.subset, len(found.train), len(found.eval)]))
"""


def test_a_subset_of_a_streamed_copy_is_that_of_the_set_and_takes_small_reads(tmp_path):
    """The copy on the Hub keeps the large images; labels, numbers and digests alone are sent."""
    with new_hub() as hub:
        add_imagenet(hub, padding=100_000)
        give_access(hub)
        code = f"""
from pathlib import Path
from vit_hf.data.copy.prepare import prepare
from vit_hf.data.sets.load import load_image_splits
splits = load_image_splits("imagenet-1k")
prepare(splits, Path({str(tmp_path / "copy")!r}), source={{"dataset_name": "imagenet-1k"}}, rows_per_shard=50, num_processes=1)
"""
        done = start(hub, tmp_path, "-c", code)
        assert done.returncode == 0, done.stderr
        files = {str(path.relative_to(tmp_path / "copy")): path.read_bytes() for path in tmp_path.glob("copy/**/*.*")}
        hub.add_repo("dataset", "reader/copy", files)
        rules = [{"fraction": FRACTION}, {"per_class": 4}, {"classes": [IMAGENET_CLASSES[3], "7"]}]
        original = start(hub, tmp_path, "-c", SUBSET, json.dumps(["imagenet-1k", False, rules]))
        hub.requests.clear()
        streamed = start(hub, tmp_path / "other", "-c", SUBSET, json.dumps(["reader/copy", True, rules]))
        sent = sum(last + 1 - first for path, first, last in shard_reads(hub.requests))
    assert original.returncode == streamed.returncode == 0, original.stderr + streamed.stderr
    assert original.stdout == streamed.stdout and len(original.stdout.splitlines()) == 3
    size = sum(len(data) for path, data in files.items() if path.endswith(".parquet"))
    assert 0 < sent / len(rules) < 0.05 * size, (sent, size)  # most of it the ends of the shards


def test_tar_shards_on_the_hub_load_with_their_class_names(tmp_path):
    from tests.test_tars import tar_set

    rules, home = [{"classes": ["owl", "cat"]}], tmp_path / "home"
    with new_hub() as hub:
        tar_set(tmp_path / "set")
        files = {path.name: path.read_bytes() for path in tmp_path.glob("set/*")}
        hub.add_repo("dataset", "reader/tars", files)
        del files["classes.txt"]
        hub.add_repo("dataset", "reader/plain", files)
        done = start(hub, home, "-c", SUBSET, json.dumps(["reader/tars", False, rules]))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0] == ["cat", "owl"] and json.loads(done.stdout)[2:] == [16, 4]
        code = "import os, sys\nos.environ['HF_HUB_OFFLINE'] = sys.argv[2]\n" + SUBSET
        asked = json.dumps(["reader/plain", False, [{"per_class": 2}]])
        for offline in "01":  # the second time it is known that there are no names
            done = start(hub, home, "-c", code, asked, offline)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)[0] == ["0", "1", "2"]
        for marker in home.rglob(".no_exist"):
            shutil.rmtree(marker)
        done = start(hub, home, "-c", code, asked, "1")
    assert "--dataset_name reader/plain: the Hub cannot be reached for classes.txt" in done.stderr
