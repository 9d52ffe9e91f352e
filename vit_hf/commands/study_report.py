"""The report of a study: what each question's runs say, what they cost, and what was not run."""

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from vit_hf.analysis.comparisons import accuracy_by_category, accuracy_by_cost, accuracy_by_row
from vit_hf.analysis.document import Block, Heading, Picture, Table, write_document
from vit_hf.evaluation.main_metric import MAIN_METRICS
from vit_hf.models.summary import forward_flops
from vit_hf.study.cost import family_config, measure_speed
from vit_hf.study.plan import Cell, Study
from vit_hf.study.questions import Question, Row
from vit_hf.study.results import Estimate, Results, Verdict, accuracies, collect, estimate, judge, overall

METHOD = (
    "Accuracy of the last step on the whole evaluation split, mean over the seeds and 95 % interval (Student's t). A claim "
    "that one is better is supported where the 95 % interval of the difference (Welch) lies above its margin, contradicted "
    "where it lies below; a claim that several are equal is supported where the 90 % interval of each pair's difference lies "
    "within the bounds (two one-sided tests), contradicted where a 95 % interval lies outside; anything else is undecided. "
    "All seeds share one evaluation split, so an interval says nothing about other images (a cell of one seed is tested by its "
    "images instead); nothing is corrected for the number of tests. Quoted numbers are their sources', on other data unless they say so."
)


def write_report(study: Study, failed: dict[Cell, str], command: str) -> Path:
    """Writes OUTPUT_DIR/report/report.html, .md, its pictures, and its tables as CSV and LaTeX; returns the page."""
    results = collect(study)
    folders = {cell.name: cell.output_dir for cell in study.cells if cell.seed in results.get(cell.name, {})}
    verdicts = [[judge(test, results) for test in question.tests] for question in study.questions]
    speeds: dict[tuple[int, int], str] = {}
    blocks: list[Block] = [*_header(study, results, command), METHOD]
    if study.questions:
        blocks.append(_answers(study.questions, verdicts))
    for number, (question, outcome) in enumerate(zip(study.questions, verdicts, strict=True), 1):
        blocks += _question(number, question, outcome, results, folders, speeds)
    blocks += _not_run(study, results, failed)
    folder = study.output_dir / "report"
    for left in folder.glob("not_run.*"):  # by a report of fewer cells
        left.unlink()
    write_document(folder, "report", study.title, blocks)
    (folder / "cells.csv").write_text(_cells(study, results).csv())
    return folder / "report.html"


def _header(study: Study, results: Results, command: str) -> list[str]:
    done = [result for seeds in results.values() for result in seeds.values()]
    hours = sum(result["wall_time_seconds"] for result in done) / 3600
    flops = sum(result.get("training_flops", 0) for result in done)
    settings = [
        yaml.safe_load((cell.output_dir / "run_config.yaml").read_text())["resolved"]
        for cell in study.cells
        if cell.seed in results.get(cell.name, {})
    ]
    devices = sorted({f"{item['device']}, mixed precision {item['mixed_precision']}" for item in settings})
    versions = sorted({", ".join(f"{k} {v}" for k, v in item["versions"].items()) for item in settings})
    return [
        f"{len(done)} of {len(study.cells)} runs are finished; seeds {', '.join(map(str, study.seeds))}. "
        f"Command: {command}",
        f"Cost: {hours:.2f} hours of runs, {flops:.2e} FLOP of training. On: {'; '.join(devices)}. "
        f"Versions: {'; '.join(versions)}.",
    ]


def _answers(questions: list[Question], verdicts: list[list[Verdict]]) -> Table:
    rows = [
        [question.question, question.claim, overall(outcome) if outcome else "no test"]
        for question, outcome in zip(questions, verdicts, strict=True)
    ]
    return Table("answers", "The questions, and how many tests of each claim the data support.", ["question", "claim", "tests"], rows)  # fmt: skip


