"""What is done to an evaluation image: chosen by the model, the flags or the images, and the same on every path."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.runs import in_process
from vit_hf.arguments import RandomCrop, RunArguments, check
from vit_hf.cli import dispatch
from vit_hf.data.preprocessing import (
    Preprocessing,
    PreprocessingSettings,
    choose_preprocessing,
    mostly_larger,
    own_preprocessing,
)
from vit_hf.errors import ArgumentError
from vit_hf.models.configuration_vit import ViTConfig
from vit_hf.models.modeling_vit import ViTForImageClassification

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CLASSES = ["a", "b"]


def picture(width: int, height: int) -> Image.Image:
    levels = np.random.RandomState(width * height).randint(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


def write_set(folder, *sizes):
    """A folder of images (width, height): two classes, train and test."""
    for split in ("train", "test"):
        for number, size in enumerate(sizes):
            place = folder / split / CLASSES[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture(*size).save(place / f"{number:03d}.png")
    return folder


def write_model(folder, preprocessing: Preprocessing):
    config = ViTConfig(
        image_size=list(preprocessing.image_size), patch_size=6, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    preprocessing.image_processor().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def evaluated_pixels(monkeypatch):
    """Collects what an evaluation makes of its images: {index: pixel_values (3, H, W)}."""
    import vit_hf.evaluation.evaluate as module

    seen, predict = {}, module.predict

    def watched(model, batches, normalise, *others, **options):
        def taken():
            for batch in batches:
                values = normalise(batch["pixel_values"])
                seen.update(zip(batch["index"].tolist(), values.clone()))
                yield batch

        return predict(model, taken(), normalise, *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "predict", watched)
        yield seen


SIZES = [(61, 47), (33, 80), (47, 61), (100, 33), (30, 30), (17, 90)]
OWN = {
    "bicubic, crop_pct 0.9": Preprocessing((30, 30), 33, MEAN, STD, BICUBIC),
    "both sides, then the centre": Preprocessing((30, 30), None, MEAN, STD, BICUBIC, resized=(37, 34)),
}


@pytest.mark.parametrize("name", OWN)
def test_all_four_paths_make_the_pixels_of_the_models_processor(tmp_path, monkeypatch, capsys, name):
    """Training's evaluation, `vit-hf evaluate`, `vit-hf figures` and transformers' pipeline, on odd sizes."""
    import vit_hf.analysis.gallery

    data, model = write_set(tmp_path / "set", *SIZES), write_model(tmp_path / "model", OWN[name])
    processor = ViTImageProcessorPil.from_pretrained(model)
    files = sorted((data / "test").rglob("*.png"))
    expected = [processor(Image.open(file), return_tensors="pt")["pixel_values"][0].float() for file in files]
    exact = ViTImageProcessorPil.from_pretrained(model, do_rescale=False, do_normalize=False)
    levels = [exact(Image.open(file), return_tensors="pt")["pixel_values"][0].numpy() for file in files]

    with evaluated_pixels(monkeypatch) as training:
        in_process(
            "finetune", model_name_or_path=model, dataset_name=data, output_dir=tmp_path / "run", max_steps=1,
            global_batch_size=4, warmup_steps=0,
        )  # fmt: skip
    resolved = yaml.safe_load((tmp_path / "run/run_config.yaml").read_text())["resolved"]
    assert resolved["interpolation"] == "bicubic" and f"preprocessing: {OWN[name]}" in capsys.readouterr().out
    assert own_preprocessing(str(tmp_path / "run"), None, (1, 1)) == OWN[name]
    for folder in (model, tmp_path / "run"):
        with evaluated_pixels(monkeypatch) as evaluated:
            dispatch(["evaluate", str(folder), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")])
        for found in (training, evaluated):
            assert len(found) == len(expected)
            for index, pixels in enumerate(expected):
                torch.testing.assert_close(found[index], pixels, rtol=0, atol=1e-6)
        pipe = pipeline("image-classification", str(folder))
        for file, pixels in zip(files, expected):
            torch.testing.assert_close(pipe.preprocess(str(file))["pixel_values"][0], pixels, rtol=0, atol=1e-6)

        drawn = []
        monkeypatch.setattr(
            vit_hf.analysis.gallery,
            "model_figures",
            lambda model, images, *rest, drawn=drawn: (drawn.append(images), [])[1],
        )
        words = ["figures", str(folder), "--output_dir", str(tmp_path / f"drawn_{folder.name}"), "--images"]
        dispatch([*words, *map(str, files)])
        assert all(
            np.array_equal(image.transpose(2, 0, 1), level) for image, level in zip(drawn[0], levels, strict=True)
        )


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_folder_of_larger_images_is_cut_at_the_centre_and_one_of_small_images_is_not(tmp_path, streaming):
    """From scratch, whatever the set's name; stored and streamed."""
    flags = dict(
        preset="vit-demo-patch8-32", config_overrides="hidden_size=16,num_hidden_layers=1,num_attention_heads=1",
        max_steps=1, global_batch_size=2, warmup_steps=0,
    )  # fmt: skip
    for kind, sizes in {"photographs": [(61, 47), (40, 80)] * 3, "icons": [(32, 32)] * 4}.items():
        folder = write_set(tmp_path / kind, *sizes)
        if streaming == "true":
            copy = tmp_path / f"{kind}_copy"
            dispatch(["data", "prepare", "--dataset_name", str(folder), "--output_dir", str(copy), "--num_proc", "1"])
            folder = copy
        output = tmp_path / f"run_{kind}"
        in_process("pretrain", dataset_name=folder, streaming=streaming, output_dir=output, **flags)
        written = json.loads((output / "preprocessor_config.json").read_text())
        resolved = yaml.safe_load((output / "run_config.yaml").read_text())["resolved"]
        if kind == "photographs":
            assert written["do_center_crop"] and written["size"] == {"shortest_edge": 36}
            assert (resolved["eval_resize"], resolved["resized_to"]) == ("shortest", 36)
        else:
            assert not written["do_center_crop"] and written["size"] == {"height": 32, "width": 32}
            assert (resolved["eval_resize"], resolved["resized_to"]) == ("square", [32, 32])


