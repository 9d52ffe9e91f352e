"""The model card: what a folder holds, how it was made and measured, with the Hub's metadata.

A card is a function of the files of a folder: of a finished run, of one of its checkpoints, or of what `vit-hf convert`
wrote. This module must not know a run while it trains, nor the Hub.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vit_hf.arguments import RunArguments, plain, without_paths
from vit_hf.data.sets.names import HUB_SETS
from vit_hf.hub.lineage import link_lines, recorded_chain
from vit_hf.training.tracking import read_jsonl

TEMPLATE = Path(__file__).with_name("card_template.md")
KINDS = {
    "vit": "Vision Transformer", "vit_hf": "Vision Transformer", "resnet": "ResNet", "vit_hf_resnet": "ResNet",
    "bit": "BiT ResNet", "vit_hf_bit": "BiT ResNet", "timm": "Vision Transformer in timm's format",
}  # fmt: skip
# key of a result: (title in the table, type in the Hub's metadata; None: in the table alone)
METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "accuracy_top5": ("top-5 accuracy", "top-5-accuracy"),
    "map": ("mAP", "mean_average_precision"),
    "macro_f1": ("macro F1", "f1"),
    "f1_macro": ("macro F1", "f1"),
    "f1_micro": ("micro F1", None),
    "expected_calibration_error": ("calibration error", None),
    "brier": ("Brier score", None),
    "loss": ("loss", None),
}
MARK = (
    "<!-- Made by vit_hf from the files beside it. SHA-256 of the text above: "  # a card that was not changed by hand
)
PRIVATE = ("output_dir", "hub_model_id", "push_to_hub", "hub_private_repo", "expected")


def write_card(
    folder: Path, name: str | None = None, run: Path | None = None, results: dict[str, Any] | None = None
) -> None:
    """Writes README.md into a folder; arguments as of `card_text`."""
    (folder / "README.md").write_text(card_text(folder, name, run, results), encoding="utf-8")


def refresh_card(folder: Path, name: str | None = None) -> bool:
    """Writes the card of a folder anew, after verified.json or eval_results.json came into it, or under another name.
    Returns whether it did: a card that was changed by hand stays.

    Args:
        name: of the repository; by default as the card has it.
    """
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, _ = text.partition(MARK)
    if not mark or text != _marked(body):
        return False
    heading = re.search(r"^# (.+)$", body, re.M)
    write_card(folder, name or (heading[1] if heading else None))
    return True


def card_text(
    folder: Path, name: str | None = None, run: Path | None = None, results: dict[str, Any] | None = None
) -> str:
    """The card of a folder with a model.

    Args:
        name: of the repository; by default that of the folder.
        run: folder of the run whose checkpoint it is; by default the folder itself, or the one above a checkpoint.
        results: what all_results.json will hold, where it is not written yet.

    Raises:
        OSError: no config.json. ValueError: one that is not JSON.
    """
    name = name or folder.resolve().name
    config = json.loads((folder / "config.json").read_text())
    step = _json(folder / "manifest.json").get("step")
    run = run or (folder.resolve().parent if step is not None else folder)
    given = _yaml(run / "run_config.yaml")
    resolved = given.pop("resolved", None) or {}
    if results is None:
        results = _json(run / "all_results.json") if step is None else {}
        results = results or results_until(run, step)
    converted = _json(folder / "conversion.json")
    evaluations = all_evaluations(given, resolved, results, _json(folder / "eval_results.json"))
    content = {
        **_origin(name, config, given, resolved, converted, step),
        **_use(name, config, given),
        "evaluations": evaluations,
        "columns": [(key, title) for key, (title, _) in METRICS.items() if any(key in e["metrics"] for e in evaluations)],
        "intervals": any(one["intervals"] for one in evaluations),
        "weights": _weights(given, step) if given else "",
        "curves": (folder / "learning_curves.png").exists() or (results and step is None),
        "expected": _promises(given.get("expected") or [], _json(folder / "verified.json")),
        "figures": [(path.stem.replace("_", " "), path.name) for path in sorted((folder / "figures").glob("*.png"))],
        "limits": _limits(config, given, resolved, evaluations),
        **_training(given, resolved, results),
    }  # fmt: skip
    data = _metadata(name, config, given, resolved, results, evaluations)
    text = str(ModelCard.from_template(data, template_path=str(TEMPLATE), name=name, **content))
    return _marked(_tidy(text))


def _marked(body: str) -> str:
    return f"{body}{MARK}{hashlib.sha256(body.encode()).hexdigest()} -->\n"


def results_until(run: Path, step: int | None) -> dict[str, Any]:
    """The last line of each kind of metrics.jsonl, up to a step."""
    found: dict[str, Any] = {}
    for line in read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []:
        if step is None or line.get("step", 0) <= step:
            found |= line
    return found


def all_evaluations(
    flags: dict[str, Any], resolved: dict[str, Any], results: dict[str, Any], later: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every set that the model was evaluated on, the run's own first.

    Args:
        later: eval_results.json: of `vit-hf evaluate`, one set or a list of them under "sets".

    Returns:
        dicts of dataset_name, dataset_config, split, revision, images, metrics {key of METRICS: number}, and intervals
        {key: [low, high]} where `vit-hf evaluate` gave them.
    """
    own = {
        "dataset_name": flags.get("dataset_name"), "dataset_config": flags.get("dataset_config_name"),
        "split": resolved.get("eval_split"), "revision": resolved.get("dataset_revision"),
    }  # fmt: skip
    found = [_evaluation(own, results)] if flags and results else []
    for one in later.get("sets") or ([later] if "eval_samples" in later else []):
        if one.get("tta", "none") != "none":  # two passes: not what a reader takes for the model's number
            continue
        of = {
            "dataset_name": one.get("dataset_name"), "hub_id": one.get("hub_id"), "dataset_config": one.get("dataset_config"),
            "split": one.get("eval_split"), "revision": one.get("revision"),
        }  # fmt: skip
        found.append(_evaluation(of, one))
    places: dict[tuple, dict[str, Any]] = {}
    for one in found:
        if one["metrics"]:
            key = (one["dataset_name"], one["dataset_config"], one["split"], one["images"])
            first = places.setdefault(key, one)  # of a set and split: the run's own
            shared = first["metrics"].keys() & one["metrics"].keys()
            # the same measurement, on other processes maybe: it adds what the run itself does not measure
            if shared and all(abs(first["metrics"][name] - one["metrics"][name]) < 1e-3 for name in shared):
                first["metrics"] = one["metrics"] | first["metrics"]
                first["intervals"] = one["intervals"] | first["intervals"]
    return list(places.values())


