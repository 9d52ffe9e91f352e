#!/usr/bin/env python
"""Fine-tunes a pretrained Vision Transformer on another set and saves it as a Hub model folder.

    accelerate launch run_finetune.py --config recipes/finetune/cifar10_vit_base.yaml --model_name_or_path DIR_OR_HUB_ID

The weights are loaded, the head is replaced by a zero-initialised linear layer for the new classes, the position
embeddings are resized when --image_size differs, and all layers are trained. With --preset in place of
--model_name_or_path the same course starts from random weights: the baseline at the same budget. With no flags at all
it runs the demo recipe on what run_pretrain.py's demo wrote.
"""

import sys
from pathlib import Path

from vit_hf.arguments import RunArguments, check, parse
from vit_hf.errors import UserError, exit_with

DEMO = Path(__file__).resolve().parent / "recipes/demo/finetune_digits.yaml"
DEMO_MODEL = Path("runs/demo/pretrain_glyphs")


def build_model(args: RunArguments, class_names: list[str]):
    """The weights under a new linear head; or, with --preset, a model with random weights and a linear head."""
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
    return for_new_labels(model, class_names, changes), own


def main() -> None:
    argv = sys.argv[1:]
    if not argv:
        if not (DEMO_MODEL / "all_results.json").exists():
            raise UserError(f"no flags given, and no {DEMO_MODEL} to start from; make it with: python run_pretrain.py")
        argv = ["--config", str(DEMO), "--model_name_or_path", str(DEMO_MODEL)]
        print(f"run_finetune.py: no flags given, running the demo: {' '.join(argv)}", file=sys.stderr)
    args = parse(RunArguments, argv, prog="run_finetune.py", description=__doc__.splitlines()[0])
    check(args)
    from vit_hf.runner import run  # torch and the rest only once the flags are right

    run(args, build_model)


if __name__ == "__main__":
    exit_with(main)
