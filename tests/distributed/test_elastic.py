"""A run that goes from engine to engine: one process -> DDP -> ZeRO-1 -> ZeRO-2 -> ZeRO-3 -> FSDP2 on two -> one process,
three steps each, in fp32 and in bf16. One launch an engine holds its part of both, and a stop and a resume on the same
topology besides.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import DEMO_DEFAULTS, ROOT, evaluation, in_process, launch, lines, trajectory
from vit_hf.training.files import describe
from vit_hf.training.manifest import read_manifest, seal

pytestmark = pytest.mark.slow

# the name of the config, and what a manifest calls the engine
ENGINES = {"cpu_2proc": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
PRECISIONS = ["no", "bf16"]
STEPS, EACH = 21, 3
THREADS = torch.get_num_threads()  # of a run in this process; those that are launched have one
RUN = {
    **DEMO_DEFAULTS,
    "random_crop": "padding=3",
    "random_flip": 0.5,
    "ema_decay": 0.9,
    "max_train_samples": 100,  # an epoch is 3.1 steps: engines change in the middle of epochs
    "max_steps": STEPS,
    "save_steps": EACH,
    "eval_steps": STEPS,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
}


@dataclass
class Leg:
    """What one engine does: it goes on from the engine before it to the end, and from its own checkpoint once more."""

    start: int  # the step that it goes on from
    folder: Path  # run to the end; the next engine goes on from its checkpoint at start + EACH
    again: Path  # from that checkpoint to the end on the same topology
    said: str = ""

    @property
    def handed_on(self):
        return self.folder / f"checkpoint-{self.start + EACH}"


def course(folder, source, precision="no"):
    flags = {**RUN, "output_dir": str(folder), "resume_from_checkpoint": str(source)}
    return {"script": "pretrain", "mixed_precision": precision, "flags": flags}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{precision: folder} of the run that one process makes without a stop."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for precision in PRECISIONS:
            patch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            folders[precision] = tmp_path_factory.mktemp("whole") / precision
            in_process("pretrain", output_dir=folders[precision], **RUN)
    return folders


@pytest.fixture(scope="module")
def chain(whole, tmp_path_factory):
    """{(config, precision): Leg}, each engine going on from the one before it; the first from one process."""
    root, legs = tmp_path_factory.mktemp("chain"), {}
    sources = {precision: folder / f"checkpoint-{EACH}" for precision, folder in whole.items()}
    for number, config in enumerate(ENGINES, start=1):
        courses = []
        for precision in PRECISIONS:
            there = root / config / precision
            leg = legs[config, precision] = Leg(EACH * number, there / "run", there / "again")
            courses += [course(leg.folder, sources[precision], precision), course(leg.again, leg.handed_on, precision)]
            sources[precision] = leg.handed_on
        (root / f"{config}.json").write_text(json.dumps(courses))
        walk = [ROOT / "tests/distributed/walk_courses.py", root / f"{config}.json"]
        result = launch(walk, config, launcher=("--num_processes", "2"))
        assert result.returncode == 0, f"{config}: {result.stderr[-3000:]}"
        for precision in PRECISIONS:
            legs[config, precision].said = result.stdout
    return legs


def furthest(found, expected):
    """The largest relative difference of a loss or a gradient's norm."""
    assert [step for step, *_ in found] == [step for step, *_ in expected] and found
    pairs = [pair for one, two in zip(found, expected, strict=True) for pair in zip(one[1:], two[1:], strict=True)]
    return max(abs(a / b - 1) for a, b in pairs)


def rest(folder, start):
    """The trajectory after a step."""
    return [line for line in trajectory(folder) if line[0] > start]


