"""Tar shards of image and class (the layout of webdataset): loaded, named, copied, trained on."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.runs import evaluation, trajectory
from vit_hf.data.copy.prepare import prepare
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule
from vit_hf.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def picture(number: int, kind: str) -> bytes:
    """An image that no other number gives."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (number % 256, 3 * number % 256, 90)).save(buffer, kind)
    return buffer.getvalue()


def tar(path: Path, numbers: range, extension: str = "jpg", classes: int = 3) -> None:
    """A shard: 000001.jpg, 000001.cls, 000002.jpg, ...; the class is the remainder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            files = {extension: picture(number, kind), "cls": f"{number % classes}\n".encode()}
            for name, data in files.items():
                member = tarfile.TarInfo(f"{number:06d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def tar_set(
    folder: Path, evaluation_split: str = "validation", names: str | None = "cat\ndog\nowl\n", **options
) -> str:
    """24 training images in two shards and 6 to evaluate on."""
    tar(folder / "train-0000.tar", range(12), **options)
    tar(folder / "train-0001.tar", range(12, 24), **options)
    tar(folder / f"{evaluation_split}-0000.tar", range(24, 30), **options)
    if names is not None:
        (folder / "classes.txt").write_text(names)
    return str(folder)


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "webp"])
def test_tar_shards_load_with_the_names_beside_them(tmp_path, extension):
    loaded = load_image_splits(tar_set(tmp_path / "set", extension=extension))
    assert (loaded.class_names, loaded.train_split, loaded.eval_split) == (
        ["cat", "dog", "owl"],
        "train",
        "validation",
    )
    kind = {"jpg": "JPEG"}.get(extension, extension.upper())
    assert [row["image"]["bytes"] for row in loaded.train] == [picture(number, kind) for number in range(24)]
    assert loaded.train["label"][:] == [number % 3 for number in range(24)]
    assert loaded.eval["label"][:] == [0, 1, 2] * 2 and loaded.notes == []


def test_without_names_the_classes_are_their_numbers(tmp_path):
    loaded = load_image_splits(tar_set(tmp_path / "set", "test", names=None))
    assert (loaded.class_names, loaded.eval_split) == (["0", "1", "2"], "test")


def test_names_of_classes_that_no_sample_has_are_kept(tmp_path):
    folder = tar_set(tmp_path / "set", names=None)
    (tmp_path / "set/classnames.txt").write_text("cat\ndog\nowl\nbat\n")
    assert load_image_splits(folder).class_names == ["cat", "dog", "owl", "bat"]


@pytest.mark.parametrize(
    "names, said",
    [
        ("cat\ndog\n", "label 2 is outside 0..1 (8 such rows)"),
        ("cat\n\nowl\n", "line 2 of classes.txt is empty; one class a line"),
        ("cat\ndog\ncat\n", "line 3 of classes.txt names 'cat' again; one class a line"),
    ],
)
def test_names_that_do_not_fit_are_one_line(tmp_path, names, said):
    with pytest.raises(UserError) as error:
        load_image_splits(tar_set(tmp_path / "set", names=names))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tar_shards_do_not_stream_and_their_copy_does(tmp_path):
    folder, rule = tar_set(tmp_path / "set"), SubsetRule(per_class=3)
    with pytest.raises(
        UserError, match="--streaming: .* is stored as webdataset, .*; `vit-hf data prepare` writes it"
    ):
        load_image_splits(folder, streaming=True)
    splits = load_image_splits(folder)
    prepare(splits, tmp_path / "copy", source={"dataset_name": folder}, shorter_side=10, num_processes=1)
    chosen = load_image_splits(folder, subset=rule)
    streamed = load_image_splits(str(tmp_path / "copy"), streaming=True, subset=rule)
    assert streamed.subset == chosen.subset and streamed.class_names == ["cat", "dog", "owl"]
    images, labels = streamed.train.read(np.arange(9))
    assert sorted(image["path"] for image in images) == sorted(row["image"]["path"] for row in chosen.train)
    assert np.bincount(labels).tolist() == [3, 3, 3]
    assert len(load_image_splits(str(tmp_path / "copy"), streaming=True).train) == 24


@pytest.mark.slow
def test_a_run_on_tar_shards_with_balanced_classes_resumes_exactly(run, tmp_path):
    flags = dict(dataset_name=tar_set(tmp_path / "set"), class_balanced="true", random_flip=0.5, max_eval_samples=None)
    flags |= dict(max_steps=5, global_batch_size=10, save_steps=2)
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    assert (
        evaluation(whole)["eval_samples"] == 6 and (whole / "run_config.yaml").read_text().count("class_balanced") == 1
    )
    again = run(
        "pretrain", output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole/checkpoint-2", **flags
    )
    assert trajectory(again) == trajectory(whole)[2:] and len(trajectory(whole)) == 5
    plain = run("pretrain", output_dir=tmp_path / "plain", **{**flags, "class_balanced": "false"})
    assert trajectory(plain) != trajectory(whole)
