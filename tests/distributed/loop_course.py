"""Two processes train the two layers of tests/test_loop.py; an evaluation breaks off, a loss breaks on one of them.

accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/distributed/loop_course.py --output_dir DIR
"""

import dataclasses
import functools
import sys
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from tests.test_loop import Run
from vit_hf.errors import UserError

FLAGS = dict(ema_decay=0.5, max_grad_norm=0.5)


def agreed(run: Run) -> dict[str, float]:
    """An evaluation that all processes take part in."""
    norms = run.state.accelerator.gather(torch.tensor([run.norm()["eval_norm"]]))
    return {"eval_norm": norms.mean().item(), "eval_processes": len(norms)}


def main(folder: Path) -> None:
    run = Run(folder / "plain", **FLAGS)
    rank = run.state.accelerator.process_index
    assert run.plan.num_processes == 2
    run.train(save_steps=2, evaluate=lambda: agreed(run))

    broken = Run(folder / "broken", **FLAGS)

    def breaks_off():
        agreed(broken)
        raise KeyboardInterrupt

    try:
        broken.train(save_steps=2, evaluate=breaks_off)
    except KeyboardInterrupt:
        broken.checkpoints.wait()
    for first_step in (2, 4):  # at 2 an evaluation is missing, at 4 none is, and no step is left
        resumed = Run(folder / "broken", first_step=first_step, **FLAGS)
        if rank == 1:  # what the other processes see of the folder does not matter
            resumed.settings = dataclasses.replace(resumed.settings, output_dir=folder / "elsewhere")
        resumed.train(save_steps=2, evaluate=functools.partial(agreed, resumed))

    bad = Run(folder / "nan", **FLAGS)
    seen = []

    def objective(logits, targets):
        seen.append(1)
        return mse_loss(logits, targets) * (float("nan") if rank == 1 and len(seen) == 3 else 1)

    try:
        bad.train(objective=objective, save_steps=1)
    except UserError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--output_dir") + 1]))
