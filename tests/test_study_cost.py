"""What a run will cost: images over speed, and the counts behind it."""

import pytest
import torch

from tests.distributed.test_study import VIT, write_study
from tests.runs import DEMO_DEFAULTS, python
from vit_hf.study.cost import estimate_cost, image_counts, measured_costs, model_config
from vit_hf.study.plan import read_study


def cell_of(tmp_path, preset=VIT, start_from=None, **flags):
    cells = {"parent": (preset, flags, {})}
    if start_from is not None:
        cells["child"] = (None, start_from, {"start_from": "parent"})
    return read_study(write_study(tmp_path, cells)).cells[-1]


def test_cost_is_images_over_speed(tmp_path):
    """6 steps of 32 and two evaluations of 101 at a third of the price each; two checkpoints and the export."""
    cell = cell_of(tmp_path, eval_steps=3, save_steps=3, save_total_limit=1)
    cost = estimate_cost(cell, images_per_second=10)
    assert cost.seconds == pytest.approx(10 + (6 * 32 + 2 * 101 / 3) / 10)
    parameters = 32 * (8 * 8 * 3) + 32 + 18 * 32  # patches, class token and positions
    parameters += 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 96 + 4 * 32) + 2 * 32 + 32 * 10 + 10
    assert cost.disk_bytes == 4 * parameters * (2 * 3 + 1)


def test_a_long_run_evaluates_and_saves_at_most_a_hundred_times(tmp_path):
    """475 epochs of digits' 1,347 images: every fifth one, and the last step."""
    cell = cell_of(tmp_path, max_steps=20_000, eval_steps="none", save_steps="none", save_total_limit="none")
    cost = estimate_cost(cell, images_per_second=1)
    assert cost.seconds == pytest.approx(10 + 20_000 * 32 + 96 * 101 / 3)
    few = estimate_cost(
        cell_of(tmp_path, max_steps=20_000, eval_steps="none", save_steps="none", save_total_limit=1), 1
    )
    assert cost.disk_bytes / few.disk_bytes == pytest.approx((96 * 3 + 1) / (2 * 3 + 1))


def test_images_of_known_sets_and_subsets(tmp_path):
    def counts(**flags):
        return image_counts(cell_of(tmp_path, max_eval_samples=10**9, **flags))

    assert counts(dataset_name="cifar10") == (50_000, 10_000, 10)
    assert counts(dataset_name="ILSVRC/imagenet-1k", subset_fraction=0.5) == (640_584, 50_000, 1000)
    assert counts(dataset_name="cifar10", subset_per_class=30, subset_classes="cat,dog") == (60, 2000, 2)
    assert counts(dataset_name="cifar10", max_train_samples=77) == (77, 10_000, 10)
    assert counts() == (1347, 450, 10)  # digits, counted


def test_model_of_a_cell_that_starts_from_another(tmp_path):
    """The MLP head stays behind; the image size is the cell's own."""
    overrides = DEMO_DEFAULTS["config_overrides"] + ",head_hidden_size=16"
    cell = cell_of(tmp_path, dataset_name="cifar10", config_overrides=overrides,
                   start_from={"image_size": 48, "config_overrides": "drop_path_rate=0.1"})  # fmt: skip
    config = model_config(cell)
    assert (config.image_size, config.hidden_size, config.head_hidden_size, config.num_labels) == (48, 32, None, 10)
    assert model_config(cell.start_from).head_hidden_size == 16 and config.drop_path_rate == 0.1


@pytest.mark.slow
def test_dry_run_tries_the_models_and_trains_nothing(tmp_path):
    done = python("-m", "vit_hf.cli", "study", "studies/cifar10.yaml", "--dry_run", "--only", "vit-small-*",
                  "--output_dir", tmp_path, env={"HF_HOME": str(tmp_path / "home")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("vit-small")]
    assert len(table) == 6 and all(words[-2:] == ["no", "data"] for words in table)
    assert {words[0]: float(words[5]) for words in table} == {"vit-small-200": pytest.approx(428.8, rel=0.01), "vit-small-500": pytest.approx(428.8, rel=0.01)}  # fmt: skip
    assert "no data: --dataset_name cifar10: uoft-cs/cifar10 is not in the cache" in done.stdout
    assert "6 of 6 runs to do" in done.stdout
    assert not list(tmp_path.glob("vit-*"))


def test_sizes_that_are_not_known_are_not_downloaded(tmp_path):
    cell = cell_of(tmp_path, dataset_name="someone/pictures")
    assert measured_costs([cell], torch.device("cpu"), 1, "no") == {}
    (tmp_path / "classes.txt").write_text("cat\ndog\nship\n")
    listed = cell_of(tmp_path, dataset_name="cifar10", subset_classes=str(tmp_path / "classes.txt"))
    assert image_counts(listed) == (15_000, 101, 3)
    assert image_counts(cell_of(tmp_path, dataset_name="cifar10", subset_per_class=6000))[0] == 50_000
