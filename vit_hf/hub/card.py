"""The model card: what the folder is, how it was made and measured, with the Hub's metadata."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vit_hf.arguments import RunArguments, plain, without_paths
from vit_hf.data.sets.names import HUB_SETS

KINDS = {"vit_hf": "Vision Transformer", "vit_hf_resnet": "ResNet", "vit_hf_bit": "BiT ResNet"}


def write_card(
    output_dir: Path, name: str, flags: dict[str, Any], resolved: dict[str, Any], results: dict[str, Any], config: Any
) -> None:
    """Writes README.md.

    Args:
        name: of the repository, or of the folder.
        flags: all of them, as plain values.
        resolved: the derived values of run_config.yaml. results: all_results.json. config: the model's configuration.
    """
    defaults = plain(RunArguments())
    private = ("output_dir", "hub_model_id", "push_to_hub", "hub_private_repo")
    run = without_paths({key: flags[key] for key in flags if flags[key] != defaults[key] and key not in private})
    dataset, base = flags["dataset_name"], flags["model_name_or_path"]
    is_hub_id = base is not None and not Path(base).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vit_hf", *(["vision-transformer"] if config.model_type == "vit_hf" else [])],
        datasets=[HUB_SETS.get(dataset, dataset)]
        if dataset in HUB_SETS or "/" in dataset and not Path(dataset).exists()
        else None,
        base_model=base if is_hub_id else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=HUB_SETS.get(dataset, Path(dataset).name),
                dataset_name=Path(dataset).name,
                dataset_split=resolved["eval_split"],
                metric_type="accuracy",
                metric_value=results["eval_accuracy"],
            )
        ],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", ""]
    origin = (
        f"fine-tuned from `{run['model_name_or_path']}`" if base else f"trained from scratch (`{flags['preset']}`)"
    )
    trained = f" ({resolved['num_trained_parameters']:,} of them trained)" if flags["freeze"] else ""
    lines += [f"A {KINDS[config.model_type]} {origin} on `{Path(dataset).name}` with vit_hf: {resolved['num_parameters'] / 1e6:.1f} M parameters{trained}, "
              f"{_size(config.image_size)} pixels, {config.num_labels} classes.", ""]  # fmt: skip
    lines += [
        f"| split | images | accuracy | top-5 accuracy | loss |\n|---|---|---|---|---|\n| {resolved['eval_split']} | "
        f"{results['eval_samples']} | {results['eval_accuracy']:.4f} | {results['eval_accuracy_top5']:.4f} | "
        f"{results['eval_loss']:.4f} |",
        "",
        _weights(run.get("ema_decay")),
        "",
    ]
    lines += ["![learning curves](learning_curves.png)", ""]
    if pictures := sorted((output_dir / "figures").glob("*.png")):  # of --log_figures_steps
        lines += ["## Figures", "", "What the model has learned and where it looks, at the last step:", ""]
        lines += [f"![{path.stem.replace('_', ' ')}](figures/{path.name})" for path in pictures] + [""]
    where = name if "/" in name else f"PATH/TO/{name}"
    remote = "" if config.is_stock else ", trust_remote_code=True"
    lines += ["## Use", "", "```python", "from transformers import pipeline", "",
              f'classify = pipeline("image-classification", "{where}"{remote})', 'classify("image.png")', "```", ""]  # fmt: skip
    lines += ["## Training", "", f"{results['train_samples']} images, {resolved['total_steps']} steps of "
              f"{flags['global_batch_size']}; wall time {results['wall_time_seconds']:.0f} s; {resolved['device']}.", ""]  # fmt: skip
    if resolved.get("subset"):
        lines += [
            "Only a subset of the training split was used:",
            "",
            "```json",
            json.dumps(resolved["subset"]),
            "```",
            "",
        ]
    for one in resolved.get("changed", []):
        told = ", ".join(f"`{flag}` from {old} to {new}" for flag, (old, new) in one["flags"].items())
        lines += [f"Changed on the way, after step {one['step']}: {told}.", ""]
    lines += ["Flags (all of them, with derived values, are in `run_config.yaml`):", "", "```yaml"]
    lines += [f"{key}: {value}" for key, value in run.items()]
    lines += ["```", "", "Versions: " + ", ".join(f"{k} {v}" for k, v in resolved["versions"].items()) + ".", ""]
    (output_dir / "README.md").write_text("\n".join(lines))


def _weights(ema_decay: float | None) -> str:
    """Which weights these are, and that the numbers are theirs."""
    if not ema_decay:
        return "The weights are those of the last step; nothing was selected on this split."
    return (
        "The weights are not those of the last step but the exponential moving average of the weights after each step "
        f"(`ema_decay: {ema_decay}`), and the numbers above are the average's; nothing was selected on this split."
    )


def _size(image_size: int | list[int]) -> str:
    return f"{image_size}x{image_size}" if isinstance(image_size, int) else "x".join(map(str, image_size))
