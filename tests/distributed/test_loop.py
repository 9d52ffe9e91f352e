"""train() on two processes, in one launch."""

import pytest

from tests.runs import ROOT, launch, trajectory
from tests.test_loop import Run, checkpoints_in, metrics


@pytest.mark.slow
def test_two_processes_train_as_one_and_agree_on_what_is_due(tmp_path):
    for name in ("plain", "broken", "nan", "one"):
        (tmp_path / name).mkdir()
    found = launch([ROOT / "tests/distributed/loop_course.py"], "cpu_2proc", output_dir=tmp_path)
    assert found.returncode == 0, found.stderr
    # the course is that of one process
    Run(tmp_path / "one", ema_decay=0.5, max_grad_norm=0.5).train(save_steps=2)
    assert trajectory(tmp_path / "plain") == [pytest.approx(one, rel=1e-5) for one in trajectory(tmp_path / "one")]
    # an evaluation that broke off is made up for by both, as the main process says
    plain = metrics(tmp_path / "plain")
    assert [line["step"] for line in plain if line.get("eval_processes") == 2] == [2, 4]
    assert metrics(tmp_path / "broken") == plain and not (tmp_path / "elsewhere").exists()
    # a loss that is not finite on one of them ends both, before a checkpoint
    said = {(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(said) == 1 and "the loss is not finite at step 3, process 1" in said.pop()
    assert checkpoints_in(tmp_path / "nan") == ["checkpoint-1", "checkpoint-2"]
