"""`vit-hf report`: runs side by side, from their metrics.jsonl alone; what else a run left behind is optional."""

import json
import re
from pathlib import Path
from typing import Any

from vit_hf.arguments import Parser
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation.main_metric import MAIN_METRICS, main_metric

COLUMNS = [
    "run", "model", "parameters", "steps", "images seen", "accuracy", "95 % interval", "loss", "images/s", "wall time",
    "training FLOPs", "peak memory",
]  # fmt: skip
CAPTION = (
    "The last values of each run; nothing is selected on the evaluation split. accuracy: top-1 and the number of "
    "evaluation images; 95 % interval: Wilson's, over those images; loss: training loss; images/s: the median of the logged lines; training FLOPs: 3 x those of the model's forward "
    "pass for each image seen; peak memory: of the main process, on its accelerator where it uses one."
)


def main(argv: list[str]) -> None:
    """Puts runs side by side, finished or not: prints a table, and writes it with the curves as HTML, Markdown, CSV,
    LaTeX and PNG. A run needs no other file than its metrics.jsonl."""
    parser = Parser(prog="vit-hf report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument(
        "--output_dir", type=Path, help="where the report goes (default: report, beside the first run)"
    )
    args = parser.parse_args(argv)
    folder = args.output_dir or args.runs[0].resolve().parent / "report"
    check_report(folder)
    runs, notes = read_runs(args.runs)
    from vit_hf.analysis.curves import curves_csv
    from vit_hf.analysis.document import Heading, Table, write_document

    rows = [row(name, lines, read_extras(path)) for path, (name, lines) in runs.items()]
    table = Table("runs", CAPTION, COLUMNS, rows)
    curves = dict(runs.values())
    pictures, missing = draw(curves)
    notes += missing
    blocks = [table, *(f"Note: {note}." for note in notes), Heading("Curves"), *pictures]
    write_document(folder, "report", "Runs side by side", blocks)
    (folder / "curves.csv").write_text(curves_csv(curves))
    print(table.markdown())
    print("".join(f"\nnote: {note}" for note in notes))
    print(f"report: {folder / 'report.html'} (beside it report.md, runs.csv, runs.tex, curves.csv and the PNGs)")


def check_report(folder: Path) -> None:
    """Raises UserError for a folder that cannot take the report."""
    check_folder(folder)
    if (folder / "metrics.jsonl").exists():
        raise UserError(
            f"--output_dir: {folder} is a run's own folder, whose curves would be overwritten; name another"
        )


def read_runs(paths: list[Path]) -> tuple[dict[Path, tuple[str, list[dict[str, Any]]]], list[str]]:
    """The runs that have lines, as {folder: (name, lines)}, and notes on what could not be read.

    Raises:
        ArgumentError: a run is named twice.
        UserError: a folder holds no metrics.jsonl, or none of them has a line.
    """
    resolved = [path.resolve() for path in paths]
    runs, notes = {}, []
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise ArgumentError(f"{path} is named {resolved.count(real)} times; name each run once")
        name = real.name if [other.name for other in resolved].count(real.name) == 1 else str(path)
        lines, read, held = read_lines(path)
        if read < held:
            notes.append(f"{name}: {held - read} of {held} lines in metrics.jsonl are damaged and left out")
        if lines:
            runs[path] = name, lines
        else:
            notes.append(f"{name}: metrics.jsonl has no line yet; it is left out")
    if not runs:
        raise UserError(f"nothing to report: metrics.jsonl has no line yet in {', '.join(map(str, paths))}")
    return runs, notes


def read_lines(run: Path) -> tuple[list[dict[str, Any]], int, int]:
    """The lines of a run; how many could be read, and how many there are: a last one that is cut off is being written,
    or was when the run was killed, and does not count.

    Raises:
        UserError: there is no metrics.jsonl, or it is not text.
    """
    from vit_hf.training.tracking import read_jsonl

    path = run / "metrics.jsonl"
    if not path.is_file():
        found = "holds no metrics.jsonl" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise UserError(f"{run} {found}; name the output folder of a run")
    try:
        lines, text = read_jsonl(path), path.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; name the output folder of a run") from None
    held = len(text.splitlines()) - (not text.endswith("\n"))
    return [line for line in lines if isinstance(line, dict) and "step" in line], len(lines), held


