"""Steps that break on two processes: each course of `COURSES` in turn, in one launch. Every process writes what it saw to
FOLDER/COURSE-RANK.json and, of the courses that end, all that a step changes to FOLDER/COURSE-RANK.safetensors.

    accelerate launch ... broken_steps.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vit_hf.errors import UserError
from vit_hf.training.accelerator import build_accelerator, end
from vit_hf.training.nonfinite import NonFinite
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import plan_batches
from vit_hf.training.state import prepare

STEPS = 4
BREAKS = 2  # the step whose gradient breaks, in one bias on the last process
# name: mode, learning rate, steps that break, steps that are absent
COURSES = {
    "huge": ("stop", 1e39, [], []),
    "large": ("stop", 1e12, [], []),
    "stop": ("stop", 0.01, [BREAKS], []),
    "skip": ("skip", 0.01, [BREAKS], []),
    "absent": ("skip", 0.01, [], [BREAKS]),
    "row": ("skip", 0.01, list(range(1, 11)), []),
}


class Hurt(torch.autograd.Function):
    """Gives what it is given; multiplies its gradient."""

    @staticmethod
    def forward(context, tensor, factor):
        context.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


class Layer(nn.Linear):
    factor = 1.0

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight, Hurt.apply(self.bias, self.factor))


class Model(nn.Module):
    _no_split_modules = ["Layer"]

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Layer(4, 8), Layer(8, 8), Layer(8, 3)

    def forward(self, pixel_values):
        return self.last(self.middle(self.first(pixel_values).tanh()).tanh())


def course(name, folder):
    mode, learning_rate, breaks, absent = COURSES[name]
    accelerator = build_accelerator(60)
    rank = accelerator.process_index
    torch.manual_seed(0)
    model = Model()
    state = prepare(
        accelerator, model, plan_batches(8, 2, 4), max_grad_norm=1.0, ema_decay=0.9,
        optimizer=OptimizerSettings("adamw", learning_rate, weight_decay=0.1),
    )  # fmt: skip
    output_dir = folder / name
    output_dir.mkdir(exist_ok=True)
    watch = NonFinite(state, mode, output_dir, accumulation=1, learning_rate=learning_rate)
    dtype = {"bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    dtype = dtype if state.partition.name.startswith("zero") else torch.float32
    seen = {"partition": state.partition.name, "processes": accelerator.num_processes, "skipped": [], "losses": []}
    try:
        for step in range(max(STEPS, len(breaks) + 1)):
            generator = torch.Generator().manual_seed(100 * step + rank)
            inputs, classes = torch.randn(4, 4, generator=generator), torch.randint(3, (4,), generator=generator)
            if step in absent:
                continue
            model.middle.factor = float("nan") if step in breaks and rank == 1 else 1.0
            accelerator.sync_gradients = True
            loss = nn.functional.cross_entropy(state.engine(inputs.to(dtype)).float(), classes)
            accelerator.backward(loss)
            watch.saw(loss)
            left_out = watch.before_step(state.partition.clip(1.0))
            state.optimizer.step()
            state.optimizer.zero_grad()
            watch.after_step()
            state.ema.update(left_out)
            window = watch.look(accelerator.gather(watch.numbers()[None]).tolist())
            seen["skipped"].append(window.skipped_steps)
            seen["losses"].append(window.loss)
    except UserError as error:
        seen["error"] = str(error)
    else:
        save_file(everything(state), folder / f"{name}-{rank}.safetensors")
    (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))
    accelerator.wait_for_everyone()
    return accelerator


def everything(state):
    partition, found = state.partition, {}
    for name in partition.parameter_names():
        found[name] = partition.full_weight(name).clone()
        for key in partition.moment_keys():
            found[f"{key}.{name}"] = partition.full_moment(name, key).clone()
    found["steps"] = torch.tensor(partition.optimizer_steps())
    with state.ema.in_place():
        for name in partition.parameter_names():
            found[f"average.{name}"] = partition.full_weight(name).clone()
    return found


if __name__ == "__main__":
    for name in COURSES:
        accelerator = course(name, Path(sys.argv[1]))
    end(accelerator)
