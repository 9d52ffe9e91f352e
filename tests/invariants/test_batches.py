"""What must not depend on how the global batch is cut, and what the log tells of it."""

import pytest

from tests.runs import lines, trajectory
from vit_hf.errors import ArgumentError

AUGMENTED = dict(random_crop="padding=3", random_flip=0.5, max_train_samples=100)


def close(one, other, tolerance=1e-5):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["padding=3", "scale=0.3"])
def test_accumulation_does_not_change_the_course(run, tmp_path, crop):
    """One micro-batch of 32 = 4 of 8: the same samples, augmented in the same way."""
    flags = {**AUGMENTED, "random_crop": crop}
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    cut = run("pretrain", output_dir=tmp_path / "cut", per_device_train_batch_size=8, **flags)
    close(trajectory(cut), trajectory(whole))


def test_augmentation_reaches_the_model(run, tmp_path):
    plain = run("pretrain", output_dir=tmp_path / "plain", max_steps=2)
    augmented = run("pretrain", output_dir=tmp_path / "augmented", max_steps=2, random_crop="padding=3")
    assert trajectory(plain)[0] != trajectory(augmented)[0]


def test_gradient_checkpointing_does_not_change_the_course(run, tmp_path):
    plain = run("pretrain", output_dir=tmp_path / "plain", max_steps=3)
    saved = run("pretrain", output_dir=tmp_path / "saved", max_steps=3, gradient_checkpointing="true")
    close(trajectory(saved), trajectory(plain), 1e-6)


def test_the_log_tells_what_the_contract_says(run):
    folder = run("pretrain", eval_steps=3)
    for line in lines(folder):
        assert (
            line["images_per_second"] > 0 and 0 <= line["data_wait_fraction"] <= 1 and line["peak_memory_bytes"] > 1e6
        )
        assert {"step", "epoch", "loss", "learning_rate", "grad_norm"} <= line.keys()
    assert [line["step"] for line in lines(folder, "eval_accuracy")] == [3, 6]
    assert lines(folder, "eval_accuracy")[-1]["eval_samples"] == 101


def test_a_global_batch_that_does_not_divide_is_refused(run):
    with pytest.raises(ArgumentError, match="per_device_train_batch_size: 12 does not divide"):
        run("pretrain", per_device_train_batch_size=12)
