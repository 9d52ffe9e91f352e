"""Steps that are not finite, on one process: stopped before a save, or left out to the bit; spikes of the loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from tests.runs import lines
from vit_hf.errors import UserError
from vit_hf.training.accelerator import build_accelerator
from vit_hf.training.nonfinite import FOLD, LONGEST_ROW, NonFinite
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import plan_batches
from vit_hf.training.spikes import LEAST_HISTORY, Spikes
from vit_hf.training.state import prepare

NAN = float("nan")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, pixel_values):
        return self.last(self.norm(self.first(pixel_values)).tanh())


def batches(number, seed=1):
    """[(inputs (8, 4), classes (8,))]"""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(number)
    ]


class Run:
    """The loop, written out: one micro-step after the other, a log line every `logging_steps`."""

    def __init__(self, folder, mode="skip", optim="adamw", accumulation=1, first_step=0, **settings):
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        torch.manual_seed(0)
        self.model, self.accumulation, self.folder = Small(), accumulation, Path(folder)
        self.folder.mkdir(exist_ok=True)
        settings = {"learning_rate": 0.01, **settings}
        self.state = prepare(
            build_accelerator(60), self.model, plan_batches(8 * accumulation, 1, 8), max_grad_norm=1.0, ema_decay=0.9,
            optimizer=OptimizerSettings(optim, settings["learning_rate"], weight_decay=0.1),
        )  # fmt: skip
        self.watch = NonFinite(
            self.state, mode, self.folder, accumulation=accumulation, first_step=first_step, **settings
        )
        self.windows = []

    def train(self, data, broken=(), logging_steps=1, hurt="input"):
        """`broken`: numbers of the micro-steps that are hurt."""
        accelerator, loss_of = self.state.accelerator, nn.CrossEntropyLoss()
        for number, (inputs, classes) in enumerate(data):
            accelerator.sync_gradients = (number + 1) % self.accumulation == 0
            if number in broken and hurt == "input":
                inputs = inputs * NAN
            loss = loss_of(self.state.engine(inputs), classes)
            if number in broken and hurt == "gradient":
                hook = self.model.norm.bias.register_hook(lambda gradient: gradient * NAN)
            accelerator.backward(loss)
            if number in broken and hurt == "gradient":
                hook.remove()
            self.watch.saw(loss)
            if not accelerator.sync_gradients:
                continue
            left_out = self.watch.before_step(self.state.partition.clip(1.0))
            self.state.optimizer.step()
            self.state.optimizer.zero_grad()
            self.watch.after_step()
            self.state.ema.update(left_out)
            if (number + 1) % (logging_steps * self.accumulation) == 0:
                self.look()
        return self

    def look(self):
        rows = self.state.accelerator.gather(self.watch.numbers()[None]).tolist()
        self.windows.append(self.watch.look(rows))

    def everything(self):
        """All that a step changes, by name."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, kept in self.state.optimizer.optimizer.state.items():
            found |= {f"{names[id(parameter)]}.{key}": value for key, value in kept.items() if value is not None}
        with self.state.ema.in_place():
            averages = {f"average.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        return {name: tensor.clone() for name, tensor in {**found, **averages}.items()}

    def events(self):
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
        assert one[name].isfinite().all(), name


@pytest.mark.parametrize("hurt", ["input", "gradient"])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_run_with_broken_batches_is_the_run_without_them_to_the_bit(tmp_path, optim, hurt):
    """Weights, moments, step count, average and BatchNorm's statistics; the first step is among the broken ones."""
    data, broken = batches(12), (0, 3, 4, 11)
    run = Run(tmp_path, optim=optim).train(data, broken, logging_steps=4, hurt=hurt)
    without = [batch for number, batch in enumerate(data) if number not in broken]
    same(run.everything(), Run(tmp_path / "other", optim=optim).train(without, logging_steps=4).everything())
    assert [window.skipped_steps for window in run.windows] == [2, 1, 1]


def test_skip_takes_the_course_of_stop_where_nothing_is_broken(tmp_path):
    one = Run(tmp_path, "skip").train(batches(6))
    other = Run(tmp_path, "stop").train(batches(6))
    same(one.everything(), other.everything())
    assert one.windows == other.windows and not one.events()


def test_a_broken_micro_step_takes_its_whole_step_along(tmp_path):
    data = batches(12)
    run = Run(tmp_path, accumulation=2).train(data, broken=(5,), logging_steps=3)
    without = data[:4] + data[6:]
    same(run.everything(), Run(tmp_path / "other", accumulation=2).train(without, logging_steps=5).everything())
    (event,) = run.events()
    expected = {"event": "steps_left_out", "step": 3, "micro_step": 1, "process": 0, "skipped": 1}
    assert event.items() >= expected.items() and event["parameter"] == "last.bias"


def test_the_loss_of_a_window_is_the_mean_of_the_finite_ones(tmp_path):
    data = batches(4)
    run = Run(tmp_path).train(data, broken=(2,), logging_steps=4)
    whole = Run(tmp_path / "other").train([batch for n, batch in enumerate(data) if n != 2], logging_steps=3)
    assert run.windows[0].loss == pytest.approx(whole.windows[0].loss, rel=1e-6)


def test_the_event_names_the_first_gradient_in_the_order_of_the_backward_pass(tmp_path):
    """The loss is finite; the gradient breaks at one bias, in the second broken step at others: the first one counts."""
    run = Run(tmp_path).train(batches(6), broken=(2, 4), logging_steps=6, hurt="gradient")
    (event,) = run.events()
    assert {key: event[key] for key in ("event", "step", "skipped", "parameter")} == {
        "event": "steps_left_out", "step": 3, "skipped": 2, "parameter": "norm.bias",
    }  # fmt: skip
    assert "micro_step" not in event


@pytest.mark.parametrize("logging_steps", [1, 4, 7, LONGEST_ROW])
def test_ten_in_a_row_end_the_run_wherever_the_log_lines_fall(tmp_path, logging_steps):
    first = 3
    number = math.ceil((first + LONGEST_ROW) / logging_steps) * logging_steps
    row = range(first, first + LONGEST_ROW)
    Run(tmp_path / "short").train(batches(number), [step for step in row if step != first + 5], logging_steps)
    with pytest.raises(UserError, match="^1[0-3] steps one after the other had to be left out"):
        Run(tmp_path).train(batches(number), row, logging_steps)


def test_long_windows_are_summed_up_as_they_go(tmp_path):
    """A window longer than what is kept apart, with a row of broken steps over the seam."""
    broken = range(FOLD - 4, FOLD + 5)
    run = Run(tmp_path, accumulation=1).train(batches(FOLD + 20), broken, logging_steps=FOLD + 20)
    assert run.windows[0].skipped_steps == len(broken) and run.events()[0]["step"] == FOLD - 3
    with pytest.raises(UserError, match="10 steps one after the other"):
        Run(tmp_path).train(batches(FOLD + 20), range(FOLD - 5, FOLD + 5), logging_steps=FOLD + 20)


@pytest.mark.parametrize(("hurt", "what"), [("input", "loss"), ("gradient", "gradient")])
def test_stop_names_step_window_checkpoint_and_the_command_that_mends(tmp_path, hurt, what):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for name in ("checkpoint-4.tmp", "checkpoint-3.aside", "checkpoint-3.aside1"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        Run(tmp_path, "stop", learning_rate=3e-3).train(batches(6), broken=(4,), logging_steps=2, hurt=hurt)
    message = str(caught.value)
    assert message.startswith(f"the {what} is not finite at step 5")
    assert "(looked at after the steps 5 to 6)" in message and "\n" not in message
    assert f"--change learning_rate --learning_rate 0.001 --resume_from_checkpoint {tmp_path}/checkpoint-4;" in message
    (event,) = Run.events(type("", (), {"folder": tmp_path}))
    assert event["event"] == "not_finite" and event["step"] == 5


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_an_update_that_is_not_finite_stops_in_either_mode(tmp_path, mode):
    """The loss and the gradients of step 1 are finite; its update is not."""
    with pytest.raises(UserError, match="the weights are not finite after the steps 1 to 1; start again with"):
        Run(tmp_path, mode, learning_rate=1e39).train(batches(1))


def test_statistics_that_are_not_finite_are_not_saved(tmp_path):
    run = Run(tmp_path, "stop").train(batches(1))
    run.model.norm.running_var[3] = float("inf")
    with pytest.raises(UserError, match="the weights are not finite"):
        run.train(batches(1))


def test_a_step_does_not_wait_for_the_device(tmp_path):
    """On a device that has no values to give, everything up to the log line goes through."""
    run = Run(tmp_path)
    run.train(batches(2))  # the optimizer's state is there
    asked = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), kwargs=None):
            if getattr(function, "__name__", "") in (
                "item",
                "tolist",
                "__bool__",
                "__float__",
                "__int__",
                "cpu",
                "numpy",
            ):
                asked.append(function)
            return function(*arguments, **(kwargs or {}))

    with Watch():
        run.train(batches(3), broken=(1,), logging_steps=100)
        assert not asked
        run.look()
    assert asked and run.windows[-1].skipped_steps == 1


