"""train() with a two-layer model and a list of tensors: the loop needs no dataset and no Hub."""

import json

import accelerate
import pytest
import torch

from tests.runs import lines
from vit_hf.errors import UserError
from vit_hf.training.checkpoint import TrainState
from vit_hf.training.guards import SignalGuard, StoppedBySignal
from vit_hf.training.loop import LoopSettings, train
from vit_hf.training.schedule import Schedule, plan_batches


def make(tmp_path, accumulation=1, steps=4, max_grad_norm=0.0, **settings):
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
    plan = plan_batches(8, 1, 8 // accumulation)
    accelerator.gradient_accumulation_steps = plan.accumulation
    engine, optimizer = accelerator.prepare(model, torch.optim.SGD(groups, lr=0.1))
    data = torch.randn(steps * 8, 5, generator=torch.Generator().manual_seed(1))
    batches = ({"rows": part} for part in data.split(plan.micro_batch_size))
    defaults = dict(logging_steps=1, eval_steps=2, save_steps=1000, save_total_limit=None)
    return model, data, dict(
        state=TrainState(accelerator, model, engine, optimizer), batches=batches, plan=plan,
        schedule=Schedule(num_samples=24, global_batch_size=8, total_steps=steps, warmup_steps=0, learning_rate=0.1, kind="constant"),
        settings=LoopSettings(tmp_path, {"run": {}}, 0.0, 0, max_grad_norm, **{**defaults, **settings}),
        augment=lambda batch, step, micro_step, rank: (batch["rows"][:, :4], batch["rows"][:, 4:]),
        objective=lambda model, inputs, targets: ((model(inputs) - targets) ** 2).mean(),
        evaluate=lambda: {"eval_norm": sum(p.norm().item() for p in model.parameters())},
    )  # fmt: skip


def reference(model, data, max_grad_norm=0.0):
    """The same training written out."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    course = []
    for batch in data.split(8):
        loss = ((model(batch[:, :4]) - batch[:, 4:]) ** 2).mean()
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
    model, data, parts = make(tmp_path, accumulation, max_grad_norm=max_grad_norm)
    train(**parts)
    expected_model, course = reference(model, data, max_grad_norm)
    logged = [(line["loss"], line["grad_norm"]) for line in lines(tmp_path)]
    assert logged == [pytest.approx(pair, rel=1e-5) for pair in course]
    for one, other in zip(model.parameters(), expected_model.parameters()):
        torch.testing.assert_close(one, other)


def test_a_log_line_is_the_mean_since_the_last_one(tmp_path):
    model, data, parts = make(tmp_path, logging_steps=3, steps=4)
    train(**parts)
    _, course = reference(model, data)
    losses = [loss for loss, _ in course]
    assert [line["step"] for line in lines(tmp_path)] == [3, 4]  # and always one at the last step
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx([sum(losses[:3]) / 3, losses[3]], rel=1e-5)
    assert [line["epoch"] for line in lines(tmp_path)] == [1.0, round(32 / 24, 4)]


def test_mfu_is_logged_where_the_peak_is_known(tmp_path):
    _, _, parts = make(tmp_path, steps=1)
    train(**parts, mfu_scale=0.5)
    (line,) = lines(tmp_path)
    assert line["mfu"] == 0.5 * line["images_per_second"]


def test_both_kinds_of_lines_say_what_the_run_has_cost(tmp_path):
    """Images and operations are functions of the step; a batch has 8 images."""
    _, _, parts = make(tmp_path, steps=4)
    train(**parts, training_flops_per_image=5.0)
    for key, steps in (("loss", [1, 2, 3, 4]), ("eval_norm", [2, 4])):
        found = lines(tmp_path, key)
        assert [line["images_seen"] for line in found] == [8 * step for step in steps]
        assert [line["training_flops"] for line in found] == [40.0 * step for step in steps]
    clock = [json.loads(line)["wall_time_seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert clock == sorted(clock)


def test_operations_are_left_out_where_they_are_not_known(tmp_path):
    _, _, parts = make(tmp_path, steps=1)
    train(**parts)
    assert not lines(tmp_path, "training_flops") and lines(tmp_path, "images_seen")


def test_evaluation_and_checkpoint_come_once_an_epoch_and_at_the_end(tmp_path):
    _, _, parts = make(tmp_path, steps=7, eval_steps=None, save_steps=None)
    train(**parts)
    assert [line["step"] for line in lines(tmp_path, "eval_norm")] == [3, 6, 7]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-7",
    ]


def test_a_loss_that_is_not_finite_names_the_steps(tmp_path):
    _, _, parts = make(tmp_path, logging_steps=2, save_steps=1000)
    objective = parts["objective"]
    seen = []

    def breaks(model, inputs, targets):
        seen.append(1)
        return objective(model, inputs, targets) * (float("nan") if len(seen) == 3 else 1)

    with pytest.raises(UserError, match="the loss is nan between steps 3 and 4"):
        train(**{**parts, "objective": breaks})
    assert not list(tmp_path.glob("checkpoint-*"))


def test_gradients_that_are_not_finite_are_seen_before_the_checkpoint(tmp_path):
    """The loss of the step is finite still; the weights after it are not."""
    _, _, parts = make(tmp_path, save_steps=2)
    objective = parts["objective"]
    seen = []

    def breaks(model, inputs, targets):
        seen.append(1)
        loss = objective(model, inputs, targets)
        return loss + (loss - loss.detach()).sqrt() if len(seen) == 4 else loss  # d sqrt(0) is infinite

    with pytest.raises(UserError, match="the gradient norm is (nan|inf)"):
        train(**{**parts, "objective": breaks})
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert '"not_finite"' in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize(("at", "evaluated", "stopped"), [(2, [2, 4], True), (3, [2, 4], True), (4, [2, 4], False)])
def test_a_stop_loses_no_evaluation(tmp_path, monkeypatch, at, evaluated, stopped):
    """Stopped at a step that evaluates, at one that does not, and at the last step, which is simply the end."""
    monkeypatch.setattr(SignalGuard, "stop_asked", lambda self, steps: steps == at)
    _, _, parts = make(tmp_path)
    if stopped:
        with pytest.raises(StoppedBySignal, match=f"checkpoint-{at}"):
            train(**parts)
        monkeypatch.undo()
        _, _, parts = make(tmp_path)
        for _ in range(at):
            next(parts["batches"])
        train(**parts, first_step=at)
    else:
        train(**parts)
    assert [line["step"] for line in lines(tmp_path, "eval_norm")] == evaluated


def test_out_of_memory_is_one_line(tmp_path):
    _, _, parts = make(tmp_path)

    def full(*_):
        raise torch.OutOfMemoryError

    with pytest.raises(
        UserError, match="out of device memory with 8 images at once; lower --per_device_train_batch_size"
    ):
        train(**{**parts, "objective": full})
    _, _, parts = make(tmp_path / "evaluation")
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(UserError, match="in the evaluation; lower --per_device_eval_batch_size"):
        train(**{**parts, "evaluate": full})
