import dataclasses
import subprocess
import sys

import pytest

from tests.runs import ROOT
from vit_hf.arguments import (
    RandomCrop,
    RunArguments,
    check,
    check_augmentation,
    identity,
    parse,
    parse_channels,
    parse_image_size,
    parse_randaugment,
    parse_random_crop,
    read_config,
    saved_identity,
    without_paths,
    write_run_config,
)
from vit_hf.errors import ArgumentError


def test_no_words_at_all_run_the_demo_recipe_and_say_so(capsys):
    demo = ROOT / "recipes/demo/pretrain_glyphs.yaml"
    args = parse(RunArguments, [], prog="run_pretrain.py", default_config=demo)
    assert args.dataset_name == "glyphs" and args.output_dir == "runs/demo/pretrain_glyphs"
    assert f"running the demo recipe: --config {demo}" in capsys.readouterr().err
    assert parse(RunArguments, ["--seed", "1"], prog="run_pretrain.py", default_config=demo).dataset_name is None


def test_types_of_flags_and_yaml(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 1e-3\nmax_steps: 2e3\npush_to_hub: yes\nimage_mean: [0.1, 0.2, 0.3]\nimage_size:\n"
                      "config_overrides: {pooling: mean, drop_path_rate: 0.1}\nresolved: {anything: 1}\n")  # fmt: skip
    values = read_config(recipe, RunArguments)
    assert values["learning_rate"] == 1e-3 and values["max_steps"] == 2000 and values["push_to_hub"] is True
    assert values["image_mean"] == "0.1,0.2,0.3" and values["image_size"] is None
    assert values["config_overrides"] == "pooling=mean,drop_path_rate=0.1" and "resolved" not in values
    args = parse(
        RunArguments, ["--gradient_checkpointing", "--torch_compile", "false", "--max_steps", "none"], prog="p"
    )
    assert args.gradient_checkpointing is True and args.torch_compile is False and args.max_steps is None


def test_run_config_reads_back_as_it_was_written(tmp_path):
    args = parse(
        RunArguments, ["--learning_rate", "3e-5", "--subset_classes", "cat,ship", "--max_steps", "7"], prog="p"
    )
    write_run_config(args, {"total_steps": 7}, tmp_path / "run_config.yaml")
    again = parse(RunArguments, ["--config", str(tmp_path / "run_config.yaml")], prog="p")
    assert again == args and identity(again) == identity(args)


def test_identity_is_model_data_optimisation_and_seed():
    base = RunArguments(preset="a", dataset_name="b", output_dir="c", max_steps=1)

    def changed(**values):
        return identity(RunArguments(**{**vars(base), **values})) != identity(base)

    assert (
        changed(seed=1) and changed(learning_rate=1.0) and changed(dataset_name="x") and changed(global_batch_size=2)
    )
    assert not changed(output_dir="x") and not changed(per_device_train_batch_size=2) and not changed(logging_steps=3)
    assert (
        not changed(push_to_hub=True)
        and not changed(dataloader_num_workers=3)
        and not changed(resume_from_checkpoint="none")
    )
    assert not changed(shuffle_buffer_size=5)  # nothing is streamed: it is not used
    streamed = [RunArguments(**{**vars(base), "streaming": True, "shuffle_buffer_size": size}) for size in (5, 6)]
    assert identity(streamed[0]) != identity(streamed[1])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("none", RandomCrop()),
        ("padding=4", RandomCrop("padding", 4)),
        ("scale=0.08", RandomCrop("scale", 0.08, "torchvision")),
        ("scale=0.08,rule=torchvision", RandomCrop("scale", 0.08, "torchvision")),
        ("scale=0.05,rule=tensorflow", RandomCrop("scale", 0.05, "tensorflow")),
        ("simple", RandomCrop("simple", 4)),
    ],
)
def test_random_crop(text, parsed):
    assert parse_random_crop(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["padding", "padding=x", "padding=-1", "scale=0", "scale=1.1", "crop=3", "none=1", ""]
    + [
        "scale=0.1,rule=timm",
        "scale=0.1,0.2",
        "scale=0.1,",
        "padding=4,",
        "padding=4,rule=tensorflow",
        "simple=4",
        "rule=tensorflow",
    ],
)
def test_random_crop_refuses(text):
    with pytest.raises(ArgumentError, match="--random_crop"):
        parse_random_crop(text)


def test_image_size():
    assert parse_image_size("224") == 224 and parse_image_size("32x48") == [32, 48] and parse_image_size(None) is None
    for text in ("0", "big", "32x", "1x2x3", "-4", "3.5"):
        with pytest.raises(ArgumentError, match="--image_size"):
            parse_image_size(text)


def test_channels():
    assert parse_channels("image_mean", "0.5") == [0.5] * 3 and parse_channels("image_mean", None) is None
    for text in ("0.1,0.2", "a", ""):
        with pytest.raises(ArgumentError, match="--image_mean"):
            parse_channels("image_mean", text)


def test_positional_words_and_flags_without_a_value_are_refused():
    for words, said in (
        (["runs/x"], "unexpected word 'runs/x'"),
        (["--seed"], "--seed"),
        (["--seed", "--preset", "a"], "--seed"),
    ):
        with pytest.raises(ArgumentError, match=said):
            parse(RunArguments, words, prog="p")


@pytest.mark.parametrize(
    "flags", [{"ema_decay": 1.0}, {"adam_beta1": 1.0}, {"adam_beta2": 1.0}, {"subset_fraction": 0.0}]
)
def test_the_open_end_of_a_range_is_refused(flags):
    with pytest.raises(ArgumentError, match=f"--{next(iter(flags))}"):
        check(RunArguments(preset="a", dataset_name="b", output_dir="c", max_steps=1, **flags))