def test_spikes_are_told_and_nothing_more(tmp_path):
    spikes = Spikes(10.0)
    losses = [1 + 0.01 * (step % 5) for step in range(LEAST_HISTORY)]
    assert not any(spikes.look(loss) for loss in losses)
    assert spikes.look(1.05) is None  # usual
    told = spikes.look(2.0)
    assert told["loss"] == 2.0 and told["median"] == pytest.approx(1.02) and told["deviations"] > 10
    assert spikes.look(NAN) is None and spikes.look(0.1) is None  # falling is no spike
    assert Spikes(0.0).look(1e9) is None
    learnt = Spikes(10.0)
    assert not any(learnt.look(0.0) for _ in losses) and learnt.look(0.5)["loss"] == 0.5
    early = Spikes(10.0)
    assert (
        not any(early.look(loss) for loss in losses[:-1]) and early.look(99.0) is None
    )  # too little to hold it against


def test_a_spike_is_an_event_of_the_run(tmp_path):
    run = Run(tmp_path, "stop", spike_threshold=10.0).train(batches(LEAST_HISTORY + 5))
    assert not run.events()
    run.train([(inputs * 1e4, classes) for inputs, classes in batches(1)])
    run.model.last.weight.data.mul_(1e3)
    run.train(batches(1))
    (event,) = run.events()
    assert event["event"] == "loss_spike" and event["step"] == LEAST_HISTORY + 7


