#!/usr/bin/env python
"""Trains a Vision Transformer from scratch and saves it as a Hub model folder.

    accelerate launch run_pretrain.py --config recipes/pretrain/cifar10_vit_small.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml run_pretrain.py --config RECIPE.yaml --output_dir DIR

Every flag can stand in the YAML file under its own name; a flag wins over the file. With no flags at all it runs the
demo recipe. Where it runs (devices, precision, ZeRO) is the business of `accelerate launch`.
"""

import functools
import time
from pathlib import Path

from vit_hf.arguments import RunArguments, changes, check, identity, parse, pick, plain
from vit_hf.errors import exit_with, model_errors

DEMO = Path(__file__).resolve().parent / "recipes/demo/pretrain_glyphs.yaml"


def main() -> None:
    args = parse(RunArguments, prog="run_pretrain.py", description=__doc__.splitlines()[0], default_config=DEMO)
    check(args)
    import torch  # this and the rest only once the flags are right

    from vit_hf.analysis.gallery import figure_drawer
    from vit_hf.data import augment, feed, preprocessing as images, sets
    from vit_hf.data.faults import DataReport

