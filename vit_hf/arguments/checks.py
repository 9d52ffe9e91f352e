"""Flags that exclude or need each other. What one flag may be by itself is held by the parser."""

from vit_hf.arguments.fields import DataArguments, ModelArguments, RunArguments, SubsetArguments
from vit_hf.arguments.identity import check_change
from vit_hf.errors import ArgumentError


def check(args: RunArguments) -> None:
    """Holds the flags of a training run against each other.

    Raises:
        ArgumentError: flags that exclude or need each other.
    """
    check_one_model(args)
    if args.preset is None and args.model_name_or_path is None:
        raise ArgumentError(f"give one of {WHICH_MODEL}: neither is given")
    if (args.num_train_epochs is None) == (args.max_steps is None):
        found = "both are given" if args.max_steps else "neither is given"
        raise ArgumentError(f"give one of --num_train_epochs and --max_steps: {found}")
    if args.num_train_epochs is not None and args.num_train_epochs <= 0:
        raise ArgumentError(f"--num_train_epochs: {args.num_train_epochs} is out of range, allowed is more than 0")
    if args.warmup_steps is not None and args.warmup_ratio is not None:
        raise ArgumentError("give only one of --warmup_steps and --warmup_ratio")
    for needed in ("dataset_name", "output_dir"):
        if not getattr(args, needed):
            raise ArgumentError(f"--{needed} is missing")
    for name in ("ema_decay", "adam_beta1", "adam_beta2"):
        if getattr(args, name) == 1:
            raise ArgumentError(f"--{name}: 1.0 would never move the average, allowed is 0 to below 1")
    check_loading(args)
    check_subset(args)
    check_augmentation(args)
    check_change(args.change)
    if args.streaming and args.probe_steps:
        raise ArgumentError(
            "--probe_steps: images of a streamed set are not drawn by their class; leave --streaming out"
        )
    if args.hub_strategy != "end" and not args.push_to_hub:
        raise ArgumentError(f"--hub_strategy: {args.hub_strategy} does nothing without --push_to_hub")
    if args.change and args.resume_from_checkpoint == "none":
        raise ArgumentError(
            "--change: nothing is resumed with --resume_from_checkpoint none; leave one of the two out"
        )


def check_loading(args: DataArguments) -> None:
    """Raises ArgumentError for flags of how images are read that cannot be right, or exclude each other."""
    if args.streaming and args.aug_repeats > 1:
        raise ArgumentError(f"--aug_repeats: {args.aug_repeats} does not go with --streaming, allowed is 1")
    if args.streaming and args.class_balanced:
        raise ArgumentError("--class_balanced: true does not go with --streaming, allowed is false")


WHICH_MODEL = "--preset (from scratch) and --model_name_or_path (from weights)"


def check_one_model(args: ModelArguments) -> None:
    """Raises ArgumentError where two models are named."""
    if args.preset is not None and args.model_name_or_path is not None:
        raise ArgumentError(f"give one of {WHICH_MODEL}: both are given")


def check_subset(args: SubsetArguments) -> None:
    """Raises ArgumentError for a subset flag that cannot be right."""
    if args.subset_fraction == 0:
        raise ArgumentError("--subset_fraction: 0.0 keeps nothing, allowed is above 0 to 1")
    if args.subset_fraction is not None and args.subset_per_class is not None:
        raise ArgumentError("give only one of --subset_fraction and --subset_per_class")


def check_augmentation(args: DataArguments) -> None:
    """Raises ArgumentError for flags of the transforms that cannot be right, or exclude each other."""
    if args.interpolation == "random" and args.random_crop.kind != "scale":
        raise ArgumentError(
            f"--interpolation: random is for resized crops, allowed with --random_crop {args.random_crop} are auto, bilinear, "
            "bicubic; or give --random_crop scale=0.08"
        )
    policies = [name for name in ("trivial_augment", "three_augment") if getattr(args, name)]
    policies += ["randaugment"] if args.randaugment is not None else []
    if len(policies) > 1:
        raise ArgumentError(f"give only one of {' and '.join(f'--{name}' for name in policies)}")
    mixes = [name for name in ("mixup_alpha", "cutmix_alpha") if getattr(args, name) > 0]
    for name, idle, needed in (
        ("mixup_prob", args.mixup_prob < 1 and not mixes, "--mixup_alpha or --cutmix_alpha"),
        ("mixup_off_epoch", args.mixup_off_epoch > 0 and not mixes, "--mixup_alpha or --cutmix_alpha"),
        ("mixup_switch_prob", args.mixup_switch_prob != 0.5 and len(mixes) < 2, "--mixup_alpha and --cutmix_alpha"),
        ("random_erasing_mode", args.random_erasing_mode != "uniform" and not args.random_erasing, "--random_erasing"),
    ):
        if idle:
            raise ArgumentError(f"--{name}: {getattr(args, name)} does nothing without {needed} above 0")
