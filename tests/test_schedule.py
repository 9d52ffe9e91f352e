"""The arithmetic of a run at steps computed by hand."""

import math

import pytest

from vit_hf.errors import ArgumentError
from vit_hf.training.schedule import Schedule, ScheduleSettings, make_schedule, plan_batches


def schedule(kind: str = "cosine", **changes) -> Schedule:
    options = dict(num_samples=100, global_batch_size=30, total_steps=12, warmup_steps=4, learning_rate=0.8, kind=kind)
    return Schedule(**{**options, **changes})


def made(**changes) -> Schedule:
    options = dict(
        num_samples=1000, global_batch_size=64, num_train_epochs=None, max_steps=None, warmup_steps=None,
        warmup_ratio=None, learning_rate=1.0, kind="cosine",
    )  # fmt: skip
    values = {**options, **changes}
    values["lr_scheduler_type"] = values.pop("kind")
    return make_schedule(values.pop("num_samples"), ScheduleSettings(**values))


# --- learning rate ---


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(kind):
    assert [schedule(kind).learning_rate_at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_cosine_at_hand_computed_steps():
    rates = schedule("cosine").learning_rate_at
    assert rates(6) == pytest.approx(0.4 * (1 + math.sqrt(0.5)))  # a quarter of the way: cos(pi / 4)
    assert rates(8) == pytest.approx(0.4)
    assert rates(10) == pytest.approx(0.4 * (1 - math.sqrt(0.5)))
    assert rates(11) == pytest.approx(0.4 * (1 - math.cos(math.pi / 8)))  # the last step still learns
    assert rates(12) == pytest.approx(0.0)  # and the one after it would not


def test_linear_and_constant_at_hand_computed_steps():
    assert [schedule("linear").learning_rate_at(s) for s in (6, 8, 11, 12)] == pytest.approx([0.6, 0.4, 0.1, 0.0])
    assert [schedule("constant").learning_rate_at(s) for s in (6, 11)] == [0.8, 0.8]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_edges_no_warm_up_and_nothing_but_warm_up(kind):
    assert schedule(kind, warmup_steps=0).learning_rate_at(0) == 0.8
    assert schedule(kind, warmup_steps=12).learning_rate_at(11) == pytest.approx(0.8)
    assert schedule(kind, total_steps=1, warmup_steps=0).learning_rate_at(0) == 0.8


# --- length ---


@pytest.mark.parametrize(
    "changes, total, warmup",
    [
        (dict(num_train_epochs=2), 32, 0),  # 2000 / 64 = 31.25
        (dict(num_train_epochs=0.5), 8, 0),
        (dict(max_steps=5), 5, 0),
        (dict(max_steps=50, warmup_steps=7), 50, 7),
        (dict(max_steps=50, warmup_ratio=0.11), 50, 6),  # 5.5, rounded up
        (dict(max_steps=50, warmup_steps=0), 50, 0),
        (dict(num_train_epochs=3, global_batch_size=1000), 3, 0),  # divides: not one more
        (dict(max_steps=9, warmup_ratio=1.0), 9, 9),
    ],
)
def test_steps_and_warm_up_are_counted(changes, total, warmup):
    found = made(**changes)
    assert (found.total_steps, found.warmup_steps) == (total, warmup)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ArgumentError, match="--warmup_steps: 11 is longer than the run of 10 steps; take 10 or less"):
        made(max_steps=10, warmup_steps=11)


def test_epochs_after():
    assert schedule().epochs_after(10) == 3.0 and schedule().epochs_after(1) == 0.3


# --- when something is due ---


def test_the_first_step_of_an_epoch_holds_no_earlier_image():
    """100 images in batches of 30: step 3 holds the last 10 of epoch 0 and 20 of epoch 1."""
    assert [schedule().first_step_of(epoch) for epoch in range(5)] == [0, 4, 7, 10, 14]


def due(course: Schedule, every: int | None, **most: int) -> list[int]:
    cadence = course.cadence(every, **most)
    steps = [step for step in range(1, course.total_steps + 1) if cadence.is_due(step)]
    assert cadence.times == len(steps)
    return steps


def test_once_an_epoch_is_the_step_that_ends_it():
    """100 samples by 30: the epochs end within steps 4 (120), 7 (210), 10 (300 exactly), and the last step is 12."""
    assert due(schedule(), None) == [4, 7, 10, 12]


def test_epochs_shorter_than_a_batch_are_due_at_every_step():
    assert due(schedule(num_samples=20), None) == list(range(1, 13))


def test_every_so_many_steps_and_at_the_last():
    assert due(schedule(), 5) == [5, 10, 12]
    assert due(schedule(), 100) == [12]
    assert due(schedule(), 4) == [4, 8, 12]


@pytest.mark.parametrize(
    ("total_steps", "steps"),
    [
        (400, [*range(4, 401, 4)]),  # a hundred epochs: each of them
        (401, [*range(8, 401, 8), 401]),  # and a bit: every second one
        (1000, [*range(12, 1000, 12), 1000]),  # 250: every third one
    ],
)
def test_a_long_run_is_due_at_most_a_hundred_times(total_steps, steps):
    found = due(schedule(num_samples=120, total_steps=total_steps), None)
    assert found == steps and len(found) <= 100


def test_what_is_asked_for_is_done_as_often_as_that():
    assert len(due(schedule(total_steps=1000), 1)) == 1000


@pytest.mark.parametrize("samples", [7, 20, 30, 100, 101])
@pytest.mark.parametrize("most", [1, 2, 3, 10])
def test_never_more_often_than_allowed(samples, most):
    for total_steps in (1, 2, 9, 10, 11, 50, 333):
        found = due(schedule(num_samples=samples, total_steps=total_steps), None, most=most)
        assert 1 <= len(found) <= most and found[-1] == total_steps


# --- batch plan ---


@pytest.mark.parametrize(
    "arguments, micro, accumulation",
    [((128, 1, None), 128, 1), ((128, 4, None), 32, 1), ((128, 4, 8), 8, 4), ((96, 2, 64), 48, 1), ((6, 2, 1), 1, 3)],
)
def test_the_global_batch_is_cut_evenly(arguments, micro, accumulation):
    plan = plan_batches(*arguments)
    assert (plan.micro_batch_size, plan.accumulation) == (micro, accumulation)
    assert plan.num_processes * plan.micro_batch_size * plan.accumulation == plan.global_batch_size == arguments[0]


def test_the_plan_reads_as_a_product():
    assert str(plan_batches(64, 2, 8)) == "global batch 64 = 2 processes x 8 images x 4 accumulation steps"


def test_batches_that_do_not_divide_are_refused_with_what_would():
    with pytest.raises(ArgumentError, match="--global_batch_size: 100 does not divide by 3 processes.*multiple of 3"):
        plan_batches(100, 3, None)
    with pytest.raises(ArgumentError, match="--global_batch_size: 2 does not divide by 4 processes"):
        plan_batches(2, 4, None)
    with pytest.raises(
        ArgumentError, match="--per_device_train_batch_size: 7 does not divide the 20 images"
    ) as caught:
        plan_batches(40, 2, 7)
    assert str(caught.value).endswith("take one of 1, 2, 4, 5, 10, 20") and caught.value.exit_status == 2
