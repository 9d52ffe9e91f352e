"""Started by the launcher: runs the real scripts one after the other, each as if its process had just been launched.

    accelerate launch --config_file F --num_processes 2 tests/distributed/walk_courses.py COURSES.json

COURSES.json: [{"script": "pretrain", "mixed_precision": "no", "flags": {"output_dir": ...}}, ...]
"""

import json
import os
import sys
from pathlib import Path

import torch

from tests.runs import in_process

if __name__ == "__main__":
    torch.distributed.destroy_process_group = lambda group=None: None  # DeepSpeed keeps the first one for the next run
    for course in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["ACCELERATE_MIXED_PRECISION"] = course["mixed_precision"]
        in_process(course["script"], **course["flags"])
