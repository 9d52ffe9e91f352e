"""The sets that models of ImageNet are judged on: which class each label is, through `vit-hf evaluate` and the real
clients' formats, on sets of the same schema whose answers are known by construction."""

import io
import json
import os

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vit_hf.cli import dispatch
from vit_hf.commands.evaluate_sets import write_results
from vit_hf.commands.given import match_classes
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.sets.benchmarks import BENCHMARKS, eval_sets, imagenet_wnids, label_map
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation.mirrored import Mirrored
from vit_hf.models.configuration_vit import ViTConfig
from vit_hf.models.modeling_vit import ViTForImageClassification

WNIDS = imagenet_wnids()
SIDE = 8


# --- the lists ---


def test_the_lists_of_wordnet_ids_are_those_that_are_published():
    assert len(set(WNIDS)) == 1000 and WNIDS == sorted(WNIDS)
    assert (WNIDS[0], WNIDS[281], WNIDS[-1]) == ("n01440764", "n02123045", "n15075141")  # tench, tabby, toilet tissue
    for part, first, last in (("a", [6, 11, 13, 15], [984, 986, 987, 988]), ("r", [1, 2, 4, 6], [980, 981, 983, 988])):
        numbers = [WNIDS.index(wnid) for wnid in imagenet_wnids(part)]
        assert len(numbers) == 200 and numbers[:4] == first and numbers[-4:] == last


def model_names(order=range(1000)) -> list[str]:
    return [f"class {number}" for number in order]


def test_folders_of_numbers_are_listed_as_texts_and_mapped_as_numbers():
    names = sorted(map(str, range(1000)))
    assert names[:3] == ["0", "1", "10"]
    found, among = label_map(names, model_names(), BENCHMARKS["imagenet-v2"])
    assert found == [int(name) for name in names] and among is None


def test_a_plain_folder_of_numbered_classes_is_not_compared_by_its_order():
    names = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...
    assert match_classes(names, model_names(range(12))) == [int(name) for name in names]
    assert match_classes(names, list(map(str, range(12)))) == [int(name) for name in names]


def test_classes_by_wordnet_id_and_the_part_that_a_model_chooses_among():
    names = imagenet_wnids("r")[::-1]
    found, among = label_map(names, model_names(), BENCHMARKS["imagenet-r"])
    assert found == [WNIDS.index(name) for name in names] and among.tolist() == sorted(found)
    numbered, _ = label_map(["0", "1", "199"], model_names(), BENCHMARKS["imagenet-r"])  # numbers of the 200
    assert numbered == [1, 2, 988]


def test_a_model_that_names_its_classes_by_wordnet_id_has_any_order():
    known = WNIDS[::-1]
    found, among = label_map(["n01440764", "n15075141"], known, BENCHMARKS["imagenet-sketch"])
    assert found == [999, 0] and among is None
    small = [*imagenet_wnids("a"), "n99999999"]  # trained on the classes of ImageNet-A alone
    found, among = label_map(imagenet_wnids("a")[:3], small, BENCHMARKS["imagenet-a"])
    assert found == [0, 1, 2] and among.tolist() == list(range(200))


def test_names_in_another_order_than_the_models_are_matched():
    names = model_names(range(999, -1, -1))
    assert label_map(names, model_names(), BENCHMARKS["imagenet-sketch"])[0] == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("names", "known", "said"),
    [
        (["0", "1"], ["cat", "dog"], "has 2 classes .* for models of ImageNet's 1000"),
        (["cat", "dog"], model_names(), "the set names its 2 classes cat, dog"),
        (["n01440764"], model_names(), "the set names its 1 classes n01440764"),  # a class that ImageNet-A has not
        (["200"], model_names(), "numbers below 200"),
    ],
)
def test_labels_that_cannot_be_matched_are_told_in_a_line(names, known, said):
    with pytest.raises(UserError, match=said):
        label_map(names, known, BENCHMARKS["imagenet-a"])


# --- the names of --eval_datasets ---


def test_names_of_sets():
    v2, copy, plain, one_k = eval_sets(("imagenet-v2", "imagenet-a=/data/a", "digits", "imagenet-1k"))
    assert v2.dataset_name == BENCHMARKS["imagenet-v2"].hub_id and not v2.is_copy
    assert (copy.name, copy.dataset_name, copy.is_copy) == ("imagenet-a", "/data/a", True)
    assert plain.benchmark is None and one_k.benchmark is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("imagenet-v3",), "did you mean 'imagenet-v2'"),
        (("imagenet_sketch",), "did you mean 'imagenet-sketch'"),
        (("digits=here",), "'digits' is none of imagenet-v2"),
        (("digits", "digits"), "digits comes twice"),
    ],
)
def test_wrong_names_of_sets(names, said):
    with pytest.raises(ArgumentError, match=said):
        eval_sets(names)


