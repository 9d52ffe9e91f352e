"""Started by the launcher: trains a small member of each family in turn, each as run_pretrain.py does it.

walk_families.py OUTPUT_DIR FLAG VALUE ...
"""

import sys

import torch

from tests.families import FAMILIES
from tests.runs import in_process

if __name__ == "__main__":
    torch.distributed.destroy_process_group = lambda group=None: None  # DeepSpeed keeps the first one for the next run
    root, *words = sys.argv[1:]
    flags = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2]))
    for family, (preset, changes) in FAMILIES.items():
        overrides = ",".join(f"{name}={value}" for name, value in changes.items() if name != "image_size")
        in_process(
            "pretrain",
            preset=preset,
            config_overrides=overrides,
            image_size=32,
            output_dir=f"{root}/{family}",
            **flags,
        )
