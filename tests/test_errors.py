"""Bad input: one line that names the value seen, the values allowed and the flag; the contract's exit status; no
traceback."""

import json
import re
import sys

import pytest
import yaml
from PIL import Image

from tests.runs import DEMO_DEFAULTS, in_process
from vit_hf.cli import dispatch
from vit_hf.errors import TOLD, UserError, exit_with, note_near


@pytest.fixture
def fails(tmp_path, capsys):
    """fails(status, pattern, script, **flags): a flag given as None is left out."""

    def check(status, pattern, script="pretrain", **flags):
        flags = {"output_dir": tmp_path / "run", **DEMO_DEFAULTS, **flags}
        flags = {name: value for name, value in flags.items() if value is not None}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            exit_with(lambda: in_process(script, **flags))
        said = capsys.readouterr().err
        said = re.sub(r"^W\d{4} .*\n", "", said, flags=re.M)  # torch's log: what will be an error in a later release
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        assert stopped.value.code == status, said
        assert len(errors) == 1 and errors[0].startswith("error: "), said
        assert re.search(pattern, errors[0]), errors[0]
        assert "Traceback" not in said

    return check


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [
        (r"unknown flag --learning_rat, did you mean 'learning_rate'", dict(learning_rat=1)),
        (r"--learning_rate: 'fast' is not a number", dict(learning_rate="fast")),
        (r"--learning_rate: -1.0 is out of range, allowed is 0 or more", dict(learning_rate=-1)),
        (r"--random_flip: 1.5 is out of range, allowed is from 0 to 1", dict(random_flip=1.5)),
        (r"--random_flip: 'nan' is not a number", dict(random_flip="nan")),
        (r"--max_steps: '2.5' is not a whole number", dict(max_steps="2.5")),
        (r"--optim: 'adam' is not one of adamw_torch, sgd", dict(optim="adam")),
        (r"--random_crop: 'padding=0' is not none, padding=PIXELS", dict(random_crop="padding=0")),
        (r"--random_crop: 'scale=2' is not", dict(random_crop="scale=2")),
        (r"--report_to: 'mlflow' is not one of tensorboard, wandb, trackio", dict(report_to="mlflow")),
        (r"one of --num_train_epochs and --max_steps: both", dict(num_train_epochs=1)),
        (r"one of --num_train_epochs and --max_steps: neither", dict(max_steps=None)),
        (r"one of --preset .* and --model_name_or_path .*neither", dict(preset=None)),
        (r"--dataset_name is missing", dict(dataset_name=None)),
        (r"only one of --subset_fraction and --subset_per_class", dict(subset_fraction=0.5, subset_per_class=2)),
        (r"--preset vit-base: no such preset; did you mean .*vit-base-patch16-224 or .*`vit-hf models`", dict(preset="vit-base")),
        (r"'pool' is no field of ViTConfig, nearest: pool", dict(config_overrides="pool=mean")),
        (r"--config_overrides: 'depth' is not NAME=VALUE", dict(config_overrides="depth")),
        (r"'hidden_size' expected int, got str", dict(config_overrides="hidden_size=abc")),
        (r"pooling: 'max' is not one of cls, mean", dict(config_overrides="pooling=max")),
        (r"image_size 30 is not divisible by patch_size 8", dict(image_size=30)),
        (r"--per_device_train_batch_size: 12 does not divide .* take one of 1, 2, 4", dict(per_device_train_batch_size=12)),
        (r"--warmup_steps: 9 is longer than the run of 6 steps", dict(warmup_steps=9)),
        (r"--image_std: '0' is not", dict(image_std="0")),
        (r"--image_std: 'nan' is not", dict(image_std="nan")),
        (r"--num_train_epochs: 'inf' is not a number", dict(num_train_epochs="inf", max_steps=None)),
        (r"--random_crop: a padding of 32 is not below the image's side of 32 pixels", dict(random_crop="padding=32")),
        (r"--seed: 99999999999 is out of range, allowed is from 0 to 4294967295", dict(seed=99999999999)),
        (r"--adam_beta1: 1.0 would never", dict(adam_beta1=1)),
        (r"num_channels is 1, .* allowed is 3", dict(config_overrides="num_channels=1")),
        (r"num_attention_heads: 0 is out of range", dict(config_overrides="num_attention_heads=0")),
        (r"patch_size: 0 is out of range", dict(config_overrides="patch_size=0")),
        (r"num_hidden_layers: 0 is out of range", dict(config_overrides="num_hidden_layers=0")),
        (r"hidden_act: 'foo' is not one of .*gelu", dict(config_overrides="hidden_act=foo")),
    ],
)  # fmt: skip
def test_wrong_flags_exit_with_2(fails, pattern, flags):
    fails(2, pattern, **flags)