@pytest.mark.parametrize(
    ("word", "said"),
    [("--bf16", "accelerate launch --mixed_precision bf16"), ("--gradient_accumulation_steps", "--per_device_train_batch_size"),
     ("--hub_token", "hf auth login"), ("--zzz", "--help lists")],
)  # fmt: skip
def test_flags_of_other_scripts_are_told_their_place(word, said):
    with pytest.raises(ArgumentError, match=said):
        parse(RunArguments, [word, "8"], prog="p")


def test_local_paths_are_not_published(tmp_path):
    flags = {"dataset_name": str(tmp_path), "model_name_or_path": "google/vit", "output_dir": "/home/me/x", "seed": 1}
    assert without_paths(flags) == {
        "dataset_name": tmp_path.name,
        "model_name_or_path": "google/vit",
        "output_dir": "x",
        "seed": 1,
    }


def test_help_is_complete_and_wrong_flags_exit_with_2():
    shown = subprocess.run([sys.executable, "run_pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for name in RunArguments.__dataclass_fields__:
        assert f"--{name}" in shown.stdout
    wrong = subprocess.run([sys.executable, "run_finetune.py", "--sed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: unknown flag --sed, did you mean 'seed'?\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("none", None),
        ("num_ops=2,magnitude=9", {"num_ops": 2, "magnitude": 9.0, "ops": "torchvision"}),
        ("magnitude=10,ops=big_vision", {"num_ops": 2, "magnitude": 10.0, "ops": "big_vision"}),
        ("num_ops=1, magnitude=7.5", {"num_ops": 1, "magnitude": 7.5, "ops": "torchvision"}),
        (
            "num_ops=2,magnitude=9,magnitude_std=0.5,increasing=true",
            {"num_ops": 2, "magnitude": 9.0, "ops": "timm", "magnitude_std": 0.5},
        ),
        ("increasing=true", {"num_ops": 2, "magnitude": 9.0, "ops": "timm", "magnitude_std": 0.0}),
    ],
)
def test_randaugment_is_read(text, found):
    assert parse_randaugment(text) == found


@pytest.mark.parametrize(
    "text",
    ["9", "num_ops=0", "num_ops=9", "magnitude=31", "magnitude=-1", "magnitude=11,ops=big_vision", "ops=timm", "n=2", "num_ops=two", ""]
    + ["magnitude_std=0.5", "increasing=false", "increasing=true,magnitude=11", "increasing=true,magnitude_std=-1"]
    + ["increasing=true,ops=big_vision", "increasing=true,magnitude_std=nan"],
)  # fmt: skip
def test_randaugment_out_of_range_is_refused(text):
    with pytest.raises(ArgumentError, match="--randaugment: .* is not none or e.g."):
        parse_randaugment(text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"randaugment": "num_ops=2", "trivial_augment": True}, "only one of --trivial_augment and --randaugment"),
        ({"three_augment": True, "trivial_augment": True}, "only one of --trivial_augment and --three_augment"),
        ({"streaming": True, "aug_repeats": 3}, "--aug_repeats: 3 does not go with --streaming"),
        ({"streaming": True, "class_balanced": True}, "--class_balanced: true does not go with --streaming"),
        ({"dataloader_num_workers": "some"}, "--dataloader_num_workers: 'some' is not auto or a number"),
        ({"dataloader_num_workers": "-1"}, "--dataloader_num_workers: '-1' is not auto or a number"),
        ({"subset_fraction": 0.5, "subset_per_class": 3}, "only one of --subset_fraction and --subset_per_class"),
    ],
)
def test_data_flags_that_exclude_each_other(flags, said):
    with pytest.raises(ArgumentError) as caught:
        check(RunArguments(preset="a", dataset_name="b", output_dir="c", max_steps=1, **flags))
    assert said in str(caught.value)


def test_a_run_of_an_earlier_version_held_out_by_its_seed():
    """There was one seed for both: another --split_seed is another run, which would train on what was held out."""
    before = {"dataset_name": "digits", "preset": "vit-demo-patch8-32", "seed": 3}
    assert saved_identity(before)["split_seed"] == 3
    now = RunArguments(dataset_name="digits", preset="vit-demo-patch8-32", seed=3)
    assert identity(now) != saved_identity(before)
    assert identity(dataclasses.replace(now, split_seed=3)) == saved_identity(before)


def test_a_mapping_in_yaml_is_the_text_of_the_flag(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "randaugment: {num_ops: 2, magnitude: 9, magnitude_std: 0.5, increasing: true}\n"
    )
    args = parse(RunArguments, ["--config", str(tmp_path / "recipe.yaml")], prog="x")
    assert args.randaugment == "num_ops=2,magnitude=9,magnitude_std=0.5,increasing=true"
    assert parse_randaugment(args.randaugment)["ops"] == "timm"


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(mixup_prob=0.5), "--mixup_prob: 0.5 does nothing without --mixup_alpha or --cutmix_alpha above 0"),
        (dict(mixup_off_epoch=3), "--mixup_off_epoch: 3 does nothing"),
        (dict(mixup_switch_prob=0.1, mixup_alpha=0.8), "does nothing without --mixup_alpha and --cutmix_alpha"),
        (dict(random_erasing_mode="pixel"), "--random_erasing_mode: pixel does nothing without --random_erasing"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(flags, said):
    with pytest.raises(ArgumentError, match=said):
        check_augmentation(RunArguments(**flags))
