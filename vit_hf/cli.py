"""The command `vit-hf`; each of its commands is a file of vit_hf/commands."""

import importlib
import sys

from vit_hf.errors import ArgumentError, exit_with, nearest

COMMANDS = (
    "models", "convert", "evaluate", "compare", "predict", "probe", "bench", "figures", "data", "report", "study",
    "verify", "lineage", "space", "push",
)  # fmt: skip
USAGE = """usage: vit-hf COMMAND ...

commands:
  models [NAME]                        the presets: size, operations and memory of each; the shapes inside one
  convert SOURCE DIR [--to timm]       weights of timm or google-research (.npz) as a model folder, or a model as timm's
  evaluate MODEL --dataset_name NAME   accuracy and loss of a folder or Hub id, also under accelerate launch
  compare A B [--dataset_name NAME]    two models on the same images: the difference, its interval, where they differ
  predict MODEL IMAGE|FOLDER|NAME ...  the classes of images: a table, a file, or copies sorted into folders
  probe MODEL --dataset_name NAME      few-shot regression, nearest neighbours and logistic regression on frozen features
  bench MODEL [MODEL ...]              latency, throughput and memory of presets, folders or Hub ids side by side
  figures MODEL [--images FILE ...]    filters, positions, attention, saliency and features, as pictures and a page
  data prepare | show | bench | cache  a smaller copy of a set; a picture of what training makes of it; how fast it comes;
                                       the sets that are kept decoded
  report RUN [RUN ...]                 runs side by side, finished or not: a table and their curves, as HTML and more
  push FOLDER                          a run, a checkpoint or another model's folder to the Hub, later than its run
  study FILE                           a grid of runs that answers questions, and the report of what came of them
  verify RUN                           a run beside what its recipe promises; 1 where something is missed
  space MODEL --output_dir DIR         a page for the Hub that shows what the model answers and where it looks
  lineage MODEL                        from a model back to the data: parents by commit, sets, subsets

vit-hf COMMAND --help says more."""


def main() -> None:
    """Entry point of the console script."""
    exit_with(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> None:
    """Runs one command. Raises ArgumentError for one that does not exist."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in COMMANDS:
        raise ArgumentError(f"unknown command {argv[0]!r}, {nearest(argv[0], COMMANDS)}")
    importlib.import_module(f"vit_hf.commands.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main()
