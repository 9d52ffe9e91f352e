import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.runs import DEMO_DEFAULTS, in_process, python
from vit_hf.cli import dispatch
from vit_hf.commands.given import match_classes
from vit_hf.errors import ArgumentError, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "first"
    in_process("pretrain", output_dir=folder, **DEMO_DEFAULTS)
    return folder


def test_evaluate_repeats_the_runs_own_evaluation(trained, capsys):
    dispatch(
        [
            "evaluate",
            str(trained),
            "--dataset_name",
            "digits",
            "--max_eval_samples",
            "101",
            "--per_device_eval_batch_size",
            "7",
        ]
    )
    results = json.loads((trained / "eval_results.json").read_text())
    own = json.loads((trained / "all_results.json").read_text())
    assert results["eval_accuracy"] == own["eval_accuracy"] and results["eval_samples"] == own["eval_samples"] == 101
    assert results["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-5)
    assert f"{results['eval_accuracy']:.4f}" in capsys.readouterr().out


def test_classes_are_matched_by_name():
    assert match_classes(["ship", "cat"], ["cat", "dog", "ship"]) == [2, 0]
    assert match_classes(["a", "b"], ["LABEL_0", "LABEL_1"]) is None
    assert match_classes(["crane", "cat", "crane"], ["crane", "cat", "crane"]) == [0, 1, 2]  # a name may repeat
    assert match_classes(["crane", "cat", "other crane"], ["crane", "cat", "crane"]) is None
    with pytest.raises(UserError, match="the model has 3 classes .* the dataset 2 others"):
        match_classes(["a", "b"], ["cat", "dog", "ship"])


def test_a_model_of_some_classes_is_evaluated_on_their_images(tmp_path, capsys):
    folder = tmp_path / "run"
    in_process("pretrain", **{**DEMO_DEFAULTS, "subset_classes": "3,5", "max_eval_samples": 1000}, output_dir=folder)
    dispatch(["evaluate", str(folder), "--dataset_name", "digits"])
    results, own = (json.loads((folder / f"{name}_results.json").read_text()) for name in ("eval", "all"))
    assert results["eval_samples"] == own["eval_samples"] < 100 and results["eval_accuracy"] == own["eval_accuracy"]
    assert "knows 2 of the classes" in capsys.readouterr().out


def test_a_model_without_a_head_is_not_evaluated(trained, tmp_path):
    import transformers

    transformers.ViTModel.from_pretrained(trained).save_pretrained(tmp_path / "headless")
    with pytest.raises(
        UserError, match="it has no head .*run_finetune.py --model_name_or_path .*headless.*vit-hf probe"
    ):
        dispatch(["evaluate", str(tmp_path / "headless"), "--dataset_name", "digits"])


@pytest.mark.slow
def test_evaluate_on_foreign_classes_is_one_line(trained):
    result = python("-m", "vit_hf.cli", "evaluate", trained, "--dataset_name", "glyphs")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")][0].startswith(
        "error: the model has 10 classes"
    )


def test_report_of_a_finished_run(trained, capsys):
    """With a run's other files in the folder the table knows its model too; what is on disk stands beside the run."""
    dispatch(["report", str(trained)])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    assert row[:3] == ["first", "vit-demo-patch8-32", "0.02 M"] and row[3:5] == ["6", "192"] and "101 images" in row[5]
    assert "-" not in row
    assert (trained.parent / "report/learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_command():
    with pytest.raises(ArgumentError, match="unknown command 'evalute', did you mean 'evaluate'"):
        dispatch(["evalute"])
    with pytest.raises(ArgumentError, match="--dataset_name is missing"):
        dispatch(["evaluate", "folder"])


def test_tensorboard_gets_the_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("pretrain", max_steps=3, report_to="tensorboard")
    events = min(
        folder.rglob("events.out.tfevents*"), key=lambda path: len(path.parts)
    )  # the deeper one holds the flags
    log = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3]


def test_dry_run_writes_nothing(run, tmp_path, capsys):
    run("pretrain", dry_run="true", per_device_train_batch_size=8)
    said = capsys.readouterr().out
    assert "1 processes x 8 images x 4 accumulation steps" in said and not (tmp_path / "run").exists()


def test_models_shows_a_preset_and_what_becomes_of_an_image(capsys):
    dispatch(["models", "vit-base-patch16-224", "--config_overrides", "num_hidden_layers=1,pooling=map"])
    shown = capsys.readouterr().out
    assert re.search(r"^vit-base-patch16-224 +\d+\.\d M +196 +\d+\.\d+ +\d+\.\d\d GiB +\d+\.\d MiB$", shown, re.M)
    table = shown.split("part ")[1].splitlines()
    shapes = {line.split()[0]: line.split(maxsplit=1)[1] for line in table if " x " in line and "GFLOPs" not in line}
    assert shapes["pixel_values"] == "1 x 3 x 224 x 224" and shapes["vit.embeddings"] == "1 x 196 x 768"
    assert shapes["vit.attention_pool"] == "1 x 768" and shapes["classifier"] == "1 x 1000"


