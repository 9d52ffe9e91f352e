"""Steps that are not finite under the real launcher, on two processes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.broken_steps import COURSES
from tests.runs import ROOT, launch

pytestmark = pytest.mark.slow

ENGINES = [
    ("cpu_2proc", "no"),
    ("zero1", "bf16"),
    ("zero2", "no"),
    ("zero3", "no"),
    ("fsdp2", "no"),
]


@pytest.mark.parametrize(("config", "precision"), ENGINES, ids=["-".join(pair) for pair in ENGINES])
def test_steps_that_break_stop_the_run_or_are_left_out_on_all_processes(config, precision, tmp_path):
    script = [ROOT / "tests/distributed/broken_steps.py", tmp_path]
    result = launch(script, config, launcher=("--num_processes", "2", "--mixed_precision", precision))
    assert result.returncode == 0, result.stderr[-3000:]
    seen = {}
    for name in COURSES:
        one, other = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert one == other, name  # the processes agree
        assert one["partition"] == {"cpu_2proc": "ddp"}.get(config, config) and one["processes"] == 2
        seen[name] = one

    # finite losses and gradients, an update that is not
    assert seen["huge"]["error"].startswith("the weights are not finite after the steps 1 to 1; start again with")
    assert not seen["huge"]["losses"]
    # weights of 1e12 are finite; what they compute is not, or it is nonsense
    assert "error" in seen["large"] or max(seen["large"]["losses"]) > 1e6
    assert "is not finite at step 3" in seen["stop"]["error"] and "\n" not in seen["stop"]["error"]
    assert "first that of middle.bias" in seen["stop"]["error"] and len(seen["stop"]["losses"]) == 2
    assert "10 steps one after the other had to be left out" in seen["row"]["error"]
    assert seen["row"]["skipped"] == [0] + 9 * [1]

    assert seen["skip"]["skipped"] == [0, 0, 1, 0] and seen["absent"]["skipped"] == [0, 0, 0]
    (event,) = (json.loads(line) for line in (tmp_path / "skip/events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["parameter"]) == ("steps_left_out", 3, "middle.bias")
    for rank in (0, 1):
        one, other = (load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("skip", "absent"))
        assert one.keys() == other.keys() and one["steps"] == 3
        for name in one:
            assert torch.equal(one[name], other[name]) and one[name].isfinite().all(), name
