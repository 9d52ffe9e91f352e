"""What only a CUDA device can show: `pytest -m gpu`; skipped where there is none."""

import pytest
import torch

from tests.runs import DEMO_DEFAULTS, in_process, launch, lines, trajectory
from vit_hf.data.augment import Augment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
AUGMENTED = {**DEMO_DEFAULTS, "random_crop": "padding=3", "random_flip": 0.5}


@pytest.mark.parametrize("crop", [("padding", 4), ("scale", 0.2)])
def test_a_sample_looks_the_same_on_cpu_and_gpu(crop):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(64) % 10, "epoch": torch.full((64,), 3), "index": torch.arange(64) * 977,
    }  # fmt: skip
    results = []
    for device in ("cpu", "cuda"):
        augment = Augment(
            seed=5, num_classes=10, mean=[0.5] * 3, std=[0.5] * 3, device=torch.device(device), crop=crop, flip=0.5
        )
        pixels, _ = augment({name: tensor.to(device) for name, tensor in batch.items()}, 0, 0, 0)
        results.append(pixels.cpu())
    one_grey_level = 1 / 255 / 0.5
    assert (results[0] - results[1]).abs().max() <= one_grey_level


def test_a_run_on_the_gpu_takes_the_course_of_the_cpu(tmp_path):
    """The launcher's configs differ in precision and device alone: bf16 stays within a few per cent."""
    result = launch("pretrain", "single_gpu", output_dir=tmp_path / "gpu", **AUGMENTED)
    assert result.returncode == 0, result.stderr
    reference = launch("pretrain", "cpu", output_dir=tmp_path / "cpu", **AUGMENTED)
    assert reference.returncode == 0, reference.stderr
    for one, other in zip(lines(tmp_path / "gpu"), lines(tmp_path / "cpu")):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_resume_on_the_gpu_is_exact(tmp_path):
    flags = {**AUGMENTED, "save_steps": 3}
    in_process("pretrain", output_dir=tmp_path / "whole", **flags)
    in_process(
        "pretrain", output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole/checkpoint-3", **flags
    )
    assert trajectory(tmp_path / "again") == trajectory(tmp_path / "whole")[3:]
