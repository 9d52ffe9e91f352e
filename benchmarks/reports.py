"""What the files in results/ hold: where numbers come from, and the rows as a Markdown table."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from vit_hf.errors import ArgumentError


def environment(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from."""
    root = Path(__file__).parent.parent
    measured = ("vit_hf", "benchmarks/*.py")

    def git(*command: str) -> str:
        try:
            return subprocess.run(("git", "-C", root, *command), capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    commit = git("rev-parse", "HEAD") or "unknown"
    commit += " (dirty)" if git("status", "--porcelain", "--", *measured) else ""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    machine = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    machine |= {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"python": platform.python_version()},
    }


def table(report: dict[str, Any]) -> str:
    """A report as Markdown: where it was measured, then a row a (model, preset, dtype)."""
    machine, versions = report["machine"], report["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"{where}; {software}; commit {report['commit']}; {report['date'][:10]}", f"`{report['command']}`"]
    stems = "largest_difference" in report["rows"][0]
    last = "largest difference of outputs" if stems else "share of a matrix product's rate"
    lines += [
        "",
        f"| preset | dtype | batch | {'stem' if stems else 'model'} | images/s | ours is faster, times | {last} |",
    ]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for row in report["rows"]:
        low, middle, high = row.get("ours_faster", (1, 1, 1))
        faster = f"{middle:.3f} ({low:.3f} to {high:.3f})" if "ours_faster" in row else ""
        cell = f"{row['largest_difference']:.1e}" if stems else f"{row['share_of_matmul'][1]:.0%}"
        lines.append(
            f"| {row['preset']} | {row['dtype']} | {row['batch_size']} | {row['model']} | "
            f"{row['images_per_second']:.{0 if row['images_per_second'] >= 100 else 2}f} | {faster} | {cell} |"
        )
    rates = {row["dtype"]: row["matmul_flops_per_second"] for row in report["rows"]}
    return "\n".join(
        [*lines, "", "matrix product: " + ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in rates.items())]
    )


def read_report(path: Path) -> dict[str, Any]:
    """A file that --output wrote. Raises ArgumentError for another one."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ArgumentError(f"--table: {path}: {error.strerror}") from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or not report.get("rows"):
        raise ArgumentError(f"--table: {path} is not a file that --output wrote")
    return report