def resumed(folder):
    """The event of the resume."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "resume"]
    return event


@pytest.mark.parametrize("config", ENGINES)
def test_an_engine_goes_on_as_the_uninterrupted_run(config, chain, whole):
    """The same losses and gradient norms to the end, hence the same samples; the same learning rates, and the same
    evaluation of the average. That it cannot be to the bit, and why, is said in a line."""
    leg = chain[config, "no"]
    assert f"engine: {ENGINES[config]}\n" in (leg.folder / "run_config.yaml").read_text()
    assert furthest(trajectory(leg.folder), rest(whole["no"], leg.start)) < 1e-5
    expected = [line for line in lines(whole["no"]) if line["step"] > leg.start]
    for key in ("learning_rate", "epoch", "images_seen"):
        assert [line[key] for line in lines(leg.folder)] == [line[key] for line in expected]
    one, two = evaluation(leg.folder), evaluation(whole["no"])
    assert one["eval_samples"] == two["eval_samples"] == 101
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-5)
    event, engines = resumed(leg.folder), ["single", *ENGINES.values()]
    before = engines[engines.index(ENGINES[config]) - 1]
    why = [f"engine {before} then, {ENGINES[config]} now"]
    if before == "single":
        why += ["num_processes 1 then, 2 now", "micro_batch_size 32 then, 16 now"]
        why += [f"cpu_threads {THREADS} then, 1 now"] * (THREADS > 1)
    assert (event["step"], event["exact"], event["why"]) == (leg.start, False, why)
    assert f"resuming from {event['folder']}, not to the bit: {'; '.join(why)}\n" in leg.said


def test_one_process_goes_on_from_the_last_engine(chain, whole, tmp_path, capsys):
    """And the course that the engines made together, three steps each, is that of one process."""
    last = chain["fsdp2", "no"]
    in_process("pretrain", **course(tmp_path / "run", last.handed_on)["flags"])
    said = (
        "not to the bit: engine fsdp2 then, single now; num_processes 2 then, 1 now; micro_batch_size 16 then, 32 now"
    )
    said += f"; cpu_threads 1 then, {THREADS} now" * (THREADS > 1)
    assert f"{last.handed_on}, {said}" in capsys.readouterr().out
    parts = [trajectory(whole["no"])[:EACH], *(trajectory(chain[c, "no"].folder)[:EACH] for c in ENGINES)]
    together = sum(parts, []) + trajectory(tmp_path / "run")
    assert len(together) == STEPS and furthest(together, trajectory(whole["no"])) < 1e-5


@pytest.mark.parametrize("lost", [None, "exp_avg", "exp_avg_sq", "steps"])
def test_a_hand_over_that_loses_the_optimizers_state_is_seen(lost, chain, whole, tmp_path):
    """The control of the tests above: moments or the step count set to zero are far outside of their tolerance."""
    leg = chain["zero2", "no"]
    source = shutil.copytree(leg.handed_on, tmp_path / leg.handed_on.name)
    manifest = read_manifest(source)
    assert manifest["optimizer_steps"] == leg.start + EACH
    shards = list(source.glob("training_state-*"))
    assert len(shards) == 2
    zeroed = []
    for path in shards:
        tensors = load_file(path)
        zeroed += [tensor.zero_() for name, tensor in tensors.items() if name.startswith(f"{lost}.")]
        save_file(tensors, path, metadata={"format": "pt"})
        manifest["files"][path.name] = describe(path)
    assert bool(zeroed) == (lost in ("exp_avg", "exp_avg_sq"))
    manifest["optimizer_steps"] *= lost != "steps"
    (source / "manifest.json").write_text(json.dumps(seal(manifest)))
    in_process("pretrain", **course(tmp_path / "run", source)["flags"])
    distance = furthest(trajectory(tmp_path / "run"), rest(whole["no"], leg.start + EACH))
    assert distance < 1e-5 if lost is None else distance > 1e-3, distance


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", ENGINES)
def test_stopped_and_resumed_on_the_same_topology_is_to_the_bit(config, precision, chain):
    leg = chain[config, precision]
    assert resumed(leg.again)["exact"] is True and f"resuming from {leg.handed_on}, exactly" in leg.said
    assert trajectory(leg.again) == rest(leg.folder, leg.start + EACH)
    for path in leg.folder.glob(f"checkpoint-{STEPS}/*.safetensors"):
        one, two = load_file(path), load_file(leg.again / path.relative_to(leg.folder))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), path.name


@pytest.mark.parametrize("config", ENGINES)
def test_in_bf16_an_engine_goes_on_within_its_rounding(config, chain, whole):
    """From the first step on, so what computes in 16 bits has followed the weights of the checkpoint."""
    leg = chain[config, "bf16"]
    found, expected = trajectory(leg.folder), rest(whole["bf16"], leg.start)
    assert furthest(found, expected) < 3e-2
    assert max(abs(a[1] / b[1] - 1) for a, b in zip(found, expected, strict=True)) < 3e-3  # losses: 8 bits, averaged
    assert evaluation(leg.folder)["eval_loss"] == pytest.approx(evaluation(whole["bf16"])["eval_loss"], rel=3e-3)


def test_checkpoints_of_all_engines_at_a_step_are_the_same_model(chain, whole):
    """transformers takes each as it is, and they hold the same average, raw weights and moments by the same names."""
    from transformers import AutoModelForImageClassification

    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    folders = [whole["no"], *(chain[config, "no"].folder for config in ENGINES)]
    found = []
    for folder in folders:
        checkpoint = folder / f"checkpoint-{STEPS}"
        tensors = {f"average.{name}": tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()}
        for path in checkpoint.glob("training_state-*"):
            tensors |= load_file(path)
        model, report = AutoModelForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
        assert not any(report.values()) and model.dtype == torch.float32
        with torch.no_grad():
            found.append((tensors, model.eval()(images).logits))
    (expected, logits), *others = found
    kinds = {re.split(r"[.]", name)[0] for name in expected}
    assert kinds == {"average", "weight", "exp_avg", "exp_avg_sq"}
    for tensors, of_others in others:
        torch.testing.assert_close(of_others, logits, rtol=1e-4, atol=1e-5)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            # attention does not change with the keys' bias: its gradient is rounding, and AdamW makes steps of that
            if not name.endswith(("key.bias", "k_proj.bias")):
                assert (tensor - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name
