#!/usr/bin/env python
"""Trains a Vision Transformer from scratch and saves it as a Hub model folder.

    accelerate launch run_pretrain.py --config recipes/pretrain/cifar10_vit_small.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml run_pretrain.py --config RECIPE.yaml --output_dir DIR

Every flag can stand in the YAML file under its own name; a flag wins over the file. With no flags at all it runs the
demo recipe. Where it runs (devices, precision, ZeRO) is the business of `accelerate launch`.
"""

from pathlib import Path

from vit_hf.arguments import RunArguments, check, parse
from vit_hf.errors import exit_with

DEMO = Path(__file__).resolve().parent / "recipes/demo/pretrain_glyphs.yaml"


def build_model(args: RunArguments, class_names: list[str]):
    """The preset with random weights, or, with --model_name_or_path, training that goes on from given weights."""
    from vit_hf.data.preprocessing import own_preprocessing
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.presets import for_new_labels, from_preset, load_pretrained

    changes = dict(args.config_overrides)
    if args.image_size is not None:
        changes["image_size"] = args.image_size
    if args.preset is not None:
        return from_preset(args.preset, class_names, changes), None
    model = load_pretrained(args.model_name_or_path, revision=args.revision, trust_remote_code=args.trust_remote_code)
    own = own_preprocessing(args.model_name_or_path, args.revision, pair(model.config.image_size))
    same_classes = list(model.config.id2label.values()) == class_names
    return for_new_labels(model, class_names, changes, keep_head=same_classes), own


def main() -> None:
    args = parse(RunArguments, prog="run_pretrain.py", description=__doc__.splitlines()[0], default_config=DEMO)
    check(args)
    from vit_hf.runner import run  # torch and the rest only once the flags are right

    run(args, build_model)


if __name__ == "__main__":
    exit_with(main)