def read_extras(run: Path) -> dict[str, Any]:
    """What other files of a run add to its row, where they are there and whole: `model`, `num_parameters`,
    `total_steps`, `wall_time_seconds`."""
    import yaml

    extras = {}
    try:
        config = yaml.safe_load((run / "run_config.yaml").read_text())
        extras = {key: config["resolved"][key] for key in ("num_parameters", "total_steps")}
        extras["model"] = config["preset"] or Path(config["model_name_or_path"]).name
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass
    try:
        results = json.loads((run / "all_results.json").read_text())
        extras |= {key: results[key] for key in ("num_parameters", "wall_time_seconds")}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return extras


def row(name: str, lines: list[dict[str, Any]], extras: dict[str, Any]) -> list[str]:
    """The cells of a run under COLUMNS; "-" for what is not known."""
    last = {**extras, **{key: value for line in lines for key, value in line.items() if value is not None}}
    steps, total = last["step"], last.get("total_steps")
    speeds = sorted(values(lines, "images_per_second"))
    return [
        name,
        last.get("model", "-"),
        cell(last.get("num_parameters"), lambda count: f"{count / 1e6:.2f} M"),
        f"{steps:,}" if total in (None, steps) else f"{steps:,} of {total:,}",
        cell(last.get("images_seen"), "{:,}".format),
        accuracy(lines, steps),
        accuracy_interval(lines),
        cell(last.get("loss"), "{:.4g}".format),
        # the median line: the first one holds the warm-up of the machine
        cell(speeds[len(speeds) // 2] if speeds else None, "{:.0f}".format),
        cell(last.get("wall_time_seconds"), duration),
        cell(last.get("training_flops"), lambda flops: re.sub(r"e\+0?", "e", f"{flops:.3g}")),
        cell(max(values(lines, "peak_memory_bytes"), default=None), lambda size: f"{size / 2**30:.2f} GiB"),
    ]


def accuracy(lines: list[dict[str, Any]], steps: int) -> str:
    """The last one, with the number of images, and the step where the run has gone on since."""
    evaluated = [line for line in lines if main_metric(line)]
    if not evaluated:
        return "-"
    line = evaluated[-1]
    details = [f"{line['eval_samples']:,} images"] if "eval_samples" in line else []
    details += [f"step {line['step']:,}"] if line["step"] != steps else []
    main = main_metric(line)
    details = details if main == "eval_accuracy" else [MAIN_METRICS[main], *details]
    return f"{line[main]:.4f}" + (f" ({', '.join(details)})" if details else "")


def accuracy_interval(lines: list[dict[str, Any]]) -> str:
    """Of the last accuracy, over other images of the same kind. Source: Wilson 1927; it does not leave [0, 1]."""
    from scipy import stats

    evaluated = [line for line in lines if line.get("eval_accuracy") is not None]
    samples = evaluated[-1].get("eval_samples") if evaluated else None
    if not samples:
        return "-"
    found = stats.binomtest(round(evaluated[-1]["eval_accuracy"] * samples), samples)
    low, high = found.proportion_ci(0.95, method="wilson")
    return f"{low:.4f} to {high:.4f}"


def values(lines: list[dict[str, Any]], key: str) -> list[float]:
    """What the lines hold under a key; those that do not, or whose value was not finite, are passed over."""
    return [line[key] for line in lines if line.get(key) is not None]


def cell(value: Any, text) -> str:
    """The value as text, "-" for None."""
    return "-" if value is None else text(value)


def duration(seconds: float) -> str:
    """`47 s`, `12.3 min`, `3.41 h`, `8.1 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def draw(runs: dict[str, list[dict[str, Any]]]) -> tuple[list[Any], list[str]]:
    """The pictures that at least one run has points for, and notes on the runs that are not in all of them."""
    from vit_hf.analysis import curves
    from vit_hf.analysis.document import Picture

    pictures = [
        Picture(name, caption, curves.draw_curves(runs, panels))
        for name, caption, panels in (
            ("learning_curves", "Training loss (mean since the last line) and evaluation accuracy.", curves.LEARNING),
            ("optimisation", "Learning rate, and gradient norm before clipping.", curves.OPTIMISATION),
            ("throughput", "Global images a second, and what the run waited for its data, over training time alone.",
             curves.THROUGHPUT + curves.UTILISATION),
            ("accuracy", "Evaluation accuracy against what it cost: images seen; operations, 3 x those of the forward "
             "pass for each image; hours since the start, evaluations and earlier starts included.", curves.ACCURACY),
        )
        if curves.drawable(runs, panels)
    ]  # fmt: skip
    required = curves.LEARNING + curves.OPTIMISATION + curves.THROUGHPUT + curves.ACCURACY
    notes = []
    for name, lines in runs.items():
        if missing := curves.missing_keys(lines, required):
            notes.append(f"{name}: no line holds {', '.join(missing)}; it is left out of the curves that need it")
    return pictures, notes
