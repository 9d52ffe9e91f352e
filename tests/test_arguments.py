import dataclasses
import subprocess
import sys
from typing import Literal

import pytest
import yaml

from tests.runs import ROOT
from vit_hf.arguments import (
    RandAugment,
    RunArguments,
    check,
    check_augmentation,
    identity,
    parse,
    plain,
    read_config,
)
from vit_hf.arguments.fields import flag
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
    assert values["image_mean"] == (0.1, 0.2, 0.3) and values["image_size"] is None
    assert values["config_overrides"] == {"drop_path_rate": 0.1, "pooling": "mean"} and "resolved" not in values
    args = parse(
        RunArguments, ["--gradient_checkpointing", "--torch_compile", "false", "--max_steps", "none"], prog="p"
    )
    assert args.gradient_checkpointing is True and args.torch_compile is False and args.max_steps is None


def test_run_config_reads_back_as_it_was_written(tmp_path):
    args = parse(
        RunArguments,
        ["--learning_rate", "3e-5", "--subset_classes", "cat,ship", "--max_steps", "7", "--freeze", "layers.0-3"],
        prog="p",
    )
    content = yaml.safe_dump({**plain(args), "resolved": {"total_steps": 7}}, sort_keys=False)
    (tmp_path / "run_config.yaml").write_text(content)
    again = parse(RunArguments, ["--config", str(tmp_path / "run_config.yaml")], prog="p")
    assert again == args and identity(again) == identity(args)


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
     ("--hub_token", "hf auth login"), ("--fsdp", "accelerate_configs/fsdp2.yaml"), ("--save_strategy", "--save_steps"), ("--zzz", "--help lists")],
)  # fmt: skip
def test_flags_of_other_scripts_are_told_their_place(word, said):
    with pytest.raises(ArgumentError, match=said):
        parse(RunArguments, [word, "8"], prog="p")


def test_help_is_complete_and_wrong_flags_exit_with_2():
    shown = subprocess.run([sys.executable, "run_pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for name, item in RunArguments.__dataclass_fields__.items():
        assert (f"--{name}" in shown.stdout) != item.metadata["file_only"]
    wrong = subprocess.run([sys.executable, "run_finetune.py", "--sed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: unknown flag --sed, did you mean 'seed'?\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"randaugment": RandAugment(), "trivial_augment": True}, "only one of --trivial_augment and --randaugment"),
        ({"three_augment": True, "trivial_augment": True}, "only one of --trivial_augment and --three_augment"),
        ({"streaming": True, "aug_repeats": 3}, "--aug_repeats: 3 does not go with --streaming"),
        ({"streaming": True, "class_balanced": True}, "--class_balanced: true does not go with --streaming"),
        ({"streaming": True, "probe_steps": 3}, "--probe_steps: images of a streamed set are not drawn"),
        ({"subset_fraction": 0.5, "subset_per_class": 3}, "only one of --subset_fraction and --subset_per_class"),
    ],
)
def test_data_flags_that_exclude_each_other(flags, said):
    with pytest.raises(ArgumentError) as caught:
        check(RunArguments(preset="a", dataset_name="b", output_dir="c", max_steps=1, **flags))
    assert said in str(caught.value)


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


def test_a_choice_that_may_be_left_out_is_checked_as_one(capsys):
    @dataclasses.dataclass
    class Choice:
        """Choices."""

        order: Literal["up", "down"] | None = flag(None, "which way")

    assert parse(Choice, ["--order", "up"], prog="x").order == "up"
    assert parse(Choice, [], prog="x").order is parse(Choice, ["--order", "none"], prog="x").order is None
    with pytest.raises(ArgumentError, match="--order: 'left' is not one of up, down"):
        parse(Choice, ["--order", "left"], prog="x")
    with pytest.raises(SystemExit):
        parse(Choice, ["--help"], prog="x")
    assert "--order {up,down}" in capsys.readouterr().out