@pytest.mark.parametrize("flags", [[], ["--dataset_name", "digits", "--eval_datasets", "digits"]])
def test_one_of_the_two_flags_is_needed(flags):
    with pytest.raises(ArgumentError, match="--dataset_name"):
        dispatch(["evaluate", "nowhere", *flags])


# --- sets of the same schema, whose labels are made of what the model answers ---


def picture(number: int) -> bytes:
    """Noise in blocks, so that the model below answers otherwise to each."""
    pixels = np.random.RandomState(number).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_model(folder):
    """A model of 1000 classes in ImageNet's order with random weights, large enough to tell noise apart."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE, patch_size=SIDE, hidden_size=48, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=1000, initializer_range=0.5,
    )  # fmt: skip
    config.id2label = dict(enumerate(model_names()))
    config.label2id = {name: number for number, name in enumerate(model_names())}
    network = ViTForImageClassification(config).eval()
    network.save_pretrained(folder)
    Preprocessing((SIDE, SIDE)).image_processor().save_pretrained(folder)
    return network


def answers(folder, pictures: list[bytes]) -> np.ndarray:
    """The logits (N, 1000) that transformers' own classes give."""
    # not AutoImageProcessor: transformers 5.17 has none without torchvision
    processor = transformers.pipeline("image-classification", str(folder)).image_processor
    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = [Image.open(io.BytesIO(content)) for content in pictures]
    with torch.no_grad():
        return network(**processor(images, return_tensors="pt")).logits.numpy()


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(folder of a model, 40 pictures, its logits for them)."""
    folder = tmp_path_factory.mktemp("judged") / "model"
    make_model(folder)
    pictures = [picture(number) for number in range(40)]
    logits = answers(folder, pictures)
    assert len(set(logits.argmax(1))) > 20
    return folder, pictures, logits


def one_in_four_wrong(best: np.ndarray, possible: list[int]) -> list[int]:
    """Labels of which three in four are the given answers, and the others are other classes."""
    wrong = [possible[(possible.index(one) + 1) % len(possible)] for one in best.tolist()]
    return [other if place % 4 == 0 else one for place, (one, other) in enumerate(zip(best.tolist(), wrong))]


def restricted(logits: np.ndarray, part: str) -> tuple[np.ndarray, list[int]]:
    possible = [WNIDS.index(wnid) for wnid in imagenet_wnids(part)]
    return np.array(possible)[logits[:, possible].argmax(1)], possible


def image_folder(folder, pictures, names):
    for number, (content, name) in enumerate(zip(pictures, names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number:03d}.png").write_bytes(content)
    return folder


def results_of(folder) -> dict:
    return json.loads((folder / "eval_results.json").read_text())


def test_copies_in_folders_are_evaluated_with_the_labels_of_the_benchmarks(judged, tmp_path, capsys):
    """Numbers in text order, and WordNet ids with the choice among 200; both sets in one call, as a list and as a table."""
    model, pictures, logits = judged
    labels = one_in_four_wrong(logits.argmax(1), list(range(1000)))
    v2 = image_folder(tmp_path / "v2", pictures, map(str, labels))
    best, possible = restricted(logits, "a")
    assert (best != logits.argmax(1)).any()  # the restriction changes answers
    a = image_folder(tmp_path / "a", pictures, [WNIDS[one] for one in one_in_four_wrong(best, possible)])
    out = tmp_path / "out"
    dispatch(
        ["evaluate", str(model), "--eval_datasets", f"imagenet-v2={v2},imagenet-a={a}", "--output_dir", str(out),
         "--save_predictions", "--dataloader_num_workers", "0"]
    )  # fmt: skip
    results = results_of(out)
    first, second = results["sets"]
    assert results["eval_accuracy"] == first["eval_accuracy"] == second["eval_accuracy"] == 0.75
    assert [one["dataset_name"] for one in results["sets"]] == ["imagenet-v2", "imagenet-a"]
    assert (first["eval_samples"], second["classes"], second["eval_split"]) == (40, 200, "train")
    chosen = logits[:, possible]
    likelihoods = chosen - np.log(np.exp(chosen - chosen.max(1, keepdims=True)).sum(1, keepdims=True)) - chosen.max(1, keepdims=True)  # fmt: skip
    names = sorted(path.name for path in a.iterdir())
    truth = sorted(  # the folder's order: by class, then by file
        (names.index(WNIDS[label]), number, possible.index(label))
        for number, label in enumerate(one_in_four_wrong(best, possible))
    )
    expected = -np.mean([likelihoods[number, column] for _, number, column in truth])
    assert second["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert (out / "imagenet-a" / "predictions.parquet").is_file()
    table = capsys.readouterr().out.split("samples\n")[1]
    assert [line.split()[:2] for line in table.splitlines()[:2]] == [
        ["imagenet-v2", "0.7500"],
        ["imagenet-a", "0.7500"],
    ]


def test_real_labels_are_any_of_several_and_images_without_one_are_left_out(judged, tmp_path, monkeypatch):
    model, pictures, logits = judged
    best = logits.argmax(1).tolist()
    real = [[one, (one + 5) % 1000] for one in best]  # right, with a label beside it
    real[0], real[1] = [(best[0] + 1) % 1000], [(best[1] + 1) % 1000, (best[1] + 2) % 1000]  # wrong
    real[2] = real[3] = []
    (tmp_path / "real.json").write_text(json.dumps(real))
    images = tmp_path / "images"
    for wnid in WNIDS[:2]:
        (images / wnid).mkdir(parents=True)
    for number, content in enumerate(pictures):
        name = f"ILSVRC2012_val_{number + 1:08d}.png"
        (images / WNIDS[number % 2] / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    flags = ["--output_dir", "out", "--dataloader_num_workers", "0"]
    dispatch(["evaluate", str(model), "--eval_datasets", f"imagenet-real={images}", *flags])
    results = results_of(tmp_path / "out")
    assert results["eval_samples"] == 38 and results["eval_accuracy"] == pytest.approx(36 / 38)

    (tmp_path / "real.json").write_text("{}")
    with pytest.raises(UserError, match="real.json: holds something else"):
        dispatch(["evaluate", str(model), "--eval_datasets", f"imagenet-real={images}", *flags])


def test_what_was_evaluated_before_stays_in_the_list_until_the_weights_change(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")

    def result(name, accuracy, samples=10):
        return {
            "dataset_name": name,
            "eval_split": "test",
            "tta": "none",
            "model": str(tmp_path),
            "eval_accuracy": accuracy,
        }

    write_results([result("one", 0.1)], tmp_path)
    write_results([result("two", 0.2), result("one", 0.3)], tmp_path)
    found = results_of(tmp_path)
    assert found["eval_accuracy"] == 0.2  # the first of this call
    assert [(one["dataset_name"], one["eval_accuracy"]) for one in found["sets"]] == [("two", 0.2), ("one", 0.3)]
    write_results([result("three", 0.4)], tmp_path)
    assert [one["dataset_name"] for one in results_of(tmp_path)["sets"]] == ["two", "one", "three"]
    later = (tmp_path / "eval_results.json").stat().st_mtime_ns + 1_000_000_000
    os.utime(tmp_path / "model.safetensors", ns=(later, later))
    write_results([result("four", 0.5)], tmp_path)
    assert [one["dataset_name"] for one in results_of(tmp_path)["sets"]] == ["four"]


# --- the mirror image ---


def test_two_passes_do_not_replace_what_one_gave(tmp_path):
    """The top of the file is the model's accuracy; the mirrored one stands beside it."""
    plain = {"dataset_name": "one", "eval_split": "test", "tta": "none", "model": "m", "eval_accuracy": 0.9}
    flipped, other = (
        plain | {"tta": "flip", "eval_accuracy": 0.8},
        plain | {"dataset_name": "two", "eval_accuracy": 0.7},
    )
    write_results([flipped], tmp_path)  # nothing else is known
    assert (results_of(tmp_path)["eval_accuracy"], results_of(tmp_path)["tta"]) == (0.8, "flip")
    for given, top in ((plain, 0.9), (flipped, 0.9), (other, 0.7), (flipped, 0.7)):
        write_results([given], tmp_path)
        found = results_of(tmp_path)
        assert (found["eval_accuracy"], found["tta"]) == (top, "none")
    assert sorted((one["eval_accuracy"], one["tta"]) for one in found["sets"]) == [
        (0.7, "none"),
        (0.8, "flip"),
        (0.9, "none"),
    ]


def test_the_mean_with_the_mirror_image_is_that_of_two_passes(tmp_path):
    network = make_model(tmp_path / "model")
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Mirrored(network)(pixel_values=pixels).logits
        two = [network(pixel_values=images).logits for images in (pixels, pixels.flip(-1))]
        assert not torch.equal(*two)
        torch.testing.assert_close(found, (two[0] + two[1]) / 2)
        even = (pixels + pixels.flip(-1)) / 2
        assert torch.equal(Mirrored(network)(pixel_values=even).logits, network(pixel_values=even).logits)
