"""What pretraining on computed pictures is worth on real ones: glyphs and fractals, fine-tuned on digits, against random
weights, over some seeds.

    python benchmarks/transfer.py --output benchmarks/results/NAME.json
    python benchmarks/transfer.py --table benchmarks/results/transfer*.json

Each run is one of the recipes of recipes/demo, started as a user would; runs that are finished are kept, so that the
command goes on where it was interrupted.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reports import environment, read_report

from vit_hf.arguments import Parser
from vit_hf.errors import UserError, exit_with
from vit_hf.hub.export import write_json

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("random weights", "fractal", "glyphs")


def accuracy(script: str, recipe: str, output_dir: Path, **flags: Any) -> float:
    """Trains, unless that was done before, and returns the accuracy on the test split."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / f"run_{script}.py", "--config", ROOT / f"recipes/demo/{recipe}.yaml", *words]
    done = subprocess.run([*map(str, command), "--output_dir", str(output_dir)], cwd=ROOT)
    if done.returncode:
        raise UserError(f"{output_dir}: the run ended with status {done.returncode}")
    return json.loads((output_dir / "all_results.json").read_text())["eval_accuracy"]


def measure(folder: Path, seeds: int, per_class: list[int]) -> list[dict[str, Any]]:
    """Rows {source, per_class, accuracy of each seed}."""
    found: dict[tuple[str, int], list[float]] = {}
    for seed in range(seeds):
        for source in SOURCES:
            start: dict[str, Any] = {"preset": "vit-demo-patch8-32"}
            if source != "random weights":
                pretrained = folder / f"{source}-{seed}"
                accuracy("pretrain", f"pretrain_{source}", pretrained, seed=seed)
                start = {"model_name_or_path": pretrained}
            for number in per_class:
                subset = {"subset_per_class": number, "subset_seed": seed} if number else {}
                name = f"digits-{number or 'all'}-{source.split()[0]}-{seed}"
                result = accuracy("finetune", "finetune_digits", folder / name, seed=seed, **start, **subset)
                found.setdefault((source, number), []).append(result)
    return [{"source": source, "per_class": number, "accuracy": values} for (source, number), values in found.items()]


def table(report: dict[str, Any]) -> str:
    """A report as Markdown: mean and standard deviation over the seeds."""
    numbers = sorted({row["per_class"] for row in report["rows"]}, key=lambda number: number or 10**9)
    lines = [f"`{report['command']}`; commit {report['commit']}; {report['date'][:10]}", ""]
    lines.append(
        "| pretrained on | " + " | ".join(f"{n} a class" if n else "all 1,347 digits" for n in numbers) + " |"
    )
    lines.append("|---|" + "---:|" * len(numbers))
    cells = {(row["source"], row["per_class"]): np.array(row["accuracy"]) for row in report["rows"]}
    for source in SOURCES:
        values = [cells[source, number] for number in numbers]
        lines.append(f"| {source} | " + " | ".join(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/transfer"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per_class", default="10,50,0", help="training digits of each class, by comma; 0 is all")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of such files, and stop")
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(table(read_report(path)) for path in args.table))
        return
    report = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report["rows"] = measure(args.folder, args.seeds, [int(number) for number in args.per_class.split(",")])
    print(table(report))
    if args.output:
        write_json(report, args.output)


if __name__ == "__main__":
    exit_with(main)
