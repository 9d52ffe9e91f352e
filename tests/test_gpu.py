"""What only a CUDA device can show: `pytest -m gpu`; skipped where there is none."""

import functools

import accelerate
import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from tests.runs import DEMO_DEFAULTS, in_process, launch, lines, trajectory
from tests.test_cache import small_set
from tests.test_loader import PREPROCESSING, image_set, train_places
from vit_hf.arguments import RandomCrop
from vit_hf.data.augment.pipeline import Augment
from vit_hf.data.augment.policies import color_jitter, rand_augment, three_augment
from vit_hf.data.batches import ImageBatches
from vit_hf.data.cache import decoded
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.order import StepPlan, StreamOrder
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.table import TableRows
from vit_hf.models.presets import from_preset
from vit_hf.training.tracking import Tracker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
AUGMENTED = {**DEMO_DEFAULTS, "random_crop": "padding=3", "random_flip": 0.5}


POLICIES = {
    "none": {},
    "RandAugment": {"policies": [rand_augment], "erasing": 0.5},
    "the other op set": {"policies": [functools.partial(rand_augment, magnitude=7, ops="big_vision")], "fill": 128},
    "timm": {
        "policies": [functools.partial(rand_augment, ops="timm", magnitude_std=0.5)], "fill": (9, 99, 199),
        "erasing": 0.5, "erasing_mode": "pixel",
    },
    "3-Augment and jitter": {"policies": [three_augment, functools.partial(color_jitter, strength=0.4)]},
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("crop", [RandomCrop("padding", 4), RandomCrop("simple", 4), RandomCrop("scale", 0.2)])
def test_a_sample_looks_the_same_on_cpu_and_gpu(crop, policy):
    """Grey levels within one, but where a crop's rounding falls on another side and an operation then amplifies it."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(64) % 10, "visit": torch.full((64,), 3), "index": torch.arange(64) * 977,
    }  # fmt: skip
    results = []
    for device in ("cpu", "cuda"):
        augment = Augment(
            seed=5, num_classes=10, mean=[0.5] * 3, std=[0.5] * 3, device=torch.device(device), crop=crop, flip=0.5,
            **POLICIES[policy],
        )  # fmt: skip
        moved = {name: batch[name].to(device) for name in ("pixel_values", "labels")}
        pixels, _ = augment({**batch, **moved}, 0, 0, 0)
        results.append(pixels.cpu())
    one_grey_level = 1 / 255 / 0.5
    differs = (results[0] - results[1]).abs() > one_grey_level * 1.01
    assert differs.float().mean() <= (0 if policy == "none" or crop.kind != "scale" else 0.002)


def test_batches_come_to_the_gpu_as_they_are_on_the_cpu():
    """Kept on the device, gathered on the host, and decoded by workers."""
    rows = TableRows(image_set(30))
    places = train_places(total_steps=5)
    kept = decoded(rows, PREPROCESSING)
    expected = list(DeviceBatches(ImageBatches(rows, PREPROCESSING), places, torch.device("cpu"), 0, Faults()))
    resident = ImageBatches(rows, PREPROCESSING, kept)
    resident.place_on_device(torch.device("cuda:0"))
    assert resident.on_device is not None
    for batches, workers in (
        (resident, 0),
        (ImageBatches(rows, PREPROCESSING, kept), 0),
        (ImageBatches(rows, PREPROCESSING), 2),
    ):
        found = list(DeviceBatches(batches, places, torch.device("cuda:0"), workers, Faults()))
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert one["pixel_values"].is_cuda and one["labels"].is_cuda and not one["index"].is_cuda
            assert all(torch.equal(one[name].cpu(), other[name]) for name in other)


@pytest.mark.parametrize("shared", [True, False])
def test_pieces_of_a_stream_come_to_the_gpu_as_one_micro_batch(shared):
    """From three workers, through shared memory and through a pipe; some pieces are empty."""
    rows, groups = TableRows(image_set(30)), np.arange(0, 31, 2)
    plan = StepPlan(3, 0, 20, num_processes=1, rank=0, micro_batch_size=3, accumulation=1)
    batches = ImageBatches(rows, PREPROCESSING)
    orders = [StreamOrder(plan, groups=groups, num_workers=workers, buffer_size=8) for workers in (0, 3)]
    assert any(len(piece.index) == 0 for piece in orders[1])
    expected = DeviceBatches(batches, orders[0], torch.device("cpu"), 0, Faults())
    found = DeviceBatches(batches, orders[1], torch.device("cuda:0"), 3, Faults(), pieces=3, shared=shared)
    for one, other in zip(found, expected, strict=True):
        assert one["pixel_values"].is_cuda
        assert all(torch.equal(one[name].cpu(), other[name]) for name in other)
    found.close()


@pytest.mark.parametrize("preprocessing", [Preprocessing((224, 224)), Preprocessing((32, 32), 40, resample=3)])
def test_images_of_one_size_are_resized_on_the_gpu_to_pillows_pixels(preprocessing):
    rows, places = TableRows(small_set(30, ((32, 24),))), train_places(total_steps=5)
    expected = list(DeviceBatches(ImageBatches(rows, preprocessing), places, torch.device("cpu"), 0, Faults()))
    batches = ImageBatches(rows, preprocessing, decoded(rows, preprocessing))
    batches.place_on_device(torch.device("cuda:0"))
    assert batches.on_device.shape == (30, 32, 24, 3)
    found = DeviceBatches(batches, places, torch.device("cuda:0"), 0, Faults())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["pixel_values"].cpu(), other["pixel_values"])


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_the_cpu(family):
    """In fp32 without TF32; under bf16 autocast the loss of a training step is near and every gradient is finite."""
    torch.manual_seed(0)
    preset, changes = FAMILIES[family]
    model = from_preset(preset, list("abc"), changes).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        expected = model(images, labels=labels)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, images, labels = model.cuda(), images.cuda(), labels.cuda()
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits.cpu(), expected.logits, rtol=1e-3, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(images, labels=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_back_ends_agree(implementation):
    for changes in (FAMILIES["vit"][1], FAMILIES["relative"][1]):
        torch.manual_seed(0)
        model = from_preset("vit-demo-patch8-32", list("abc"), changes).eval().cuda()
        images = torch.randn(4, 3, 32, 32).cuda()
        with torch.no_grad():
            expected = model(images, output_attentions=True).logits  # written out
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(model(images).logits, expected, rtol=1e-3, atol=1e-3)


def test_steps_under_way_when_an_evaluation_begins_are_training_time(tmp_path):
    """A host runs ahead of its device: what it has asked for before a pause is not the pause's."""
    tracker = Tracker(accelerate.Accelerator(), tmp_path, 0, total_steps=1)
    weights = torch.randn(8192, 8192, device="cuda") @ torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    tracker.window(0)
    start.record()
    for _ in range(30):
        weights @ weights
    end.record()
    with tracker.pause():
        torch.cuda.synchronize()
    seconds = 1 / tracker.window(1)["images_per_second"]
    tracker.close()
    assert seconds > 0.9 * start.elapsed_time(end) / 1000
