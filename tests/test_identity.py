"""Which run a folder belongs to, and what may change of it when it goes on."""

import dataclasses
import json
from pathlib import Path

import pytest

from vit_hf.arguments import (
    MENDABLE,
    RandAugment,
    RandomCrop,
    RunArguments,
    changes,
    check,
    identity,
    parse,
    plain,
    saved_identity,
    without_paths,
)
from vit_hf.errors import ArgumentError, UserError

BASE = RunArguments(preset="a", dataset_name="b", output_dir="c", max_steps=10)
HERE = Path("runs/x/checkpoint-3")


def with_flags(**values):
    return dataclasses.replace(BASE, **values)


def test_identity_is_model_data_optimisation_and_seed():
    def changed(**values):
        return identity(with_flags(**values)) != identity(BASE)

    for values in (dict(seed=1), dict(learning_rate=1.0), dict(dataset_name="x"), dict(global_batch_size=2), dict(freeze=("encoder",)),
                   dict(random_crop=RandomCrop("padding", 4)), dict(randaugment=RandAugment())):  # fmt: skip
        assert changed(**values), values
    for values in (dict(output_dir="x"), dict(per_device_train_batch_size=2), dict(logging_steps=3), dict(push_to_hub=True),
                   dict(dataloader_num_workers=3), dict(resume_from_checkpoint="none"), dict(change=("learning_rate",)),
                   dict(on_nonfinite="skip"), dict(spike_threshold=3.0), dict(on_save_error="stop"), dict(run_name="x"),
                   dict(save_total_limit=None), dict(shuffle_buffer_size=5)):  # fmt: skip # nothing is streamed
        assert not changed(**values), values
    streamed = [with_flags(streaming=True, shuffle_buffer_size=size) for size in (5, 6)]
    assert identity(streamed[0]) != identity(streamed[1])


def test_values_are_compared_and_not_texts():
    """The flags of an earlier version were kept as they were typed."""
    before = {"preset": "a", "dataset_name": "b", "max_steps": 10, "random_crop": "scale=0.080", "image_mean": "0.5,0.50,0.5",
              "randaugment": "magnitude=9, num_ops=2", "config_overrides": "b=1,a=2.0e-1", "image_size": "32"}  # fmt: skip
    now = with_flags(random_crop=RandomCrop("scale", 0.08), image_mean=(0.5,) * 3, randaugment=RandAugment(),
                     config_overrides={"a": 0.2, "b": 1}, image_size=32)  # fmt: skip
    assert changes(before, identity(now), folder=HERE) == {} and saved_identity(before) == identity(now)
    with pytest.raises(UserError, match=r"--random_crop scale=0.07 there, scale=0.08 now"):
        changes({**before, "random_crop": "scale=0.07"}, identity(now), folder=HERE)
    with pytest.raises(UserError, match=r"--lr_scheduler_type staircase there, cosine now"):  # no longer allowed
        changes({**before, "lr_scheduler_type": "staircase"}, identity(now), folder=HERE)


def test_an_identity_survives_its_file():
    args = with_flags(subset_classes=("a, b", "c"), freeze=("layers.0", "layers.1"), randaugment=RandAugment(ops="timm"),
                      image_size=(32, 48), config_overrides={"stem_depths": [2, 2]}, learning_rate=1e-9)  # fmt: skip
    assert saved_identity(json.loads(json.dumps(identity(args)))) == identity(args) == saved_identity(plain(args))


def test_a_run_of_an_earlier_version_held_out_by_its_seed():
    """There was one seed for both: another --split_seed is another run, which would train on what was held out."""
    before = {"dataset_name": "digits", "preset": "vit-demo-patch8-32", "seed": 3}
    assert saved_identity(before)["split_seed"] == 3
    now = RunArguments(dataset_name="digits", preset="vit-demo-patch8-32", seed=3)
    assert identity(now) != saved_identity(before)
    assert identity(dataclasses.replace(now, split_seed=3)) == saved_identity(before)