def test_a_run_that_broke_leaves_no_checkpoint_and_is_mended_by_the_command_that_it_names(run, tmp_path):
    """--learning_rate 1e39: step 1's loss and gradients are finite, its update is not."""
    flags = dict(save_steps=1, save_total_limit=9)
    with pytest.raises(UserError, match="the weights are not finite after the steps 1 to 1; start again with"):
        run("pretrain", learning_rate=1e39, **flags)
    assert not list((tmp_path / "run").glob("checkpoint-*"))

    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    broken = dict(change="learning_rate", resume_from_checkpoint=whole / "checkpoint-2")
    with pytest.raises(UserError) as caught:
        run("pretrain", output_dir=whole, learning_rate=1e39, **broken, **flags)
    mend = str(caught.value).split("go on with ")[1].split(";")[0].split()
    words = dict(zip(mend[::2], mend[1::2], strict=True))
    assert words.pop("--learning_rate") == "3.3e+38"  # a third; here that does not do
    assert words == {"--change": "learning_rate", "--resume_from_checkpoint": str(whole / "checkpoint-2")}
    run(
        "pretrain", output_dir=whole, learning_rate=1e-4, **{name[2:]: value for name, value in words.items()}, **flags
    )
    assert (whole / "checkpoint-6").exists() and lines(whole)[-1]["step"] == 6


def test_the_log_line_counts_the_steps_left_out(run, monkeypatch):
    from vit_hf.training import partition

    real, steps = partition.Whole.clip, []

    def breaks(self, max_grad_norm):
        steps.append(1)
        norm = real(self, max_grad_norm)
        return norm * NAN if len(steps) in (2, 3) else norm

    monkeypatch.setattr(partition.Whole, "clip", breaks)
    folder = run("pretrain", on_nonfinite="skip", logging_steps=2, ema_decay=0.9)
    assert [line["skipped_steps"] for line in lines(folder)] == [1, 1, 0]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "steps_left_out"] == [2, 3]