def _question(
    number: int,
    question: Question,
    verdicts: list[Verdict],
    results: Results,
    folders: dict[str, Path],
    speeds: dict[tuple[int, int], str],
) -> list[Block]:
    found = {row: estimate(accuracies(results, row.cell)) for row in question.rows}
    configs = {row: family_config(str(folders[row.cell])) for row, value in found.items() if value is not None}
    flops = {row: forward_flops(config) for row, config in configs.items()}
    blocks: list[Block] = [Heading(question.question), f"Claim: {question.claim} Source: {question.source}."]
    if configs:
        figure = _picture(question, {row: found[row] for row in configs}, flops)
        blocks.append(Picture(f"question_{number}", "Accuracy, mean and 95 % interval over the seeds.", figure))
    lines = [
        _line(row, question, found[row], flops.get(row), results.get(row.cell), configs.get(row), speeds)
        for row in found
    ]
    if lines:
        cells = [list(line.values()) for line in lines]
        blocks.append(Table(f"question_{number}", "The accuracy of each model.", list(lines[0]), cells))
    if verdicts:
        tests = [[verdict.test, verdict.result, verdict.verdict] for verdict in verdicts]
        blocks.append(Table(f"question_{number}_tests", "What is tested.", ["claim", "result", "verdict"], tests))
    return blocks


def _line(
    row: Row,
    question: Question,
    value: Estimate | None,
    flops: int | None,
    seeds: dict[int, dict[str, Any]] | None,
    config: transformers.PreTrainedConfig | None,
    speeds: dict[tuple[int, int], str],
) -> dict[str, str]:
    """The cells of a row by their columns; those of a row without runs are empty."""
    line = {"model": row.label}
    if question.places:
        line[question.x.replace("_", " ")] = row.x or ""
    line |= {"accuracy": "not run", "seeds": "", "parameters": "", "MFLOP an image": ""}
    speed = ""
    if value is not None:
        parameters = next(iter(seeds.values()))["num_parameters"]
        line |= {"accuracy": str(value), "seeds": str(len(value.values)), "parameters": f"{parameters / 1e6:.2f} M"}
        line["MFLOP an image"] = f"{flops / 1e6:.0f}"
        if question.x == "forward_flops":
            key = flops, parameters  # as many as another has: the same model
            if key not in speeds:
                speeds[key] = forward_speed(config)
            speed = speeds[key]
    if question.x == "forward_flops":
        line[f"images/s forward, {device_name()}"] = speed
    return line | {"quoted": row.quoted}


def device_name() -> str:
    """The device that writes the report, and on which the speed of a forward pass is measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"


def forward_speed(config: transformers.PreTrainedConfig) -> str:
    """Images a second, 64 at a time in fp32; nothing where that does not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return f"{measure_speed(config, device, 64, training=False):.0f}"
    except RuntimeError:  # a device that is full is no reason to lose the report
        return ""


def _picture(question: Question, known: dict[Any, Estimate], flops: dict[Any, float]) -> Any:
    if question.x == "forward_flops":
        return accuracy_by_cost({row.label: (flops[row], (v.mean, v.half_width)) for row, v in known.items()})
    if question.x is None or not all(row.x for row in known):
        return accuracy_by_row({row.label: (value.mean, value.half_width) for row, value in known.items()})
    series: dict[str, dict[str, tuple[float, float | None]]] = {}
    for row, value in known.items():
        series.setdefault(row.label, {})[row.x] = (value.mean, value.half_width)
    return accuracy_by_category(series, question.places, question.x.replace("_", " "))


def _not_run(study: Study, results: Results, failed: dict[Cell, str]) -> list[Block]:
    rest = [cell for cell in study.cells if cell.seed not in results.get(cell.name, {})]
    if not rest:
        return []
    rows = [[str(cell), failed.get(cell, "not asked for")] for cell in rest]
    return [Heading("Not run"), Table("not_run", "Runs without a result.", ["run", "why"], rows)]


def _cells(study: Study, results: Results) -> Table:
    columns = ["cell", "seed", *MAIN_METRICS, "eval_loss", "eval_samples", "train_samples", "num_parameters"]
    columns += ["images_seen", "training_flops", "wall_time_seconds", "peak_memory_bytes"]
    measured = {key for found in results.values() for result in found.values() for key in result}
    columns = [column for column in columns if column not in MAIN_METRICS or column in measured]
    rows = []
    for cell in study.cells:
        result = results.get(cell.name, {}).get(cell.seed)
        if result is not None:
            rows.append([cell.name, str(cell.seed), *(str(result.get(column, "")) for column in columns[2:])])
    return Table("cells", "Every finished run.", columns, rows)
