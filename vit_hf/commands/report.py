"""`vit-hf report`: finished runs side by side."""

import json
from pathlib import Path
from typing import Any

from vit_hf.arguments import Parser
from vit_hf.errors import UserError


def main(argv: list[str]) -> None:
    """Prints a table of finished runs and draws their learning curves."""
    parser = Parser(prog="vit-hf report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output_dir", type=Path, help="where learning_curves.png goes (default: beside the runs)")
    args = parser.parse_args(argv)
    from vit_hf.analysis.figures import learning_curves
    from vit_hf.training.tracking import read_jsonl

    rows, curves = [["run", "parameters", "images/s", "accuracy", "wall time"]], {}
    for run in args.runs:
        try:
            results: dict[str, Any] = json.loads((run / "all_results.json").read_text())
        except OSError:
            raise UserError(f"{run} holds no finished run (all_results.json is missing)") from None
        name = run.name if [other.name for other in args.runs].count(run.name) == 1 else str(run)
        curves[name] = read_jsonl(run / "metrics.jsonl")
        speeds = sorted(line["images_per_second"] for line in curves[name] if "images_per_second" in line)
        rows.append(
            [
                name,
                f"{results['num_parameters'] / 1e6:.2f} M",
                f"{speeds[len(speeds) // 2]:.0f}",  # the median line: the first one holds the warm-up of the machine
                f"{results['eval_accuracy']:.4f}",
                f"{results['wall_time_seconds']:.0f} s",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    folder = args.output_dir or args.runs[0].resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    learning_curves(curves).savefig(folder / "learning_curves.png", dpi=120)
    print(f"\nlearning curves: {folder / 'learning_curves.png'}")