def _evaluation(of: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    known = {key.lower().removeprefix("eval_"): value for key, value in results.items() if key.startswith("eval_")}
    metrics = {key: known[key] for key in METRICS if isinstance(known.get(key), (int, float))}
    intervals = {key: known[f"{key}_interval"] for key in METRICS if known.get(f"{key}_interval")}
    name = str(of["dataset_name"] or "")
    public = HUB_SETS.get(name, Path(name).name if _is_local(name) else name)
    shown = Path(name).name
    return {
        **of,
        "type": of.get("hub_id") or public,
        "dataset_name": shown,
        "images": known.get("samples", ""),
        "metrics": metrics,
        "intervals": intervals,
    }


def _metadata(
    name: str, config: dict[str, Any], flags: dict[str, Any], resolved: dict[str, Any], results: dict[str, Any],
    evaluations: list[dict[str, Any]],
) -> ModelCardData:  # fmt: skip
    dataset, base = flags.get("dataset_name") or "", flags.get("model_name_or_path")
    is_hub_set = dataset in HUB_SETS or ("/" in dataset and not _is_local(dataset))
    is_hub_model = base is not None and not _is_local(base) and not (resolved.get("parent") or {}).get("sha256")
    kind = KINDS.get(_model_type(config), "")
    listed = [
        EvalResult(
            task_type="image-classification", dataset_type=one["type"], dataset_name=one["dataset_name"],
            dataset_config=one["dataset_config"], dataset_split=one["split"], dataset_revision=one["revision"],
            metric_type=METRICS[key][1], metric_name=METRICS[key][0], metric_value=value,
        )
        for one in evaluations
        for key, value in one["metrics"].items()
        if METRICS[key][1] and one["dataset_name"]
    ]  # fmt: skip
    emissions = _emissions(flags, resolved, results)
    return ModelCardData(
        license=flags.get("license"),
        library_name="timm" if _model_type(config) == "timm" else "transformers",
        pipeline_tag="image-classification",
        tags=["vit_hf", *(["vision-transformer"] if kind.startswith("Vision") else [])],
        datasets=[HUB_SETS.get(dataset, dataset)] if is_hub_set else None,
        base_model=base if is_hub_model else None,
        model_name=name,
        eval_results=listed or None,
        **({"co2_eq_emissions": emissions} if emissions else {}),
    )


def _is_local(name: str) -> bool:
    """Whether it is a path of this machine, though it may be gone by now."""
    return Path(name).exists() or Path(name).is_absolute()


def _emissions(flags: dict[str, Any], resolved: dict[str, Any], results: dict[str, Any]) -> dict[str, Any] | None:
    """As the Hub's metadata have it: grams of CO2, from a stated power, the wall time and a stated grid."""
    watts, grams, seconds = flags.get("power_watts"), flags.get("carbon_intensity"), results.get("wall_time_seconds")
    if watts is None or grams is None or seconds is None:
        return None
    return {
        "emissions": float(f"{watts / 1000 * seconds / 3600 * grams:.4g}"),
        "source": f"wall time x {watts:g} W (stated) x {grams:g} gCO2 per kWh (stated)",
        "training_type": "fine-tuning" if flags.get("model_name_or_path") else "pre-training",
        "hardware_used": resolved.get("device", ""),
    }


def _model_type(config: dict[str, Any]) -> str:
    return "timm" if "architecture" in config and "model_type" not in config else str(config.get("model_type"))


def _origin(
    name: str, config: dict[str, Any], flags: dict[str, Any], resolved: dict[str, Any], converted: dict[str, Any],
    step: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The sentence that says what it is, and where a converted one comes from."""
    kind, count = KINDS.get(_model_type(config), "model"), resolved.get("num_parameters", converted.get("parameters"))
    side = config.get("image_size")
    parts = [f"{count / 1e6:.1f} M parameters" if count else ""]
    if flags.get("freeze"):
        parts[0] += f" ({resolved['num_trained_parameters']:,} of them trained)"
    parts += [f"{_size(side)} pixels" if side else "", f"{len(_labels(config))} classes" if _labels(config) else ""]
    told = ", ".join(part for part in parts if part)
    if flags:
        base = (resolved.get("parent") or {}).get("name") or without_paths(flags).get("model_name_or_path")
        origin = f"fine-tuned from `{base}`" if base else f"trained from scratch (`{flags.get('preset')}`)"
        origin += f" on `{Path(flags['dataset_name']).name}` with vit_hf"
        if step is not None:
            origin += f", as it was after step {step} of {resolved.get('total_steps', '?')}"
        what = f"A {kind} {origin}: {told}."
    elif converted:
        what = f"A {kind}, converted with vit_hf from `{converted['source']}`: {told}."
    else:
        what = f"A {kind}: {told}."
    text = ""
    if converted:
        hashed = f"; SHA-256 `{converted['sha256']}`" if converted.get("sha256") else ""
        text = (
            f"The weights are those of `{converted['source']}` ({converted['format']}{hashed}), under "
            "other names and shapes; nothing was trained. SHA-256 of "
            f"{converted['file']} here: `{converted['file_sha256']}`. What its authors say of data, results and licence "
            "holds for it."
        )
    return {"what": what, "converted": text}


def _use(name: str, config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    where = name if "/" in name else f"PATH/TO/{name}"
    words = [f"vit-hf evaluate {where}"]
    public = without_paths(flags)
    for key in ("dataset_name", "dataset_config_name", "image_column_name", "label_column_name", "eval_split",
                "max_eval_samples", "split_seed"):  # fmt: skip
        if public.get(key) not in (None, 0):
            value = str(public[key])
            words.append(f"--{key} " + (f'"{value}"' if " " in value else value))
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    return {
        "where": where,
        "timm": _model_type(config) == "timm",
        "remote": remote,
        "evaluate": " ".join(words) if flags else "",
    }


def _promises(expected: list[dict[str, Any]], verified: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's contract, with what `vit-hf verify` found where it was run."""
    if verified:
        rows = verified["results"]
    else:
        rows = [{**one, "status": "not compared yet: `vit-hf verify`"} for one in expected]
    for one in rows:
        seeds = f", mean of {len(one['seeds'])} seeds" if one.get("seeds") else ""
        one["by"] = ("measured: " if one["measured"] else "a target, quoted and not measured by us: ") + one["source"]
        one["by"] += seeds
    return rows


def _limits(
    config: dict[str, Any], flags: dict[str, Any], resolved: dict[str, Any], evaluations: list[dict[str, Any]]
) -> list[str]:
    lines, labels = [], _labels(config)
    if flags:
        split = f" ({resolved['train_split']})" if resolved.get("train_split") else ""
        lines.append(
            f"It was trained on {resolved.get('train_samples', '?')} images of `{Path(flags['dataset_name']).name}`{split}"
            + (" after weights that were given" if flags.get("model_name_or_path") else "")
            + "; on other kinds of pictures its answers are untested."
        )
    if labels:
        shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        if flags.get("loss") == "sigmoid" or config.get("problem_type") == "multi_label_classification":
            closed = "It gives each of them a probability of its own, and knows nothing else"
        else:
            closed = "It answers one of them for every picture, also for one that shows none of them"
        lines.append(f"The set of classes is closed ({len(labels)}: {shown}). {closed}.")
    if evaluations:
        splits = ", ".join(f"{one['dataset_name']} {one['split'] or ''}".strip() for one in evaluations)
        lines.append(f"It was evaluated on {splits}, and on nothing else.")
    else:
        lines.append("It was not evaluated with vit_hf.")
    lines.append(
        "Not evaluated: pictures from other sources, damaged or adversarial pictures, and groups of people or places."
    )
    return lines


def _training(flags: dict[str, Any], resolved: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    if not flags:
        return {"run": None, "versions": ""}
    defaults = plain(RunArguments())
    run = {key: flags[key] for key in flags if flags[key] != defaults.get(key) and key not in PRIVATE}
    lines = [f"{resolved.get('train_samples', '?')} images, {resolved.get('total_steps', '?')} steps of "
             f"{flags.get('global_batch_size')}"]  # fmt: skip
    if seconds := results.get("wall_time_seconds"):
        lines[0] += f"; wall time {seconds:.0f} s ({seconds / 3600:.2f} hours)"
    lines[0] += f"; {resolved.get('device', 'device unknown')}."
    if emissions := _emissions(flags, resolved, results):
        lines.append(f"CO2: {emissions['emissions']:g} g ({emissions['source']}).")
    elif flags.get("carbon_intensity") is not None:
        lines.append(
            f"CO2: not given; the grid's intensity is known ({flags['carbon_intensity']:g} g per kWh), the power is not "
            "(`--power_watts`)."
        )
    for one in resolved.get("changed", []):
        told = ", ".join(f"`{flag}` from {old} to {new}" for flag, (old, new) in one["flags"].items())
        lines.append(f"Changed on the way, after step {one['step']}: {told}.")
    return {
        "run": without_paths(run),
        "training": lines,
        "lineage": link_lines(recorded_chain(flags, resolved)),
        "subset": json.dumps(resolved["subset"]) if resolved.get("subset") else "",
        "versions": ", ".join(f"{key} {value}" for key, value in (resolved.get("versions") or {}).items()),
    }


def _weights(flags: dict[str, Any], step: int | None) -> str:
    """Which weights these are, and that the numbers are theirs."""
    ema_decay, which = flags.get("ema_decay"), "the last step" if step is None else f"step {step}"
    if not ema_decay:
        return f"The weights are those of {which}; nothing was selected on this split."
    return (
        f"The weights are not those of {which} but the exponential moving average of the weights after each step "
        f"(`ema_decay: {ema_decay}`), and the numbers above are the average's; nothing was selected on this split."
    )


def _labels(config: dict[str, Any]) -> list[str]:
    names = config.get("id2label")
    return [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else []


def _size(image_size: int | list[int]) -> str:
    return f"{image_size}x{image_size}" if isinstance(image_size, int) else "x".join(map(str, image_size))


def _tidy(text: str) -> str:
    """No more than one empty line in a row: the template has one for each part that is left out."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n\n"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
