"""Weights, moments, averages and gradients of every engine against one process's: one launch an engine walks through all
of walk_partition.py."""

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import ROOT, launch, python

pytestmark = pytest.mark.slow
WALK = ROOT / "tests/distributed/walk_partition.py"
ENGINES = ["cpu_2proc", "zero1", "zero2", "zero3_offload", "fsdp2"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    result = python(WALK, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def distance(found, expected):
    """Relative to the length of a whole tensor."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_holds_and_averages_what_one_process_does(engine, one_process, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    result = launch([WALK, tmp_path], engine, launcher=("--num_processes", "2"))
    assert result.returncode == 0, result.stderr[-3000:]
    for precision in ("no", "bf16"):
        found = load_file(tmp_path / f"{precision}.safetensors")
        expected = load_file(one_process / f"{precision}.safetensors")
        assert found.keys() == expected.keys() and len(found) > 100
        # in fp32 the order of sums differs; in bf16 what is computed in 16 bits does (autocast, or 16-bit weights)
        limits = {"no": 1e-5, "bf16": 5e-2}
        for name, tensor in found.items():
            if name != "worst":
                assert torch.isfinite(tensor).all() and distance(tensor, expected[name]) < limits[precision], name
        if precision == "no" or engine != "cpu_2proc":  # under autocast no bf16 model computes the same
            assert float(found["worst"]) < 1e-6, "gradients are not added up in fp32"


def test_fsdp1_is_refused_by_the_launch(tmp_path):
    """accelerate's own FSDP1 config, which on CPU processes would train as plain DDP without a word."""
    config = (ROOT / "accelerate_configs/fsdp2.yaml").read_text().replace("fsdp_version: 2", "fsdp_version: 1")
    (tmp_path / "fsdp1.yaml").write_text(config)
    script = tmp_path / "script.py"
    script.write_text(
        "from vit_hf.errors import exit_with\nfrom vit_hf.training.accelerator import build_accelerator\n"
        "exit_with(lambda: build_accelerator(60))\n"
    )
    result = python(
        "-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp1.yaml", "--num_processes", "2", script
    )  # fmt: skip
    assert result.returncode == 1
    assert "error: fsdp_version 1 is not supported, allowed is 2" in result.stderr
