"""--probe_steps: few-shot evaluation of a run's features on the way."""

import json

import numpy as np
import pytest
import torch

from tests.runs import evaluation, lines, trajectory
from vit_hf.errors import UserError


@pytest.mark.parametrize("average", [{}, {"ema_decay": 0.5}], ids=["weights", "average"])
def test_a_run_measures_its_features_and_goes_on_as_without(run, tmp_path, average):
    """Loss and gradient of each step, and the last weights, are the same to the bit; the last line is what `vit-hf probe`
    finds with the folder that the run leaves, which holds the average where there is one."""
    from vit_hf.cli import dispatch

    # a step that drops out and augments by random numbers
    flags = average | {"random_crop": "padding=4", "mixup_alpha": 0.5, "config_overrides": "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,hidden_dropout_prob=0.1"}  # fmt: skip
    plain = run("pretrain", output_dir=tmp_path / "plain", **flags)
    probed = run("pretrain", output_dir=tmp_path / "probed", probe_steps=4, **flags)
    assert trajectory(plain) == trajectory(probed)
    assert (plain / "model.safetensors").read_bytes() == (probed / "model.safetensors").read_bytes()
    measured = lines(probed, "probe_10shot_accuracy")
    assert [line["step"] for line in measured] == [4, 6] and all("epoch" in line for line in measured)
    assert 0.1 < measured[-1]["probe_10shot_accuracy"] < 1 and measured[-1]["probe_10shot_std"] > 0
    dispatch(
        ["probe", str(probed), "--dataset_name", "digits", "--max_eval_samples", "101", "--shots", "10", "--methods", "regression"]
    )  # fmt: skip
    found = json.loads((probed / "probe_results.json").read_text())
    assert found["results"][0]["accuracy"] == pytest.approx(measured[-1]["probe_10shot_accuracy"], abs=1e-9)
    assert evaluation(plain) == evaluation(probed)


def test_a_measurement_that_was_cut_off_is_made_at_the_resume(run, tmp_path):
    folder = run("pretrain", probe_steps=3, save_steps=3)
    whole = lines(folder, "probe_10shot_accuracy")
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "probe_" not in line]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    (folder / "all_results.json").unlink()
    run("pretrain", probe_steps=3, save_steps=3)  # goes on from the last step, at which nothing is left but this
    (again,) = lines(folder, "probe_10shot_accuracy")
    assert again["step"] == 6 and again["probe_10shot_accuracy"] == whole[-1]["probe_10shot_accuracy"]


def test_only_the_images_of_the_draws_are_decoded(run, tmp_path, monkeypatch):
    """The training split of digits has 1,347 images; three draws of ten of each class have at most 300."""
    from vit_hf.data import feed

    opened = []
    original = feed.open_batches
    monkeypatch.setattr(
        feed, "open_batches", lambda rows, *a, **k: opened.append(len(rows)) or original(rows, *a, **k)
    )
    run("pretrain", probe_steps=6)
    assert sorted(opened)[0] == 101 and 100 < sorted(opened)[1] <= 300 and sorted(opened)[2] == 1347


def test_too_few_images_of_a_class_is_one_line(run):
    with pytest.raises(
        UserError, match=r"--probe_steps: asks for 10 images of each class, and class \S+ has 7 training"
    ):
        run("pretrain", probe_steps=3, subset_per_class=7)


def test_a_compiled_model_is_heard(tmp_path):
    """Hooks that come after the compilation are not seen by it."""
    import accelerate

    from vit_hf.evaluation.features import extract_features
    from vit_hf.models.presets import from_preset

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = from_preset("vit-demo-patch8-32", ["a", "b"], small).eval()
    pixels = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (4, 3, 32, 32)).astype(np.uint8))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 0, 1]), "index": torch.arange(4)}
    batch["valid"] = torch.ones(4, dtype=torch.bool)
    accelerator = accelerate.Accelerator(cpu=True)
    expected = extract_features(model, [batch], lambda x: x / 255, accelerator)
    model.compile(backend="eager")
    with torch.no_grad():
        model(pixel_values=pixels / 255)  # compiled before anybody listens
    found = extract_features(model, [batch, batch], lambda x: x / 255, accelerator)
    assert torch.equal(found.values[::2], expected.values) and len(found) == 8