def test_what_is_named_may_change_and_is_told():
    now = identity(with_flags(learning_rate=1e-4, max_grad_norm=0.5))
    told = {"learning_rate": (1e-3, 1e-4), "max_grad_norm": (1.0, 0.5)}
    assert changes(identity(BASE), now, ("learning_rate", "max_grad_norm", "momentum"), folder=HERE) == told
    with pytest.raises(UserError) as caught:
        changes(identity(BASE), now, ("learning_rate",), folder=HERE)
    assert str(caught.value) == (
        f"{HERE} belongs to another run (--max_grad_norm 1.0 there, 0.5 now); choose another --output_dir, or remove it, "
        "or go on with the new values: --change learning_rate,max_grad_norm"
    )
    other = identity(with_flags(learning_rate=1e-4, seed=1))
    with pytest.raises(
        UserError, match=r"\(--learning_rate 0.001 there, 0.0001 now; --seed 0 there, 1 now\); choose"
    ) as caught:
        changes(identity(BASE), other, folder=HERE)
    assert "--change" not in str(caught.value)  # it would not help


def test_the_length_may_be_given_in_the_other_unit():
    """--max_steps on the command line where the checkpoint's run has epochs, and the reverse, whichever is named."""
    epochs = identity(with_flags(max_steps=None, num_train_epochs=3.0))
    for name in ("max_steps", "num_train_epochs"):
        told = changes(epochs, identity(BASE), (name,), folder=HERE)
        assert told == {"num_train_epochs": (3.0, None), "max_steps": (None, 10)}
        assert changes(identity(BASE), epochs, (name,), folder=HERE).keys() == told.keys()
    with pytest.raises(UserError, match="--change num_train_epochs,max_steps$"):
        changes(epochs, identity(BASE), folder=HERE)


def test_an_average_is_not_begun_or_dropped_in_the_middle():
    some, other = identity(with_flags(ema_decay=0.9)), identity(with_flags(ema_decay=0.99))
    assert changes(some, other, ("ema_decay",), folder=HERE) == {"ema_decay": (0.9, 0.99)}
    for before, now in ((identity(BASE), some), (some, identity(BASE))):
        with pytest.raises(UserError, match="--ema_decay"):
            changes(before, now, ("ema_decay",), folder=HERE)


def test_what_may_change_is_optimisation_augmentation_and_length():
    assert {
        "learning_rate",
        "weight_decay",
        "warmup_ratio",
        "adam_beta2",
        "mixup_alpha",
        "random_crop",
        "max_steps",
    } <= set(MENDABLE)
    kept = {"preset", "config_overrides", "dataset_name", "subset_classes", "image_size", "seed", "subset_seed", "optim",
            "freeze", "global_batch_size", "aug_repeats", "streaming", "output_dir"}  # fmt: skip
    assert not kept & set(MENDABLE)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"change": ("learning_rat",)}, "--change: 'learning_rat' is no flag, did you mean 'learning_rate'"),
        ({"change": ("seed",)}, "--change: seed makes another run, which needs its own --output_dir; allowed are"),
        ({"change": ("save_steps",)}, "--change: save_steps may change without being named here"),
        ({"change": ("momentum",), "resume_from_checkpoint": "none"}, "nothing is resumed with --resume_from_checkpoint none"),
    ],
)  # fmt: skip
def test_names_that_change_cannot_have(flags, said):
    with pytest.raises(ArgumentError) as caught:
        check(with_flags(**flags))
    assert said in str(caught.value)
    check(with_flags(change=("learning_rate", "max_steps")))


def test_a_flag_names_the_length_in_place_of_the_recipes(tmp_path):
    (tmp_path / "run_config.yaml").write_text("num_train_epochs: 3\npreset: a\ndataset_name: b\noutput_dir: c\n")
    words = ["--config", str(tmp_path / "run_config.yaml"), "--max_steps", "900", "--change", "max_steps"]
    args = parse(RunArguments, words, prog="x")
    check(args)
    assert (args.max_steps, args.num_train_epochs, args.change) == (900, None, ("max_steps",))


def test_local_paths_are_not_published(tmp_path):
    flags = {"dataset_name": str(tmp_path), "model_name_or_path": "google/vit", "output_dir": "/home/me/x", "seed": 1,
             "subset_classes": ["a, b", "c"]}  # fmt: skip
    assert without_paths(flags) == {
        "dataset_name": tmp_path.name,
        "model_name_or_path": "google/vit",
        "output_dir": "x",
        "seed": 1,
        "subset_classes": ["a, b", "c"],
    }