@pytest.mark.parametrize(
    "sizes, image_size, larger",
    [
        ([(500, 375)] * 3, (224, 224), True),
        ([(224, 299), (224, 224), (240, 224)], (224, 224), True),  # a copy whose shorter side is the input's
        ([(224, 224)] * 3, (224, 224), False),
        ([(32, 32)] * 3, (224, 224), False),
        ([(100, 500)] * 3, (224, 224), False),  # cut, they would have to be enlarged
        ([(300, 300), (200, 300)], (224, 224), False),  # half of them
        ([(300, 300)] * 3, (128, 384), False),
        ([], (224, 224), False),
    ],
)
def test_what_larger_means(sizes, image_size, larger):
    assert mostly_larger(sizes, image_size) == larger


DEIT = Preprocessing((224, 224), 248, MEAN, STD, BICUBIC)
SQUASHED = Preprocessing((224, 224), None, MEAN, STD)
CUT = Preprocessing((224, 224), None, MEAN, STD, BICUBIC, resized=(256, 256))
PLAIN = Preprocessing((224, 224))


@pytest.mark.parametrize(
    "own, size, flags, expected",
    [
        (DEIT, 224, {}, DEIT),
        (DEIT, 448, {}, Preprocessing((448, 448), 496, MEAN, STD, BICUBIC)),
        (DEIT, 224, {"interpolation": "bilinear"}, dataclasses.replace(DEIT, resample=BILINEAR)),
        (DEIT, 224, {"interpolation": "random"}, dataclasses.replace(DEIT, random_interpolation=True)),
        (DEIT, 224, {"eval_resize": "square"}, dataclasses.replace(DEIT, shortest_edge=None)),
        (DEIT, 224, {"eval_resize": "shortest"}, DEIT),
        (DEIT, 224, {"crop_pct": 1.0}, dataclasses.replace(DEIT, shortest_edge=224)),
        (DEIT, 224, {"image_mean": [0.1] * 3}, dataclasses.replace(DEIT, image_mean=(0.1,) * 3)),
        (SQUASHED, 224, {"eval_resize": "shortest"}, dataclasses.replace(SQUASHED, shortest_edge=256)),
        (SQUASHED, 224, {"crop_pct": 0.9}, dataclasses.replace(SQUASHED, shortest_edge=248)),
        (CUT, 224, {"eval_resize": "square"}, CUT),
        (CUT, 224, {"crop_pct": 0.9, "eval_resize": "square"}, dataclasses.replace(CUT, resized=(248, 248))),
        (CUT, 224, {"crop_pct": 0.9}, dataclasses.replace(CUT, resized=None, shortest_edge=248)),
        (None, 224, {"eval_resize": "square"}, PLAIN),
        (None, 224, {"crop_pct": 0.95}, Preprocessing((224, 224), 235)),
        (None, 224, {}, Preprocessing((224, 224), 256)),
        (None, 384, {}, Preprocessing((384, 384), 438)),
        (None, 600, {}, Preprocessing((600, 600))),
    ],
)
def test_model_flags_and_images_decide_in_this_order(own, size, flags, expected):
    def sizes():
        assert own is None and not {"crop_pct", "eval_resize"} & set(flags), "the images were read for nothing"
        return [(500, 400)] * 5

    assert choose_preprocessing((size, size), own, sizes, PreprocessingSettings(**flags)) == expected


