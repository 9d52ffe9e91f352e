"""A model that was fine-tuned, pushed, and pulled by a process with an empty cache gives the same answers whichever way it
is asked; and the sets of ImageNet are read from a Hub as they lie there. One process for each, with the real clients."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest

from tests.hub.hub_server import HubServer
from tests.runs import DEMO_DEFAULTS, in_process, python
from tests.test_benchmarks import WNIDS, judged, model_names, one_in_four_wrong, restricted  # noqa: F401
from vit_hf.data.sets.benchmarks import BENCHMARKS
from vit_hf.evaluation.predictions import read_predictions

pytestmark = pytest.mark.slow
TOKEN = "hf_token_of_the_agreement"
REPO = "tester/digits-vit"

ASK = f"""
import json
import datasets, numpy as np, transformers
from vit_hf.cli import dispatch
from vit_hf.data.sets.load import load_image_splits
from vit_hf.evaluation.adapter import ImageClassification

dispatch(["evaluate", "{REPO}", "--dataset_name", "digits", "--save_predictions", "--output_dir", "evaluated"])
dispatch(["predict", "{REPO}", "digits", "--output_file", "predicted.jsonl"])
images = load_image_splits("digits", need_train=False).eval.cast_column("image", datasets.Image())
pipe = transformers.pipeline("image-classification", model="{REPO}")
answers = [pipe(image) for image in images["image"]]
found = []

class Recorded(ImageClassification):
    def predictions_processor(self, predictions, label_mapping):
        result = super().predictions_processor(predictions, label_mapping)
        found.extend(result["predictions"])
        return result

