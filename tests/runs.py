"""How the tests start runs: the real scripts, in this process where that is enough, by `accelerate launch` where not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# a model and a set small enough that a step takes milliseconds; digits is real data
DEMO_DEFAULTS = dict(
    preset="vit-demo-patch8-32",
    config_overrides="hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64",
    dataset_name="digits",
    max_steps=6,
    global_batch_size=32,
    logging_steps=1,
    learning_rate=1e-3,
    warmup_steps=2,
    max_eval_samples=101,
)


def words(flags):
    """{name: value} -> ["--name", "value", ...]"""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def load_script(script):
    """The module of run_{script}.py."""
    spec = importlib.util.spec_from_file_location(f"run_{script}", ROOT / f"run_{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_process(script, **flags):
    """Runs a script's main() in this process, with a fresh Accelerator."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    argv, sys.argv = sys.argv, [f"run_{script}.py", *words(flags)]
    try:
        load_script(script).main()
    finally:
        sys.argv = argv


def python(*arguments, env=None, cwd=ROOT, timeout=300):
    """Runs Python in a process of its own with the project on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def launch(script, config, *, launcher=(), env=None, **flags):
    """`accelerate launch --config_file accelerate_configs/{config}.yaml run_{script}.py ...`"""
    target = [ROOT / f"run_{script}.py"] if script in ("pretrain", "finetune") else script
    return python(
        "-m", "accelerate.commands.launch", "--config_file", ROOT / f"accelerate_configs/{config}.yaml", *launcher,
        *target, *words(flags), env=env,
    )  # fmt: skip


def lines(output_dir, key="loss"):
    """The lines of metrics.jsonl that hold `key`."""
    every = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if key in line]


def trajectory(output_dir):
    """[(step, loss, grad_norm)]"""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(output_dir)]


def evaluation(output_dir):
    """The last evaluation, without what the clock says."""
    last = lines(output_dir, "eval_accuracy")[-1]
    return {name: value for name, value in last.items() if name != "wall_time_seconds"}


def scripts_of(output_dir):
    """{rank: process id} of the scripts that run with this output folder, under whatever launcher."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
        if ranks and str(output_dir).encode() in command:
            found[ranks[0]] = min(int(folder.name), found.get(ranks[0], 1 << 30))  # workers are forked later
    return found
