"""run_pretrain.py whose first process loads the set until another one has said that it waits, which it says later than
--ddp_timeout; each call of the load is written down.

    slow_start.py FOLDER [flags of run_pretrain.py]
"""

import os
import runpy
import sys
import time
from pathlib import Path

from vit_hf.data.sets import load as sets
from vit_hf.training import waiting

FOLDER, RANK = Path(sys.argv.pop(1)), os.environ["RANK"]
waiting.LINE_SECONDS = 11.0
load = sets.load_image_splits


def say(line, **_):
    print(line)
    (FOLDER / "said").write_text(line)


def slow_load(*args, **options):
    with open(FOLDER / "calls", "a") as calls:
        calls.write(f"{RANK}\n")
    while RANK == "0" and not (FOLDER / "said").exists():
        time.sleep(0.05)
    return load(*args, **options)


waiting.print, sets.load_image_splits = say, slow_load
runpy.run_path(str(Path(__file__).resolve().parents[2] / "run_pretrain.py"), run_name="__main__")
