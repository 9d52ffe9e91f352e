"""`vit-hf bench`: latency, throughput and memory of models in several variants, side by side on this device."""

import datetime
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_hf.arguments import parse
from vit_hf.arguments.fields import flag
from vit_hf.arguments.values import IMAGE_SIZE, Kind
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import model_errors


def _read_sizes(text: Any) -> tuple[int, ...] | None:
    words = [word.strip() for word in str(text).split(",")]
    if words == ["none"]:
        return None
    if not all(word.isdigit() and int(word) for word in words):
        raise ValueError(f"{text!r} is no list of numbers from 1 up, by comma, e.g. 1,8,64")
    return tuple(sorted({int(word) for word in words}))


FEW_RUNS = 20  # of fewer, p95 is the slowest of all
SIZES = Kind(_read_sizes, lambda sizes: None if sizes is None else ",".join(map(str, sizes)), "NUMBERS")


@dataclass
class BenchArguments:
    """Flags of `vit-hf bench`; the models are positional."""

    models: list[str] | None = flag(None, "presets, folders or Hub ids")
    image_size: int | tuple[int, int] | None = flag(
        None, "input in pixels: SIDE, or HEIGHTxWIDTH (default: each model's own)", kind=IMAGE_SIZE
    )
    batch_sizes: tuple[int, ...] | None = flag(
        None, "batch sizes tried for throughput, by comma (default: doubled until it falls)", kind=SIZES
    )
    seconds: float = flag(10.0, "of measuring for each model in each variant, beside its warm-up", low=0)
    output_dir: str = flag("runs/bench", "where bench.json and bench.png go")
    revision: str | None = flag(None, "branch, tag or commit of the Hub models")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository")


def main(argv: list[str]) -> None:
    """Measures latency at batch 1, best throughput and memory of models, as they are, compiled and in 16 bits, in turns on
    this device; writes bench.json and bench.png."""
    args = parse(BenchArguments, argv, prog="vit-hf bench", description=main.__doc__, positional="models")
    check_folder(args.output_dir)
    import torch

    from vit_hf.analysis.speed import speed_by_cost
    from vit_hf.evaluation.speed import Subject, measure_in_turns, summary, variants_of
    from vit_hf.hub.export import write_json

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    device = device if device.type == "cuda" else torch.device("cpu")  # others have no such clock
    opened = {name: open_measured(name, args) for name in dict.fromkeys(args.models)}
    about = {name: describe(model) for name, (model, _) in opened.items()}
    subjects = [
        Subject(name, model, variant, shape, device)
        for name, (model, shape) in opened.items()
        for variant in variants_of(device)
    ]
    # compiled code is kept by the lines that it is of, which all models of a class have in common
    with torch._dynamo.config.patch(
        recompile_limit=8 * len(subjects), fail_on_recompile_limit_hit=True, accumulated_recompile_limit=2**16
    ):
        measure_in_turns(subjects, args.seconds, args.batch_sizes)
    rows = [{"model": one.name, **about[one.name], **summary(one)} for one in subjects]
    report = {**environment(device, ["vit-hf", "bench", *argv]), "seconds": args.seconds, "rows": rows}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\n{where(report)}\n\n{table(rows)}\n")
    if few := too_few(rows):
        print(f"{few}\n")
    figure = speed_by_cost(rows)
    if figure is not None:
        figure.savefig(folder / "bench.png", dpi=120)
    write_json(report, folder / "bench.json")
    print(f"written to {folder / 'bench.json'}" + (" and bench.png beside it" if figure is not None else ""))


def open_measured(name: str, args: BenchArguments) -> tuple[Any, tuple[int, int, int]]:
    """A model, fp32 on the host, at the size that is asked for, and the shape of its images. Presets have random weights
    and 1,000 classes."""
    from vit_hf.commands.given import open_model
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.presets import FAMILIES, PRESETS, build, preset_config
    from vit_hf.models.transfer import for_new_labels

    changes = {} if args.image_size is None else {"image_size": args.image_size}
    if name in PRESETS:
        with model_errors(preset=name):
            model = build(preset_config(name, changes, num_labels=1000))
            return model, (model.config.num_channels, *pair(model.config.image_size))
    given = open_model(name, args.revision, args.trust_remote_code, need_head=False)
    model, size = given.model, given.size
    if changes and pair(args.image_size) != tuple(size):
        size = pair(args.image_size)
        if type(model) in FAMILIES.values():
            with model_errors(model=name):
                model = for_new_labels(model, list(model.config.id2label.values()), changes, keep_head=True)
    return model, (getattr(model.config, "num_channels", 3), *size)


def describe(model: Any) -> dict[str, Any]:
    """{"parameters", "gflops" of one image, None where they are not known, "image_size"}."""
    from vit_hf.models.presets import FAMILIES
    from vit_hf.models.summary import forward_flops

    known = type(model) in FAMILIES.values()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops": forward_flops(model.config) / 1e9 if known else None,
        "image_size": getattr(model.config, "image_size", None),
    }


def environment(device: Any, words: list[str]) -> dict[str, Any]:
    """Where the numbers come from."""
    import torch
    import transformers

    def git(*command: str) -> str:
        try:
            done = subprocess.run(("git", "-C", Path(__file__).parent, *command), capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    cpu = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return {
        "command": shlex.join(words),
        "commit": commit + (" (dirty)" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"python": platform.python_version()},
    }


def where(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['device']}, {report['threads']} threads on {report['cores']} cores; {versions}; commit "
        f"{report['commit']}; {report['date'][:10]}\n`{report['command']}`"
    )


def too_few(rows: list[dict[str, Any]]) -> str:
    """A note on what was run too seldom for its numbers to mean much; "" where nothing was."""
    few = [row for row in rows if row["failed"] is None and row["latency_runs"] < FEW_RUNS]
    if not few:
        return ""
    least = min(few, key=lambda row: row["latency_runs"])
    return (
        f"note: {len(few)} of {len(rows)} lines have fewer than {FEW_RUNS} timed runs of one image ({least['model']}, "
        f"{least['variant']}: {least['latency_runs']}), too few for a p95, and their rates are as rough; raise --seconds"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | parameters | GFLOPs | variant | ms, p50 | p95 | images/s | at batch | memory at batch 1 | at that batch |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        gflops = "-" if row["gflops"] is None else f"{row['gflops']:.3g}"
        start = f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {gflops} | {row['variant']} |"
        if row["failed"] is not None:
            lines.append(f"{start} failed: {row['failed'].replace('|', ' ')} | | | | | |")
            continue
        memory = row["peak_memory_bytes"]
        best = row["best_batch_size"]
        lines.append(
            f"{start} {row['latency_p50_ms']:.3g} | {row['latency_p95_ms']:.3g} | {row['images_per_second']:,.4g} | {best} "
            f"| {memory['1'] / 2**20:.0f} MiB | {memory[str(best)] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)