def test_wrong_yaml_exits_with_2(fails, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weight_decy: 0.1\n")
    fails(2, r"recipe.yaml: unknown key 'weight_decy', did you mean 'weight_decay'", config=recipe)
    recipe.write_text("a: [1\n")
    fails(2, r"recipe.yaml is not YAML", config=recipe)
    recipe.write_text("learning_rate: true\n")
    fails(2, r"--learning_rate: True is not a number", config=recipe, learning_rate=None)
    fails(2, r"--config: .*nowhere.yaml cannot be read", config=tmp_path / "nowhere.yaml")


def test_a_flag_wins_over_the_file_and_over_the_files_alternative(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"num_train_epochs": 3, "warmup_ratio": 0.1, "model_name_or_path": "x", "seed": "7"})
    )
    from vit_hf.arguments import RunArguments, parse

    args = parse(
        RunArguments,
        ["--config", str(recipe), "--max_steps", "5", "--preset", "p", "--learning_rate", "1e-4"],
        prog="p",
    )
    assert (args.max_steps, args.num_train_epochs, args.warmup_ratio, args.seed) == (5, None, 0.1, 7)
    assert (args.preset, args.model_name_or_path, args.learning_rate) == ("p", None, 1e-4)


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [
        (r"dataset_name.*digitz.*digits", dict(dataset_name="digitz")),
        (r"--dataset_name ./nowhere: no such folder", dict(dataset_name="./nowhere")),
        (r"model tests/nowhere cannot be loaded: no such folder", dict(preset=None, config_overrides=None, model_name_or_path="tests/nowhere")),
        (r"--image_column_name.*pixels.*image", dict(image_column_name="pixels")),
        (r"--eval_split.*dev.*test", dict(eval_split="dev")),
        (r"--subset_classes.*eleven", dict(subset_classes="3,eleven")),
        (r"--subset_per_class", dict(subset_per_class=5000)),
        (r"--resume_from_checkpoint: /nowhere is no folder; allowed are auto, none,", dict(resume_from_checkpoint="/nowhere")),
        (r"model /nowhere cannot be loaded: no such folder", dict(preset=None, config_overrides=None, model_name_or_path="/nowhere")),
    ],
)  # fmt: skip
def test_what_only_the_data_or_the_disk_can_tell_exits_with_1(fails, pattern, flags):
    fails(1, pattern, **flags)


@pytest.fixture
def folder_with_a_bad_image(tmp_path):
    """An imagefolder of two classes with one file that does not decode."""
    for split, number in (("train", 8), ("test", 3)):
        for name, grey in (("dark", 30), ("light", 220)):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for index in range(number):
                Image.new("L", (12, 10), grey + index).save(tmp_path / "set" / split / name / f"{index}.png")
    (tmp_path / "set/train/dark/3.png").write_bytes(b"no image")
    return tmp_path / "set"


def test_an_image_that_does_not_decode(fails, folder_with_a_bad_image, tmp_path):
    flags = dict(dataset_name=folder_with_a_bad_image, global_batch_size=8, max_eval_samples=None, max_steps=4)
    fails(1, r"image in row 3 does not decode: file .*dark/3.png.*--on_bad_image skip", **flags)
    in_process("pretrain", **{**DEMO_DEFAULTS, **{k: v for k, v in flags.items() if v}, "max_eval_samples": 99},
               output_dir=tmp_path / "run", on_bad_image="skip")  # fmt: skip
    assert json.loads((tmp_path / "run/all_results.json").read_text())["bad_images"] == 1


def test_an_output_folder_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("")
    fails(1, r"--output_dir: .*file is a file; name a folder", output_dir=tmp_path / "file")


def test_files_of_something_else_are_not_overwritten(fails, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("my notes")
    fails(1, r"--output_dir: .*mine holds README.md of something else", output_dir=tmp_path / "mine")
    assert (tmp_path / "mine/README.md").read_text() == "my notes"


def test_a_tracker_that_is_not_installed(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(1, r"--report_to wandb: the package is not installed; pip install -e '.\[wandb\]'", report_to="wandb")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(fails, tmp_path):
    fails(1, r"the weights are not finite after the steps 1 to 1", learning_rate=1e30, max_grad_norm=0, warmup_steps=0)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_foreign_model_type_is_named(fails, tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    small = SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16, num_labels=3)
    SwinForImageClassification(small).save_pretrained(tmp_path / "swin")
    fails(
        1,
        r"model .*: its family \(model_type\) is swin; trained are vit, vit_hf, resnet",
        preset=None,
        config_overrides=None,
        model_name_or_path=tmp_path / "swin",
    )


def test_finetune_without_flags_names_the_command_that_makes_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: in_process("finetune"))
    assert stopped.value.code == 1 and "python run_pretrain.py" in capsys.readouterr().err


def test_no_more_memory_is_one_line(capsys):
    def entry():
        raise MemoryError("Unable to allocate 9 GiB")

    with pytest.raises(SystemExit) as end:
        exit_with(entry)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: this process found no more memory") and "9 GiB" in said


def test_ctrl_c_is_one_word_where_nobody_has_said_more(capsys):
    for stop, said in ((KeyboardInterrupt(), "interrupted"), (KeyboardInterrupt(TOLD), "")):

        def entry(stop=stop):
            raise stop

        with pytest.raises(SystemExit) as end:
            exit_with(entry)
        assert end.value.code == 130 and capsys.readouterr().err.strip() == said


@pytest.mark.parametrize(
    "words, said",
    [
        (["evaluate", "nowhere/x", "--eval_datasets", "digit,glyphs"], "digit is no set that is known here .* did you mean digits"),
        (["bench", "vit-demo-patch8"], "vit-demo-patch8 is no preset and no folder, .* did you mean vit-demo-patch8-32"),
        (["evaluate", "mnist", "--dataset_name", "digits"], None),
    ],
)  # fmt: skip
def test_a_name_that_looks_mistyped_is_told_before_the_hub_is_asked(words, said, tmp_path, monkeypatch, capsys):
    note_near.cache_clear()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        dispatch(words)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert not notes if said is None else len(notes) == 1 and re.search(said, notes[0])


def test_folders_that_are_no_models_name_those_below_and_a_preset_has_no_weights(tmp_path):
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    (tmp_path / "runs/logs").mkdir()
    for model, said in (
        (tmp_path / "runs", r"no config.json, so it is no model folder; below it are \S+first, \S+second$"),
        (tmp_path / "runs/logs", "no config.json, so it is no model folder$"),
        ("vit-demo-patch8-32", "it is a preset, which has no weights"),
    ):
        with pytest.raises(UserError, match=said):
            dispatch(["evaluate", str(model), "--dataset_name", "digits", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"no config.json, so it is no model folder; below it are"):
        dispatch(["space", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
