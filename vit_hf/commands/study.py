"""`vit-hf study`: a grid of runs that answers questions, and the report of what came of them."""

import argparse
import fnmatch
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vit_hf.arguments import Parser
from vit_hf.commands.report import duration
from vit_hf.errors import TOLD, ArgumentError, UserError

if TYPE_CHECKING:
    from vit_hf.study.execute import Launcher
    from vit_hf.study.plan import Cell


def main(argv: list[str]) -> None:
    """Runs the cells of a study that are not finished yet, and writes its report to OUTPUT_DIR/report. Started again it
    goes on where it was; a cell that fails does not stop the others."""
    args = parse_words(argv)
    from vit_hf.study.execute import Launcher, is_finished, run_cells
    from vit_hf.study.plan import read_study

    study = read_study(args.study, args.output_dir)
    cells = chosen(study.cells, args.only)
    launcher = Launcher(args.config_file, args.jobs, tuple(args.devices.split(",")) if args.devices else ())
    check_places(study.output_dir, launcher.devices)
    if args.dry_run:
        dry_run(cells, launcher)
        return
    to_run = [cell for cell in cells if not is_finished(cell)]
    print(
        f"{len(to_run)} of {len(cells)} runs to do, {launcher.jobs} at a time; each prints to {study.output_dir}/CELL/seed-N.log"
    )
    start, count = time.monotonic(), 0

    def tell(cell: "Cell", outcome: str, seconds: float) -> None:
        nonlocal count
        count += 1
        print(
            f"[{count}/{len(to_run)}] {cell}: {outcome}, {duration(seconds)}; {duration(time.monotonic() - start)} in all",
            flush=True,
        )

    try:
        failed = run_cells(to_run, launcher, tell)
    except (KeyboardInterrupt, SystemExit) as stop:
        print("stopped; each run has written a checkpoint, and the same command goes on from there", file=sys.stderr)
        if isinstance(stop, KeyboardInterrupt):
            stop.args = (TOLD,)
        raise
    from vit_hf.commands.study_report import write_report

    print(f"report: {write_report(study, failed, f'vit-hf study {shlex.join(argv)}')}")
    if failed:
        cell, reason = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(cells)} runs have no result; {cell}: {reason}")


def parse_words(argv: list[str]) -> argparse.Namespace:
    """The words of the command line. Raises ArgumentError for those that cannot be right."""
    parser = Parser(prog="vit-hf study", description=main.__doc__)
    parser.add_argument("study", metavar="FILE", type=Path, help="a study, e.g. studies/paper_on_digits.yaml")
    parser.add_argument("--only", help="run these cells and what they start from: names by comma, with * and ?")
    parser.add_argument("--dry_run", action="store_true", help="one line a cell, with its time and disk; run nothing")
    parser.add_argument("--output_dir", type=Path, help="folder of the runs (default: the file's)")
    parser.add_argument("--config_file", type=Path, default=Path("accelerate_configs/cpu.yaml"), help="of accelerate launch: where each run takes place (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--devices", help="numbers of the GPUs to use, by comma, dealt out evenly over the jobs")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise ArgumentError(f"--jobs: {args.jobs} is out of range, allowed is 1 or more")
    return args


def chosen(cells: list["Cell"], only: str | None) -> list["Cell"]:
    """The cells that match, with those that they start from. Raises ArgumentError where none matches."""
    if only is None:
        return cells
    patterns = [pattern.strip() for pattern in only.split(",")]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in cells):
            names = ", ".join(dict.fromkeys(cell.name for cell in cells))
            raise ArgumentError(f"--only: {pattern!r} matches none of {names}")
    wanted = {cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)}
    for cell in reversed(cells):  # each comes after what it starts from
        if cell in wanted and cell.start_from is not None:
            wanted.add(cell.start_from)
    return [cell for cell in cells if cell in wanted]


def check_places(output_dir: Path, devices: tuple[str, ...]) -> None:
    """Raises UserError for a folder that is a file, or GPUs that this machine does not have."""
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--output_dir: {path} is a file; name a folder")
    if devices:
        import torch

        there = [str(number) for number in range(torch.cuda.device_count())]
        for device in devices:
            if device not in there:
                raise UserError(
                    f"--devices: {device!r} is none of this machine's GPUs: {', '.join(there) or 'it has none'}"
                )


def dry_run(cells: list["Cell"], launcher: "Launcher") -> None:
    """Prints each cell with its state, its time on this device and its disk."""
    from vit_hf.study.cost import measured_costs, trial_device
    from vit_hf.study.execute import is_finished, missing_data

    rest = [cell for cell in cells if not is_finished(cell)]
    missing = missing_data(rest)
    device, num_devices, note = trial_device(launcher)
    try:
        costs = measured_costs(rest, device, num_devices, str(launcher.settings.get("mixed_precision", "no")))
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())[:300]) from None
    width = max(len(str(cell)) for cell in cells)
    for cell in cells:
        state = "finished" if cell not in rest else "no data" if cell in missing else "to run"
        cost = costs.get(cell)
        time_taken, disk = ("-", "-") if cost is None else (duration(cost.seconds), f"{cost.disk_bytes / 1e6:.1f} MB")
        print(f"{cell!s:{width}}  {time_taken:>9}  {disk:>12}  {state}")
    for reason in dict.fromkeys(missing.values()):
        print(f"no data: {reason}")
    print(
        f"{len(rest)} of {len(cells)} runs to do: {duration(sum(cost.seconds for cost in costs.values()))} one after "
        f"another, {sum(cost.disk_bytes for cost in costs.values()) / 1e9:.2f} GB of disk\n"
        f"Time: computing alone, from a second of training on {note}; reading and augmenting images come on top, "
        "and what else runs on the machine."
    )
