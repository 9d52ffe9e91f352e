"""`vit-hf bench`: that the numbers are there and fit together, never what the clock says."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from vit_hf.cli import dispatch
from vit_hf.commands.bench import too_few
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation.speed import ROUNDS, Subject, Variant, measure_in_turns, summary, variants_of

CPU = torch.device("cpu")


def linear(width: int = 64, **options) -> Subject:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU(), nn.Linear(width, 10))
    return Subject("linear", model, Variant("fp32", torch.float32), (3, 8, 8), CPU, **options)


class Choosy(nn.Module):
    """Knows no bfloat16, and no more than four images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        if images.dtype == torch.bfloat16:
            raise TypeError("no kernel for bfloat16")
        if len(images) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return images * self.weight


def test_a_subject_has_all_its_numbers():
    subject = linear()
    measure_in_turns([subject], 0.0, [1, 4], say=lambda line: None)
    found = summary(subject)
    assert found["failed"] is None and 0 < found["latency_p50_ms"] <= found["latency_p95_ms"]
    assert found["latency_runs"] == 2 * ROUNDS and found["best_batch_size"] in (1, 4)
    assert found["images_per_second"] == np.median(found["rounds"]["images_per_second"]) > 0
    assert set(found["images_per_second_by_batch_size"]) == {"1", "4"} and found["search_ended"] == "last"
    assert len(found["rounds"]["latency_p50_ms"]) == ROUNDS


def test_memory_is_that_of_the_allocator():
    """Weights, the images, and the two largest tensors that live at once: of a hidden layer before and after its ReLU."""
    subject = linear(width=1000)
    subject.prepare()
    subject.measure_memory(16)
    weights = 4 * (192 * 1000 + 1000 + 1000 * 10 + 10)
    assert subject.peak_bytes[16] == pytest.approx(weights + 16 * 192 * 4 + 2 * 16 * 1000 * 4, rel=0.02)


def test_what_cannot_be_run_is_told_and_the_others_go_on():
    whole = Subject("choosy", Choosy(), Variant("fp32", torch.float32), (3, 8, 8), CPU)
    half = Subject("choosy", Choosy(), Variant("bf16", torch.bfloat16), (3, 8, 8), CPU)
    measure_in_turns([half, whole], 0.2, say=lambda line: None)
    assert summary(half) == {"variant": "bf16", "failed": "TypeError: no kernel for bfloat16"}
    found = summary(whole)
    assert found["search_ended"] in ("memory", "fell", "time") and found["best_batch_size"] <= 4


def test_a_compiled_model_takes_the_batch_size_of_the_same_model():
    eager = linear()
    compiled = Subject("linear", eager.model, Variant("fp32 compiled", torch.float32, True), (3, 8, 8), CPU)
    compiled.prepare = lambda: setattr(compiled, "run", torch.compile(eager.model, backend="eager", dynamic=False))
    measure_in_turns([eager, compiled], 0.05, say=lambda line: None)
    assert (
        set(compiled.by_batch_size) == {1, eager.best_batch_size} and summary(compiled)["search_ended"] == "followed"
    )


def test_variants_of_a_cpu_and_a_gpu():
    names = [variant.name for variant in variants_of(CPU)]
    assert names == ["fp32", "fp32 compiled", "bf16"]
    on_gpu = [variant.name for variant in variants_of(torch.device("cuda"))]
    assert set(on_gpu) == {*names, "bf16 compiled", "fp16"}


def test_what_was_run_too_seldom_is_noted():
    rows = [
        {"model": "m", "variant": name, "failed": None, "latency_runs": runs} for name, runs in (("a", 40), ("b", 12))
    ]
    failed = {"model": "m", "variant": "c", "failed": "no compiler"}
    assert too_few([rows[0], failed]) == ""
    said = too_few([*rows, failed])
    assert said.startswith("note: 1 of 3 lines") and "(m, b: 12)" in said and "--seconds" in said and "\n" not in said


@pytest.mark.slow
def test_the_command_on_presets_and_a_folder(tmp_path, capsys):
    """On a machine without a compiler: that variant is a line of the table, the others are measured."""
    from vit_hf.models.presets import from_preset

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    from_preset("vit-demo-patch8-32", ["a", "b"], small).save_pretrained(tmp_path / "small")
    broken = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False})
    words = ["--seconds", "0.05", "--image_size", "16", "--batch_sizes", "2,1", "--output_dir", str(tmp_path / "out")]
    with broken:
        dispatch(["bench", str(tmp_path / "small"), "vit-demo-patch8-32", *words])
    report = json.loads((tmp_path / "out/bench.json").read_text())
    shown = capsys.readouterr().out
    assert [(row["model"], row["variant"]) for row in report["rows"]] == [
        (name, variant)
        for name in (str(tmp_path / "small"), "vit-demo-patch8-32")
        for variant in ("fp32", "fp32 compiled", "bf16")
    ]
    for row in report["rows"]:
        assert row["parameters"] > 0 and row["gflops"] > 0 and row["image_size"] in (16, [16, 16])
        if row["variant"] == "fp32 compiled":
            assert row["failed"] and f"failed: {row['failed'].replace('|', ' ')}" in shown
        else:
            assert row["failed"] is None and row["latency_p50_ms"] <= row["latency_p95_ms"]
            assert set(row["images_per_second_by_batch_size"]) == {"1", "2"}
            assert f"{row['images_per_second']:,.4g}" in shown
    assert ("lines have fewer than 20 timed runs" in shown) == any(
        row.get("latency_runs", 20) < 20 for row in report["rows"]
    )
    small, demo = report["rows"][0], report["rows"][3]
    assert small["parameters"] < demo["parameters"] and small["gflops"] < demo["gflops"]
    assert int(demo["peak_memory_bytes"]["1"]) > 4 * demo["parameters"]
    assert {"command", "commit", "date", "device", "threads", "versions"} <= set(report)
    assert (tmp_path / "out/bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, error, message",
    [
        (["vit-dem"], UserError, "vit-dem"),
        (["vit-demo-patch8-32", "--batch_sizes", "1,x"], ArgumentError, "--batch_sizes: '1,x' is no list of numbers"),
        (["vit-demo-patch8-32", "--image_size", "33"], ArgumentError, "vit-demo-patch8-32: .*33"),
    ],
)
def test_wrong_words_are_one_line(words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        dispatch(["bench", *words, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