@pytest.mark.parametrize(
    "words, message",
    [
        (["vit-base"], "model vit-base: no such preset; did you mean .*vit-base-patch16-224"),
        (["vit-base-patch16-224", "--config_overrides", "stem=swin"], "stem: 'swin' is not one of patch, hybrid_resnet, conv"),
        (["--config_overrides", "pooling=mean"], "--config_overrides goes with the NAME of a preset"),
        (["--size"], "unrecognized arguments: --size"),
    ],
)  # fmt: skip
def test_models_refuses_in_one_line(words, message):
    with pytest.raises(ArgumentError, match=message):
        dispatch(["models", *words])


def test_convert_to_timm_and_back_changes_nothing(trained, tmp_path, capsys):
    """Weights to the bit, class names, and the pixels that the processor makes; the way back is the same stock folder."""
    dispatch(["convert", str(trained), str(tmp_path / "timm"), "--to", "timm"])
    assert json.loads((tmp_path / "timm/config.json").read_text())["architecture"].startswith("vit_")
    dispatch(["convert", str(tmp_path / "timm"), str(tmp_path / "back")])
    assert "stock vit" in capsys.readouterr().out
    one, two = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for name in ("config.json", "preprocessor_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (trained, tmp_path / "back"))
        ignored = ("initializer_range", "transformers_version")
        differ = [key for key in before if before[key] != after.get(key) and key not in ignored]
        assert differ == [], (name, differ)


def test_convert_keeps_the_resize_and_the_crop(trained, tmp_path):
    """What the source says of its images, to timm and back."""
    from vit_hf.data.preprocessing import Preprocessing, own_preprocessing

    how = Preprocessing((32, 32), 35, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), resample=3)
    shutil.copytree(trained, tmp_path / "source", ignore=shutil.ignore_patterns("checkpoint-*"))
    how.image_processor().save_pretrained(tmp_path / "source")
    dispatch(["convert", str(tmp_path / "source"), str(tmp_path / "timm"), "--to", "timm"])
    pretrained = json.loads((tmp_path / "timm/config.json").read_text())["pretrained_cfg"]
    assert pretrained["interpolation"] == "bicubic" and pretrained["crop_mode"] == "center"
    assert int(32 / pretrained["crop_pct"]) == 35
    for source in ("timm", "timm/model.safetensors"):
        dispatch(["convert", str(tmp_path / source), str(tmp_path / source.replace("/", "_") / "back")])
        assert own_preprocessing(str(tmp_path / source.replace("/", "_") / "back"), None, (1, 1)) == how