TIMM = {"input_size": [3, 30, 30], "mean": list(MEAN), "std": list(STD)}
FROM_TIMM = {
    "center": (
        {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
        Preprocessing((30, 30), 33, MEAN, STD, BICUBIC),
    ),
    "default": ({}, Preprocessing((30, 30), 34, MEAN, STD, BICUBIC)),
    "squash": (
        {"interpolation": "lanczos", "crop_pct": 1.0, "crop_mode": "squash"},
        Preprocessing((30, 30), None, MEAN, STD, Image.Resampling.LANCZOS),
    ),
    "squash, then cut": (
        {"crop_pct": 0.9, "crop_mode": "squash"}, Preprocessing((30, 30), None, MEAN, STD, BICUBIC, (33, 33)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_TIMM)
def test_timms_config_is_read_where_there_is_no_processor(tmp_path, name):
    fields, expected = FROM_TIMM[name]
    content = {"architecture": "vit_tiny_patch6_30", "pretrained_cfg": {**TIMM, **fields}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert own_preprocessing(str(tmp_path), None, (99, 99)) == expected
    assert Preprocessing.from_timm({**TIMM, **expected.to_timm()}, (99, 99)) == expected  # and is written


@pytest.mark.parametrize("side", [*range(16, 520, 7), 224, 384])
def test_what_timm_is_told_gives_the_same_shorter_side(side):
    """timm rounds the side over crop_pct down."""
    for edge in range(side, side + side // 2 + 2):
        written = Preprocessing((side, side), edge).to_timm()
        assert int(side / written["crop_pct"]) == edge


@pytest.mark.parametrize(
    "fields", [{"crop_mode": "border"}, {"interpolation": "cubist"}, {"crop_pct": 1.5}, {"crop_pct": "most"}]
)
def test_steps_of_timm_that_are_others_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Preprocessing.from_timm({**TIMM, **fields}, (30, 30))


def test_random_interpolation_is_for_resized_crops():
    flags = dict(preset="x", max_steps=1, dataset_name="digits", output_dir="x", interpolation="random")
    check(RunArguments(**flags, random_crop=RandomCrop("scale", 0.3)))
    with pytest.raises(ArgumentError, match="--interpolation: random .*--random_crop padding=4"):
        check(RunArguments(**flags, random_crop=RandomCrop("padding", 4)))


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "JSON"),
        ('{"resample": 9}', "resample 9"),
        ('{"image_mean": [0.5, 0.5, 0.5, 0.5]}', "allowed are three numbers"),
        ('{"image_std": [0.5, 0.0, 0.5]}', "three numbers above 0"),
    ],
)
def test_a_processor_that_cannot_be_used_is_an_error_and_no_default(tmp_path, content, said):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=said):
        own_preprocessing(str(tmp_path), None, (32, 32))
    (tmp_path / "preprocessor_config.json").unlink()
    assert own_preprocessing(str(tmp_path), None, (32, 32)) is None
