"""The end of a run: its output folder becomes a model repository, with weights, curves, card and results."""

import json
import time
from pathlib import Path
from typing import Any

from vit_hf.analysis.curves import learning_curves
from vit_hf.evaluation.main_metric import MAIN_METRICS, main_metric
from vit_hf.hub.card import write_card
from vit_hf.training.checkpoint import model_on_host
from vit_hf.training.model_folder import ModelFolder
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import peak_memory_bytes, read_jsonl


def finish_run(
    state: TrainState,
    files: ModelFolder,
    output_dir: Path,
    name: str,
    flags: dict[str, Any],
    resolved: dict[str, Any],
    counted: dict[str, int],
    start_time: float,
) -> None:
    """Exports the model, draws the curves, writes card and results, and says how the run ended. All processes call it.

    Args:
        files: what the model's folder holds.
        name: of the repository, or of the folder.
        flags: all of them, as plain values. resolved: what follows from them.
        counted: what was counted of the data, e.g. {"bad_images": 3}.
        start_time: time.perf_counter() at the start of the run, less the time of earlier starts.
    """
    tensors = model_on_host(state)
    if not state.accelerator.is_main_process:
        return
    files.write(output_dir, tensors)
    lines = read_jsonl(output_dir / "metrics.jsonl")
    learning_curves({output_dir.name: lines}).savefig(output_dir / "learning_curves.png", dpi=120)
    results = {key: value for line in lines for key, value in line.items()}  # the last of each kind
    results |= {key: resolved[key] for key in ("train_samples", "num_parameters", "versions")} | counted
    results["peak_memory_bytes"] = peak_memory_bytes(state.accelerator.device)
    results["wall_time_seconds"] = round(time.perf_counter() - start_time, 2)
    write_card(output_dir, name, results=results)
    write_json(results, output_dir / "all_results.json")  # last: its presence says that the folder is complete
    main = main_metric(results)
    print(
        f"done: {MAIN_METRICS[main]} {results[main]:.4f} on {results['eval_samples']} images "
        f"({resolved['eval_split']}); {output_dir}"
        + (f"; {counted['bad_images']} bad images skipped" if counted.get("bad_images") else "")
    )


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