def test_convert_refuses_a_broken_file_in_one_line(trained, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_bytes((trained / "config.json").read_bytes())
    (tmp_path / "broken/model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-500])
    with pytest.raises(UserError, match="broken: .*incomplete metadata"):
        dispatch(["convert", str(tmp_path / "broken"), str(tmp_path / "x"), "--to", "timm"])


def test_convert_refuses_in_one_line(trained, tmp_path):
    for words, error, message in (
        ([tmp_path / "none", tmp_path / "x"], UserError, "none: no such file or folder"),
        ([trained, trained], UserError, "holds a model already"),
        ([trained, tmp_path / "x", "--to", "jax"], ArgumentError, "--to: 'jax' is not one of vit_hf, timm"),
        ([trained], ArgumentError, "required: DIR"),
    ):
        with pytest.raises(error, match=message):
            dispatch(["convert", *map(str, words)])


# --- data ---


def test_data_show_draws_originals_and_what_becomes_of_them(tmp_path, capsys):
    sheet = tmp_path / "sheets/sheet.png"
    recipe = ["--config", "recipes/demo/pretrain_glyphs.yaml", "--dataset_name", "digits"]
    words = ["--randaugment", "num_ops=2,magnitude=9", "--mixup_alpha", "0.5", "--output_file", str(sheet)]
    dispatch(["data", "show", *recipe, *words])
    assert str(sheet) in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.width > 600 and picture.height > 600 and len(set(picture.convert("L").tobytes())) > 50


def test_what_data_show_draws_is_what_training_sees():
    """The augmented pictures are those of the training batches of the same samples and epochs."""
    from vit_hf.arguments import RandomCrop, pick
    from vit_hf.commands.data import ShowArguments, show_augmentation
    from vit_hf.data.augment.pipeline import Augment
    from vit_hf.data.augment.policies import trivial_augment
    from vit_hf.data.order import epoch_order
    from vit_hf.data.sets.load import SetSettings, load_set

    args = ShowArguments(
        dataset_name="digits",
        trivial_augment=True,
        random_crop=RandomCrop("padding", 4),
        seed=3,
        image_mean=(0.3,) * 3,
    )
    splits = load_set(pick(SetSettings, args))
    originals, augmented, labels, targets = show_augmentation(args, splits, 32)
    index = epoch_order(3, 0, len(splits.train))[:8]
    assert labels == splits.train[index]["label"]
    assert (targets.argmax(2) == [[label] * 5 for label in labels]).all()
    augment = Augment(
        seed=3, num_classes=10, mean=[0.3] * 3, std=[0.5] * 3, device=torch.device("cpu"), crop=RandomCrop("padding", 4),
        policies=[trivial_augment],
    )  # fmt: skip
    batch = {"pixel_values": torch.from_numpy(originals).permute(0, 3, 1, 2), "labels": torch.tensor(labels)}
    seen, _ = augment({**batch, "visit": torch.full((8,), 2), "index": torch.from_numpy(index)}, 0, 0, 0)
    assert (((seen * 0.5 + 0.3) * 255).round().permute(0, 2, 3, 1) == torch.from_numpy(augmented[:, 2])).all()


SHOWN = {
    "simple crop of images that are decoded each time": ["--random_crop", "simple", "--image_size", "24x16"],
    "simple crop of a decoded set": ["--random_crop", "simple"],
    "TensorFlow's boxes": ["--random_crop", "scale=0.05,rule=tensorflow"],
    "timm's augmentation": (
        "--randaugment magnitude_std=0.5,increasing=true --random_erasing 1 --random_erasing_mode const "
        "--mixup_alpha 0.8 --cutmix_alpha 1 --mixup_prob 0.9 --mixup_switch_prob 0.3 --mixup_off_epoch 2"
    ).split(),
    "normal noise": ["--random_erasing", "1", "--random_erasing_mode", "pixel"],
}


@pytest.mark.parametrize("case", SHOWN)
def test_data_show_takes_what_training_takes(case):
    """The pictures are uint8 of the model's size, change from epoch to epoch, and come out the same again; from the
    epoch on that ends the mixing each has one label."""
    from vit_hf.arguments import parse, pick
    from vit_hf.commands.data import ShowArguments, show_augmentation
    from vit_hf.data.sets.load import SetSettings, load_set

    words = ["--dataset_name", "digits", "--image_mean", "0.2,0.4,0.8", *SHOWN[case]]
    args = parse(ShowArguments, words, prog="show")
    size = args.image_size or 32
    splits = load_set(pick(SetSettings, args))
    _, augmented, labels, targets = show_augmentation(args, splits, size)
    assert augmented.shape == (8, 5, *(size if isinstance(size, tuple) else [size] * 2), 3)
    assert not np.array_equal(augmented[:, 0], augmented[:, 1])
    assert np.array_equal(show_augmentation(args, splits, size)[1], augmented)
    if args.mixup_off_epoch:
        assert (targets[:, :2].max(2) < 1).any() and (targets[:, 2:].max(2) == 1).all()
        covered = (augmented[:, 2:] == (51, 102, 204)).all(4)  # the mean colour
        assert covered.any((2, 3)).all()


def test_data_prepare_writes_a_set_that_trains(tmp_path, capsys):
    flags = ["--dataset_name", "digits", "--output_dir", str(tmp_path / "copy"), "--subset_per_class", "10"]
    dispatch(["data", "prepare", *flags, "--num_proc", "1"])
    said = capsys.readouterr().out
    assert "train: 100 images in 1 shards" in said and f"--dataset_name {tmp_path / 'copy'}" in said
    for streaming in ("false", "true"):
        run = {**DEMO_DEFAULTS, "dataset_name": tmp_path / "copy", "output_dir": tmp_path / streaming, "max_steps": 2}
        in_process("pretrain", streaming=streaming, **run)
        results = json.loads((tmp_path / streaming / "all_results.json").read_text())
        assert results["train_samples"] == 100 and results["eval_samples"] == 101
    dispatch(["data", "prepare", *flags])
    assert "finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "shwo"], "unknown command 'data shwo', did you mean 'show'"),
        (["data", "prepare", "--output_dir", "x"], "--dataset_name is missing"),
        (["data", "prepare", "--dataset_name", "digits"], "--output_dir is missing"),
        (["data", "prepare", "--shorter_side", "0"], "--shorter_side: 0 is out of range"),
        (["data", "show", "--dataset_name", "digits", "--randaugment", "9"], "--randaugment: '9' is not none or e.g."),
        (["data", "show", "--dataset_name", "digits", "--preset", "vit-hge"], "vit-hge"),
        (["evaluate", "x", "--dataset_name", "digits", "--dataloader_num_workers", "many"], "'many' is not auto or a"),
    ],
)
def test_wrong_words_to_the_data_commands(words, said):
    with pytest.raises(ArgumentError) as caught:
        dispatch(words)
    assert said in str(caught.value)