measured = Recorded().compute(model_or_pipeline=pipe, data=images, metric="accuracy")
measured["again"] = ImageClassification().compute("{REPO}", images.select(range(20)), metric="accuracy")["accuracy"]
json.dump({{"pipeline": answers, "evaluator": found, "measured": measured}}, open("asked.json", "w"))
"""


@pytest.fixture
def hub():
    with HubServer(tokens={TOKEN: "tester"}) as server:
        yield server


def test_four_ways_to_ask_a_pulled_model_agree_to_the_sample(hub, tmp_path):
    tiny = {**DEMO_DEFAULTS, "max_steps": 40, "learning_rate": 3e-3, "logging_steps": 20}
    in_process("pretrain", **tiny, output_dir=tmp_path / "parent")
    tiny |= {"preset": None, "config_overrides": None, "max_steps": 20, "max_eval_samples": None}
    tiny = {name: value for name, value in tiny.items() if value is not None}
    in_process("finetune", **tiny, model_name_or_path=tmp_path / "parent", output_dir=tmp_path / "digits-vit")
    push = (
        f"from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo('{REPO}')\n"
        f"api.upload_folder(repo_id='{REPO}', folder_path='digits-vit', ignore_patterns='checkpoint-*')"
    )
    pushed = python("-c", push, env=hub.env(token=TOKEN, home=tmp_path / "home"), cwd=tmp_path)
    assert pushed.returncode == 0, pushed.stderr
    assert {"config.json", "model.safetensors"} <= set(hub.files("model", REPO))

    empty = hub.env(token=TOKEN, home=tmp_path / "another home")
    (tmp_path / "elsewhere").mkdir()
    done = python("-c", ASK, env=empty, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    asked = json.loads((tmp_path / "elsewhere/asked.json").read_text())
    evaluated = read_predictions(tmp_path / "elsewhere/evaluated/predictions.parquet")
    results = json.loads((tmp_path / "elsewhere/evaluated/eval_results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "elsewhere/predicted.jsonl").read_text().splitlines()]
    trained = json.loads((tmp_path / "digits-vit/all_results.json").read_text())

    names = np.array(evaluated.class_names)
    best = evaluated.top5[:, 0]
    assert len(best) == 450 and len(set(best.tolist())) > 5  # not one class for all
    assert [row["row"] for row in rows] == evaluated.index.tolist()
    assert [row["label"] for row in rows] == names[evaluated.labels].tolist()
    assert [row["classes"] for row in rows] == names[evaluated.top5].tolist()
    assert [[one["label"] for one in answer] for answer in asked["pipeline"]] == names[evaluated.top5].tolist()
    assert asked["evaluator"] == best.tolist()
    scores = [[one["score"] for one in answer] for answer in asked["pipeline"]]
    np.testing.assert_allclose(evaluated.probabilities, scores, atol=2e-6)
    np.testing.assert_allclose(evaluated.probabilities, [row["probabilities"] for row in rows], atol=1e-6)
    accuracy = (best == evaluated.labels).mean()
    assert accuracy == results["eval_accuracy"] == trained["eval_accuracy"] == asked["measured"]["accuracy"]
    assert asked["measured"]["again"] == (best == evaluated.labels)[:20].mean()
    assert hub.leaks(TOKEN) == []


# --- the sets of ImageNet ---


def parquet(images: list[bytes], columns: dict, features: dict, paths: list[str] | None = None) -> bytes:
    paths = paths or [f"{number}.png" for number in range(len(images))]
    content = [{"bytes": image, "path": path} for image, path in zip(images, paths)]
    features = datasets.Features({"image": datasets.Image(decode=False), **features})
    table = datasets.Dataset.from_dict({"image": content, **columns}, features=features)
    buffer = io.BytesIO()
    table.cast_column("image", datasets.Image()).to_parquet(buffer)
    return buffer.getvalue()


def shard(images: list[bytes], labels: list[int]) -> bytes:
    """A tar as CLIP benchmark's: an image and the number of its class."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, (image, label) in enumerate(zip(images, labels)):
            for suffix, content in (("png", image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def card(split: str, path: str) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {path}\n---\n".encode()
    )


def add_sets(hub, pictures, logits) -> list[list[int]]:
    """Puts the five sets on the Hub, each with one answer in four wrong; returns the labels of ReaL."""
    best = logits.argmax(1)
    labels = one_in_four_wrong(best, list(range(1000)))
    doubled = "\n".join(["sunglasses", *model_names()[1:999], "sunglasses"]).encode()  # as CLIP's list has it
    for name in ("imagenet-v2", "imagenet-sketch"):
        files = {"test/0.tar": shard(pictures[:25], labels[:25]), "test/1.tar": shard(pictures[25:], labels[25:])}
        files |= {"classnames.txt": doubled, "test/nshards.txt": b"2", "README.md": card("test", "test/*.tar")}
        hub.add_repo("dataset", BENCHMARKS[name].hub_id, files)

    chosen = one_in_four_wrong(*restricted(logits, "a"))
    part = [wnid for wnid in WNIDS if WNIDS.index(wnid) in restricted(logits, "a")[1]]
    features = {"label": datasets.ClassLabel(names=part)}
    table = parquet(pictures, {"label": [part.index(WNIDS[one]) for one in chosen]}, features)
    files = {"data/train-00000-of-00001.parquet": table, "README.md": card("train", "data/train-*")}
    hub.add_repo("dataset", BENCHMARKS["imagenet-a"].hub_id, files)

    wnids = [WNIDS[one] for one in one_in_four_wrong(*restricted(logits, "r"))]
    features = {"wnid": datasets.Value("string"), "class_name": datasets.Value("string")}
    table = parquet(pictures, {"wnid": wnids, "class_name": ["any"] * len(wnids)}, features)
    files = {"data/test-00000-of-00001.parquet": table, "README.md": card("test", "data/test-*")}
    hub.add_repo("dataset", BENCHMARKS["imagenet-r"].hub_id, files)

    names = [f"ILSVRC2012_val_{number + 1:08d}_{WNIDS[one]}.JPEG" for number, one in enumerate(labels)]
    features = {"label": datasets.ClassLabel(names=model_names())}
    table = parquet(pictures, {"label": labels}, features, names)
    files = {"data/validation-00000-of-00001.parquet": table, "README.md": card("validation", "data/validation-*")}
    hub.add_repo("dataset", BENCHMARKS["imagenet-real"].hub_id, files)
    return [[] if number < 4 else [one, (one + 1) % 1000] for number, one in enumerate(labels)]


def test_the_sets_of_imagenet_are_read_as_they_lie_on_a_hub(hub, judged, tmp_path):  # noqa: F811
    model, pictures, logits = judged
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.add_repo("model", "tester/judged", files)
    (tmp_path / "real.json").write_text(json.dumps(add_sets(hub, pictures, logits)))
    done = python(
        "-m", "vit_hf.cli", "evaluate", "tester/judged", "--eval_datasets", ",".join(BENCHMARKS), "--output_dir", "out",
        "--dataloader_num_workers", "0", env=hub.env(token=TOKEN, home=tmp_path / "home"), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sets = {one["dataset_name"]: one for one in json.loads((tmp_path / "out/eval_results.json").read_text())["sets"]}
    assert list(sets) == list(BENCHMARKS)
    for name, found in sets.items():
        benchmark = BENCHMARKS[name]
        assert found["hub_id"] == benchmark.hub_id and found["eval_split"] == benchmark.split
        assert found["revision"] == list(hub.repos["dataset", benchmark.hub_id].commits)[-1], name
        if name != "imagenet-real":
            assert (found["eval_samples"], found["eval_accuracy"]) == (40, 0.75), name
    wrong = sum(number % 4 == 0 for number in range(4, 40))
    real = sets["imagenet-real"]
    assert real["eval_samples"] == 36 and real["eval_accuracy"] == pytest.approx(1 - wrong / 36)
