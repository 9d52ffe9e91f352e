"""What of a run or a model's folder goes to the Hub: a list of what may, so that nothing else in a folder ever does."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import without_paths
from vit_hf.errors import UserError
from vit_hf.evaluation.main_metric import main_metric
from vit_hf.hub.uploader import Files
from vit_hf.training.manifest import checkpoints, seal, step_of
from vit_hf.training.tracking import read_jsonl

RUN_CONFIG, METRICS, MANIFEST = "run_config.yaml", "metrics.jsonl", "manifest.json"
MODEL = [
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
    "README.md", "*.py",
]  # fmt: skip
RESULTS = ["eval_results.json", "verified.json", "conversion.json"]  # of commands, with paths of this machine
UPLOADED = [*MODEL, RUN_CONFIG, METRICS, "all_results.json", "learning_curves.png", *RESULTS]
NAMED = ("model", "dataset_name", "copy")  # of their values, what may be a relative path
LAST = "last-checkpoint/"  # of the repository: the checkpoint that a run goes on from


def folder_files(folder: Path) -> Files:
    """What may go of a finished run, a checkpoint or a model's folder. Raises UserError where it holds no model."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and goes_up(path.name))
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder} is no model's folder: config.json or model.safetensors is missing")
    files: Files = {name: folder / name for name in names}
    if RUN_CONFIG in files:
        files[RUN_CONFIG] = public_run_config(folder / RUN_CONFIG)
    files |= {name: public_results(folder / name) for name in RESULTS if name in files}
    return files | {f"figures/{path.name}": path for path in sorted((folder / "figures").glob("*.png"))}


def goes_up(name: str, patterns: list[str] = UPLOADED) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def public_run_config(path: Path) -> bytes:
    """run_config.yaml without the paths of this machine."""
    flags = without_paths(yaml.safe_load(path.read_text()))
    return yaml.safe_dump(flags, sort_keys=False, allow_unicode=True).encode()


def public_results(path: Path) -> bytes:
    """What a command measured, without the paths of this machine. Raises UserError where it is damaged."""

    def public(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: public(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [public(one, key) for one in value]
        if not isinstance(value, str) or not (Path(value).is_absolute() or (key in NAMED and Path(value).exists())):
            return value
        return Path(value).resolve().name

    try:
        return json.dumps(public(json.loads(path.read_text(encoding="utf-8"))), indent=2).encode() + b"\n"
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it, or run the command that wrote it again") from None


def run_files(run: Path, step: int) -> Files:
    """What of a run's own folder belongs to a checkpoint of it: its flags, and its lines up to that step."""
    files: Files = {}
    if (run / RUN_CONFIG).exists():
        files[RUN_CONFIG] = public_run_config(run / RUN_CONFIG)
    if lines := _lines(run, step):
        files[METRICS] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return files


def state_files(checkpoint: Path) -> Files:
    """All of a checkpoint, under last-checkpoint/: the manifest has no paths of this machine."""
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    files: Files = {LAST + name: checkpoint / name for name in manifest["files"]}
    return files | {LAST + MANIFEST: manifest_bytes({**manifest, "run": without_paths(manifest["run"])})}


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return json.dumps(seal(manifest), indent=1).encode()


def commit_message(run: Path, step: int | None) -> str:
    """ "step 40: eval_accuracy 0.9123", from the last evaluation up to that step; None: the last step of all."""
    lines = _lines(run, step)
    if step is None and not lines:
        return "Upload a model's folder"
    step = lines[-1]["step"] if step is None else step
    for line in reversed(lines):
        if "loss" not in line and (name := main_metric(line)) is not None:
            where = "" if line["step"] == step else f" at step {line['step']}"
            return f"step {step}: {name} {line[name]:.4f}{where}"
    return f"step {step}"


def newest_checkpoint(run: Path) -> Path | None:
    """Of a run's folder, the one of the last step; None where there is none."""
    whole = [path for path in checkpoints(run) if (path / MANIFEST).exists()]
    return max(whole, key=step_of, default=None)


def _lines(run: Path, step: int | None) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / METRICS) if step is None or line["step"] <= step]
