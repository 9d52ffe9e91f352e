"""What must not depend on how images come to the device, and what the data plane must not do over time."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.runs import DEMO_DEFAULTS, ROOT, evaluation, in_process, lines, python, trajectory, words

POLICY = dict(randaugment="num_ops=2,magnitude=9", random_erasing=0.25, random_flip=0.5, color_jitter=0.3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two classes of JPEGs that are larger than the model's 32 pixels: they are decoded batch by batch."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.RandomState(0)
    for split, number in (("train", 20), ("test", 6)):
        for name in ("dark", "light"):
            (folder / split / name).mkdir(parents=True)
            for row in range(number):
                levels = rng.randint(0, 128, (5, 6, 3)) + (127 if name == "light" else 0)
                picture = Image.fromarray(levels.astype(np.uint8)).resize((150, 110), Image.Resampling.BICUBIC)
                picture.save(folder / split / name / f"{row}.jpg")
    return folder


def flags_of(pictures, **changes):
    return dict(
        dataset_name=pictures,
        random_crop="scale=0.2",
        max_eval_samples=None,
        global_batch_size=16,
        **POLICY,
        **changes,
    )


def test_the_number_of_workers_does_not_change_the_course(run, tmp_path, pictures):
    """To the bit: decoding, crops, policies, erasing."""
    alone = run("pretrain", output_dir=tmp_path / "alone", dataloader_num_workers=0, **flags_of(pictures))
    shared = run("pretrain", output_dir=tmp_path / "shared", dataloader_num_workers=2, **flags_of(pictures))
    assert trajectory(alone) == trajectory(shared) and len(trajectory(alone)) == 6
    assert evaluation(alone) == evaluation(shared)


@pytest.mark.parametrize(
    "policy", [POLICY, {"trivial_augment": "true"}, {"three_augment": "true", "color_jitter": 0.3}]
)
def test_accumulation_does_not_change_the_course_under_any_policy(run, tmp_path, policy):
    flags = {**policy, "max_train_samples": 100, "random_crop": "padding=3", "max_steps": 3}
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    cut = run("pretrain", output_dir=tmp_path / "cut", per_device_train_batch_size=8, **flags)
    plain = run("pretrain", output_dir=tmp_path / "plain", **{**flags, **dict.fromkeys(policy)})
    for one, other in zip(trajectory(cut), trajectory(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert trajectory(plain)[0] != trajectory(whole)[0]


def test_a_resume_in_the_middle_of_an_epoch_is_exact_with_everything_on(run, tmp_path, pictures):
    flags = flags_of(pictures, mixup_alpha=0.2, cutmix_alpha=1.0, mixup_mode="elem", aug_repeats=2, save_steps=3)
    flags |= dict(max_steps=7, dataloader_num_workers=1)
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    from_step_3 = dict(output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole/checkpoint-3")
    assert trajectory(run("pretrain", **from_step_3, **flags)) == trajectory(whole)[3:]


def test_bad_images_are_counted_once_and_named_once_also_after_a_resume(run, tmp_path, pictures):
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(pictures, folder)
    for name in ("train/dark/3.jpg", "train/light/7.jpg", "test/dark/1.jpg"):
        (folder / name).write_bytes(b"no image")
    flags = flags_of(folder, on_bad_image="skip", max_steps=8, save_steps=5, eval_steps=4, output_dir=tmp_path / "run")
    run("pretrain", **flags)
    (tmp_path / "run/all_results.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoint-8")
    run("pretrain", **flags)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    bad = [event for event in events if event["event"] == "bad_image"]
    assert sorted(event["why"].split("/set/")[1].split(",")[0] for event in bad) == [
        "test/dark/1.jpg", "train/dark/3.jpg", "train/light/7.jpg",
    ]  # fmt: skip
    assert all(event["row"] >= 0 and event["split"] in ("train", "eval") for event in bad)
    assert json.loads((tmp_path / "run/all_results.json").read_text())["bad_images"] == 3
    assert lines(tmp_path / "run")[-1]["bad_images"] == 3
    assert lines(tmp_path / "run", "eval_samples")[-1]["eval_samples"] == 11


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_peak_memory_does_not_grow_over_epochs(tmp_path, pictures, large):
    """300 epochs of a small set, decoded once or by workers, with 15 evaluations: after the first third, no growth that
    an array a step or a loader an evaluation would cause."""
    flags = {**DEMO_DEFAULTS, **POLICY, "output_dir": tmp_path, "global_batch_size": 40, "max_train_samples": 40}
    flags |= dict(max_steps=300, logging_steps=100, eval_steps=20, save_steps=10_000, max_eval_samples=10)
    if large:
        flags |= dict(dataset_name=pictures, random_crop="scale=0.3", dataloader_num_workers=1)
    done = python(ROOT / "run_pretrain.py", *words(flags))
    assert done.returncode == 0, done.stderr
    early, _, late = [line["peak_memory_bytes"] for line in lines(tmp_path)]
    assert late - early < 12e6  # 200 more epochs; a batch of pixels has half a megabyte as floats
    assert lines(tmp_path)[-1]["epoch"] == 300


def test_a_decoded_set_is_shared_by_runs(run, tmp_path, monkeypatch):
    """The second run of the same set decodes nothing."""
    from vit_hf.data import cache

    run("pretrain", output_dir=tmp_path / "one", max_steps=2)
    monkeypatch.setattr(cache, "_fill", None)
    in_process("pretrain", **{**DEMO_DEFAULTS, "max_steps": 2, "output_dir": tmp_path / "two"})
    assert trajectory(tmp_path / "one") == trajectory(tmp_path / "two")


def test_runs_of_all_seeds_hold_out_the_same_images(pictures):
    """A set without an evaluation split: what one run held out, no other one trains on, whatever its --seed; and trials
    are scored on the same draw."""
    from vit_hf.arguments import RunArguments, pick
    from vit_hf.data.sets.load import SetSettings, load_set

    def splits_of(**flags):
        loaded = load_set(pick(SetSettings, RunArguments(dataset_name=str(pictures / "train"), **flags)))
        return [{row["image"]["path"] for row in split} for split in (loaded.train, loaded.eval)]

    (train, held_out), (other_train, other_held_out) = splits_of(seed=1), splits_of(seed=2)
    assert held_out == other_held_out and len(held_out) == 4 and not held_out & (train | other_train)
    assert splits_of(seed=1, split_seed=3)[1] != held_out
    assert splits_of(seed=1, max_eval_samples=2) == splits_of(seed=2, max_eval_samples=2)
