"""train() with a two-layer model and a list of tensors: the loop needs no dataset and no Hub."""

import itertools
import json
import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from tests.runs import lines
from vit_hf.errors import UserError
from vit_hf.training.actions import Action, Draw, Evaluate, Log, Save
from vit_hf.training.checkpoint import Checkpoints, load
from vit_hf.training.loop import LoopSettings, train
from vit_hf.training.manifest import read_manifest
from vit_hf.training.model_folder import ModelFolder
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import Schedule, plan_batches
from vit_hf.training.signals import StoppedBySignal
from vit_hf.training.state import prepare


class Model(torch.nn.Sequential):
    """Two layers that are called as a ViT is."""

    def __init__(self):
        super().__init__(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=super().forward(pixel_values))


class Run:
    """The parts that train() is handed, over 8 rows a step: 24 make an epoch.

    Args:
        first_step: goes on from that checkpoint of the folder.
    """

    def __init__(
        self, tmp_path, *, accumulation=1, steps=4, max_grad_norm=0.0, first_step=0, ema_decay=0.0, learning_rate=0.1,
        optim="sgd", mixed_precision="no", on_save_error="warn", on_batch=lambda number: None, **settings,
    ):  # fmt: skip
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        self.model = Model()
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        num_processes = accelerator.num_processes
        self.plan = plan_batches(8, num_processes, 8 // num_processes // accumulation)
        self.state = prepare(
            accelerator, self.model, self.plan, optimizer=OptimizerSettings(optim, learning_rate, momentum=0.0),
            max_grad_norm=max_grad_norm, ema_decay=ema_decay,
        )  # fmt: skip
        weights = self.model.state_dict()
        folder = ModelFolder({name: name for name in weights}, {n: tuple(w.shape) for n, w in weights.items()}, {})
        self.checkpoints = Checkpoints(self.state, folder, tmp_path, on_save_error=on_save_error)
        if first_step:
            at = tmp_path / f"checkpoint-{first_step}"
            load(self.state, folder, at, read_manifest(at))
        self.data = torch.randn(steps * 8, 5, generator=torch.Generator().manual_seed(1))
        self.batches = self._batches(first_step, on_batch)
        self.schedule = Schedule(24, 8, steps, 0, learning_rate, "constant")
        self.settings = LoopSettings(tmp_path, 0.0, 0, max_grad_norm, first_step, **settings)

    def _batches(self, first_step, on_batch):
        rank, micro = self.state.accelerator.process_index, self.plan.micro_batch_size
        mine = [rows[rank :: self.plan.num_processes].split(micro) for rows in self.data.split(8)]
        parts = enumerate(itertools.chain.from_iterable(mine))
        for number, part in itertools.islice(parts, first_step * self.plan.accumulation, None):
            on_batch(number)
            yield {"rows": part}

    def norm(self):
        return {"eval_norm": sum(p.norm().item() for p in self.model.parameters())}

    def actions(
        self, logging_steps=1, save_steps=1000, eval_steps=2, draw_steps=None, evaluate=None, draw=None, **log
    ):
        at = self.schedule.cadence
        made = [
            Log(at(logging_steps), **log),
            Save(at(save_steps), self.checkpoints, {"run": {}, "exactness": {}}),
            Evaluate(at(eval_steps), evaluate or self.norm),
        ]
        return [*made, Draw(at(draw_steps), draw)] if draw is not None else made

    def train(self, actions=None, objective=mse_loss, **how_often):
        augment = lambda batch, step, micro_step, rank: (batch["rows"][:, :4], batch["rows"][:, 4:])  # noqa: E731
        actions = self.actions(**how_often) if actions is None else actions
        train(self.state, self.batches, self.plan, self.schedule, self.settings, augment, objective, actions)
        return self


def at_batch(wanted, do):
    """Does something in the midst of a step, when its batch is asked for."""
    return lambda number: do() if number == wanted else None


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def metrics(folder):
    """The lines of metrics.jsonl without what the clock and the machine say."""
    clock = ("wall_time_seconds", "images_per_second", "data_wait_fraction", "peak_memory_bytes", "save_stall_seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines(folder, "step")]


def reference(data, max_grad_norm=0.0):
    """The same training written out."""
    torch.manual_seed(0)
    model = Model()
    course = []
    for batch in data.split(8):
        loss = ((model(batch[:, :4]).logits - batch[:, 4:]) ** 2).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter -= 0.1 * scale * gradient
        course.append((loss.item(), norm.item()))
    return model, course


@pytest.mark.parametrize(("accumulation", "max_grad_norm"), [(1, 0.0), (4, 0.0), (1, 0.5), (2, 0.5)])
def test_the_course_is_that_of_the_written_out_loop(tmp_path, accumulation, max_grad_norm):
    run = Run(tmp_path, accumulation=accumulation, max_grad_norm=max_grad_norm).train()
    expected_model, course = reference(run.data, max_grad_norm)
    logged = [(line["loss"], line["grad_norm"]) for line in lines(tmp_path)]
    assert logged == [pytest.approx(pair, rel=1e-5) for pair in course]
    for one, other in zip(run.model.parameters(), expected_model.parameters()):
        torch.testing.assert_close(one, other)


def test_a_log_line_is_the_mean_since_the_last_one(tmp_path):
    _, course = reference(Run(tmp_path, steps=4).train(logging_steps=3).data)
    losses = [loss for loss, _ in course]
    assert [line["step"] for line in lines(tmp_path)] == [3, 4]  # and always one at the last step
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx([sum(losses[:3]) / 3, losses[3]], rel=1e-5)
    assert [line["epoch"] for line in lines(tmp_path)] == [1.0, round(32 / 24, 4)]


def test_mfu_is_logged_where_the_peak_is_known(tmp_path):
    Run(tmp_path, steps=1).train(mfu_scale=0.5)
    (line,) = lines(tmp_path)
    assert line["mfu"] == 0.5 * line["images_per_second"]


def test_whoever_counts_something_adds_numbers_to_the_log_lines(tmp_path):
    """They come in order, and are handed what the window measured."""
    seen = []
    waits = lambda speed: seen.append(speed["data_wait_fraction"]) or {}  # noqa: E731
    Run(tmp_path, steps=2).train(numbers=[waits, lambda speed: {"bad_images": len(seen)}])
    assert [(line["bad_images"], line["data_wait_fraction"]) for line in lines(tmp_path)] == [
        (1, seen[0]),
        (2, seen[1]),
    ]


def test_both_kinds_of_lines_say_what_the_run_has_cost(tmp_path):
    """Images and operations are functions of the step; a batch has 8 images."""
    Run(tmp_path, steps=4, training_flops_per_image=5.0).train()
    for key, steps in (("loss", [1, 2, 3, 4]), ("eval_norm", [2, 4])):
        found = lines(tmp_path, key)
        assert [line["images_seen"] for line in found] == [8 * step for step in steps]
        assert [line["training_flops"] for line in found] == [40.0 * step for step in steps]
    clock = [json.loads(line)["wall_time_seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert clock == sorted(clock)


def test_operations_are_left_out_where_they_are_not_known(tmp_path):
    Run(tmp_path, steps=1).train()
    assert not lines(tmp_path, "training_flops") and lines(tmp_path, "images_seen")


def test_the_objective_sees_fp32_whatever_the_model_computes_in(tmp_path):
    seen = set()

    def objective(logits, targets):
        seen.add((logits.dtype, targets.dtype))
        return mse_loss(logits, targets)

    run = Run(tmp_path, mixed_precision="bf16")
    forward, inside = run.model[0].forward, set()
    run.model[0].forward = lambda x: inside.add((y := forward(x)).dtype) or y
    run.train(objective=objective)
    assert inside == {torch.bfloat16} and seen == {(torch.float32, torch.float32)}


# --- what falls due, and in which order ---


def test_evaluation_and_checkpoint_come_once_an_epoch_and_at_the_end(tmp_path):
    Run(tmp_path, steps=7).train(eval_steps=None, save_steps=None)
    assert [line["step"] for line in lines(tmp_path, "eval_norm")] == [3, 6, 7]
    assert checkpoints_in(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]


class Note(Action):
    """Another kind of action: one class."""

    def __init__(self, cadence, name, journal):
        self.cadence, self.name, self.journal = cadence, name, journal

    def run(self, moment):
        self.journal.append((moment.step, self.name))


def test_what_is_due_at_a_step_runs_in_the_order_of_the_list(tmp_path):
    run, journal = Run(tmp_path, steps=4), []
    at = run.schedule.cadence
    note = lambda name: lambda *_: journal.append((len(lines(tmp_path, "eval_norm")), name)) or {}  # noqa: E731
    actions = run.actions(evaluate=lambda: note("evaluate")() or run.norm(), draw_steps=4, draw=note("draw"))
    run.train([Note(at(4), "first", journal), *actions, Note(at(2), "last", journal)])
    assert journal == [(0, "evaluate"), (2, "last"), (4, "first"), (1, "evaluate"), (2, "draw"), (4, "last")]


def test_a_due_checkpoint_is_there_before_the_evaluation_begins(tmp_path):
    run, seen = Run(tmp_path), []

    def evaluate():
        run.checkpoints.wait()
        seen.append(checkpoints_in(tmp_path))
        return run.norm()

    run.train(eval_steps=2, save_steps=2, evaluate=evaluate)
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]


def test_a_checkpoint_has_a_log_line_and_the_next_one_says_how_long_the_step_stood_still(tmp_path):
    Run(tmp_path, steps=6).train(logging_steps=4, save_steps=3)
    assert [line["step"] for line in lines(tmp_path)] == [3, 4, 6]
    assert [line["step"] for line in lines(tmp_path, "save_stall_seconds")] == [4]
    assert all(line["save_stall_seconds"] >= 0 for line in lines(tmp_path, "save_stall_seconds"))


def test_the_last_checkpoint_is_whole_when_train_returns(tmp_path):
    Run(tmp_path).train()
    assert read_manifest(tmp_path / "checkpoint-4")["step"] == 4 and checkpoints_in(tmp_path) == ["checkpoint-4"]


def test_a_list_that_saves_what_nothing_has_looked_at_is_refused(tmp_path):
    run = Run(tmp_path)
    _, save, _ = run.actions(save_steps=2)
    with pytest.raises(AssertionError, match="a Log stands before a Save"):
        run.train([save])
    assert not checkpoints_in(tmp_path)


def test_drawing_sees_the_average_and_its_faults_end_no_run(tmp_path):
    run, drawn = Run(tmp_path, ema_decay=0.5), []

    def draw(step):
        drawn.append(run.norm()["eval_norm"])
        if step == 2:
            raise ValueError("no picture today. And more")
        return {"one": np.zeros((2, 2, 3), np.uint8)}

    run.train(draw_steps=2, draw=draw)
    assert (
        drawn == [line["eval_norm"] for line in lines(tmp_path, "eval_norm")] and drawn[1] != run.norm()["eval_norm"]
    )
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["why"]) == ("figures_left_out", 2, "no picture today")


# --- what is not finite ---


def test_a_loss_that_is_not_finite_names_the_steps(tmp_path):
    seen = []

    def breaks(logits, targets):
        seen.append(1)
        return mse_loss(logits, targets) * (float("nan") if len(seen) == 3 else 1)

    with pytest.raises(UserError, match="the loss is not finite at step 3.*after the steps 3 to 4"):
        Run(tmp_path).train(logging_steps=2, objective=breaks)
    assert not checkpoints_in(tmp_path)


def test_gradients_that_are_not_finite_are_seen_before_the_checkpoint(tmp_path):
    """The loss of the step is finite still; the weights after it are not."""
    seen = []

    def breaks(logits, targets):
        seen.append(1)
        loss = mse_loss(logits, targets)
        return loss + (loss - loss.detach()).sqrt() if len(seen) == 4 else loss  # d sqrt(0) is infinite

    with pytest.raises(UserError, match="the gradient is not finite at step 4"):
        Run(tmp_path).train(save_steps=2, objective=breaks)
    assert checkpoints_in(tmp_path) == ["checkpoint-2"]
    assert '"not_finite"' in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize(("optim", "learning_rate"), [("sgd", 1e12), ("adamw", 1e39)])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, optim, learning_rate):
    """With 1e39 loss and gradient of step 1 are finite, and what it makes of the weights is not."""
    run = Run(tmp_path, optim=optim, learning_rate=learning_rate, steps=8)
    with pytest.raises(UserError, match="not finite"):
        run.train(save_steps=1)
    assert not all((parameter.abs() < 1e18).all() for parameter in run.model.parameters())
    assert learning_rate < 1e30 or checkpoints_in(tmp_path) == []
    for name in checkpoints_in(tmp_path):
        assert all(weight.isfinite().all() for weight in load_file(tmp_path / name / "model.safetensors").values())


# --- ends, and going on ---


def test_a_launcher_that_ends_all_leaves_the_last_save_to_its_end(tmp_path, monkeypatch):
    """The loss breaks at step 2 while checkpoint-1 is written; another process comes to its end sooner, and the launcher
    sends SIGTERM."""
    told, real = [], os.fsync
    previous = signal.signal(signal.SIGTERM, lambda *_: told.append("the default would have ended the process"))

    def slow(descriptor):
        time.sleep(0.3)
        sigterm()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    try:
        with pytest.raises(UserError, match="the loss is not finite at step 2"):
            Run(tmp_path, on_batch=at_batch(1, lambda: told.append("step 2"))).train(
                save_steps=1, objective=lambda *both: mse_loss(*both) * (float("nan") if told else 1)
            )
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert told == ["step 2"] and checkpoints_in(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(("at", "stopped"), [(2, True), (3, True), (4, False)])
def test_a_run_that_a_signal_stopped_goes_on_as_if_it_had_not(tmp_path, at, stopped):
    """Stopped at a step at which an evaluation is due, at one where it is not, and at the last, which is the end."""
    plain = Run(tmp_path / "plain", ema_decay=0.5).train()
    folder, asked = tmp_path / "stopped", []
    folder.mkdir()
    run = Run(folder, ema_decay=0.5, on_batch=at_batch(at - 1, sigterm))
    evaluate = lambda: asked.append(1) or run.norm()  # noqa: E731
    if stopped:
        with pytest.raises(StoppedBySignal, match=f"checkpoint-{at}") as caught:
            run.train(evaluate=evaluate, logging_steps=1000)
        assert caught.value.exit_status == 128 + signal.SIGTERM
        assert len(asked) == (1 if at == 3 else 0)  # who stops us does not wait for an evaluation
        assert [line["step"] for line in lines(folder)] == [at] and checkpoints_in(folder) == [f"checkpoint-{at}"]
        run = Run(folder, ema_decay=0.5, first_step=at)
    run.train()
    assert [line for line in metrics(folder) if "eval_norm" in line] == [
        line for line in metrics(tmp_path / "plain") if "eval_norm" in line
    ]
    assert metrics(folder)[-2:] == metrics(tmp_path / "plain")[-2:]
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("at", [2, 4])
def test_an_evaluation_that_broke_off_is_made_up_for_once(tmp_path, at):
    """At step 4 the run has no step left to make."""
    Run(tmp_path / "plain").train(save_steps=2)
    folder = tmp_path / "killed"
    folder.mkdir()
    run, calls = Run(folder), []

    def killed():
        calls.append(1)
        if len(calls) == at // 2:
            raise KeyboardInterrupt
        return run.norm()

    with pytest.raises(KeyboardInterrupt):
        run.train(save_steps=2, evaluate=killed)
    assert checkpoints_in(folder)[-1] == f"checkpoint-{at}"
    for _ in range(2):  # the second time nothing is missing
        Run(folder, first_step=at).train(save_steps=2)
        assert metrics(folder) == metrics(tmp_path / "plain")


@pytest.mark.parametrize(("on_save_error", "ends_at"), [("warn", 9), ("stop", 6)])
def test_a_checkpoint_that_failed_is_heard_of_at_the_next_log_line(tmp_path, on_save_error, ends_at):
    """That of step 5; the next checkpoint falls due at step 9, the next log line at step 6."""

    def happens(number):
        if number == 4:
            (tmp_path / "checkpoint-5.tmp" / "model.safetensors").mkdir(parents=True)
        while number == 5 and not run.checkpoints.failed:  # the thread may still be at it
            time.sleep(0.001)

    run = Run(tmp_path, steps=9, on_save_error=on_save_error, on_batch=happens)
    ends = pytest.raises(UserError, match="checkpoint-5 could not be written") if ends_at < 9 else nullcontext()
    with ends:
        run.train(logging_steps=2, save_steps=5)
    assert lines(tmp_path)[-1]["step"] == ends_at


def test_a_stop_whose_checkpoint_cannot_be_written_does_not_claim_one(tmp_path):
    """A file of it cannot be made: a folder is in its place."""

    def break_and_stop():
        (tmp_path / "checkpoint-2.tmp" / "model.safetensors").mkdir(parents=True)
        sigterm()

    run = Run(tmp_path, on_batch=at_batch(1, break_and_stop))
    with pytest.raises(
        UserError, match="stopped by SIGTERM at step 2, whose checkpoint could not be written"
    ) as caught:
        run.train()
    assert caught.value.exit_status == 1 and not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")]
)
def test_out_of_memory_is_one_line(tmp_path, error):
    def full(*_):
        raise error

    with pytest.raises(UserError, match="memory with 8 images at once; lower --per_device_train_batch_size to 4"):
        Run(tmp_path).train(objective=full)
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(UserError, match="in the evaluation; lower --per_device_eval_batch_size to 16"):
        Run(tmp_path / "evaluation", per_device_eval_batch_size=32).train(evaluate=full)
    (tmp_path / "drawing").mkdir()
    Run(tmp_path / "drawing").train(draw_steps=2, draw=full)  # is no reason to end a run
    assert (tmp_path / "drawing/events.jsonl").read_text().count("figures_left_out") == 2


def test_other_errors_are_not_taken_for_a_full_device(tmp_path):
    def wrong(*_):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Run(tmp_path).train(objective=wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Run(tmp_path).train(draw_steps=1, draw=wrong)
