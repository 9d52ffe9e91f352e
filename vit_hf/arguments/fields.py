"""The flags, by topic: each with its help, its range, and whether it may change when a run goes on.

A command's own flags stand with the command, and borrow from here what they share. Of the bases of a dataclass the last
comes first, in --help and in run_config.yaml.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vit_hf.arguments.expected import EXPECTED, Expected
from vit_hf.arguments.values import (
    BATCH_SIZE,
    CLASSES,
    FREEZE,
    IMAGE_SIZE,
    LICENSE,
    MEAN,
    NAMES,
    OVERRIDES,
    RANDAUGMENT,
    RANDOM_CROP,
    STD,
    TRACKERS,
    WORKERS,
    Kind,
    RandAugment,
    RandomCrop,
)


def flag(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    kind: Kind | None = None,
    same_run: bool = False,
    mendable: bool = False,
    file_only: bool = False,
) -> Any:
    """A field.

    Args:
        low, high: its range, inclusive.
        kind: how it is read, where it is more than a word, a number or a choice.
        same_run: it may change from one start of a run to the next. mendable: it may where --change names it.
        file_only: a block of a recipe, and no flag.
    """
    metadata = {"help": help, "low": low, "high": high, "kind": kind, "same_run": same_run, "mendable": mendable}
    metadata["file_only"] = file_only
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(item: dataclasses.Field) -> Any:
    """The value of a field that is not given."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


@dataclass
class ModelArguments:
    """The model: from scratch by --preset, or from weights by --model_name_or_path."""

    preset: str | None = flag(None, "architecture by name, randomly initialised (`vit-hf models` lists them)")
    model_name_or_path: str | None = flag(None, "Hub id or folder of a pretrained model")
    revision: str | None = flag(None, "branch, tag or commit of the Hub model")
    config_overrides: dict[str, Any] = flag(
        {}, 'fields of the configuration, e.g. "drop_path_rate=0.1,pooling=mean" (docs/models.md)', kind=OVERRIDES
    )
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository (ours needs none)")


@dataclass
class GivenModelArguments:
    """The model of a command, which is named without a flag."""

    model: str = flag("", "Hub id or folder of a model")
    revision: str | None = flag(None, "branch, tag or commit of the Hub model")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository")


@dataclass
class DatasetArguments:
    """Which images."""

    dataset_name: str | None = flag(
        None, "digits, glyphs, fractal, cifar10, imagenet-1k, a Hub id, or a folder (imagefolder or parquet)"
    )
    dataset_config_name: str | None = flag(
        None, 'configuration of the Hub dataset, or options of fractal, e.g. "num_classes=1000,image_size=64"'
    )
    image_column_name: str | None = flag(None, "image column (default: found by its type)")
    label_column_name: str | None = flag(None, "label column (default: found by its type)")
    eval_split: str | None = flag(None, "split to evaluate on (default: test, or validation where test has no labels)")
    max_eval_samples: int | None = flag(None, "evaluate on a seeded draw of so many images, for trials", low=1)
    split_seed: int = flag(
        0, "which images are held out of a set without an evaluation split, and the draws", low=0, high=2**32 - 1
    )
    on_bad_image: Literal["raise", "skip"] = flag("raise", "an image that does not decode: stop, or leave it out")


@dataclass
class LoadingArguments:
    """How images come to the device: shared by training and evaluation."""

    streaming: bool = flag(False, "read parquet shards as they are needed, for sets larger than the disk")
    dataloader_num_workers: int | None = flag(
        None,
        "worker processes of each rank that read and decode images that are not kept decoded",
        kind=WORKERS,
        same_run=True,
    )
    per_device_eval_batch_size: int = flag(128, "evaluation batch of one process", low=1, same_run=True)


@dataclass
class SubsetArguments:
    """Which training images."""

    train_split: str | None = flag(None, "split to train on (default: train)")
    max_train_samples: int | None = flag(None, "train on a seeded draw of so many images, for trials", low=1)
    subset_fraction: float | None = flag(None, "keep this share of every class of the training split", low=0, high=1)
    subset_per_class: int | None = flag(None, "keep exactly so many training images of each class", low=1)
    subset_classes: tuple[str, ...] | None = flag(
        None, "keep these classes: names or indices by comma, or a file, one a line", kind=CLASSES
    )
    subset_seed: int = flag(0, "which images the subset filter keeps", low=0, high=2**32 - 1)


@dataclass
class PreprocessingArguments:
    """How an evaluation image becomes the model's input."""

    interpolation: Literal["auto", "bilinear", "bicubic"] = flag(
        "auto", "how images are resized; auto: as the model's image processor says, else bilinear"
    )
    crop_pct: float | None = flag(
        None, "share of the resized side that is kept, e.g. 0.875; implies --eval_resize shortest", low=0.05, high=1
    )
    eval_resize: Literal["auto", "shortest", "square"] = flag(
        "auto",
        "shortest: the shorter side, then the centre is cut; square: both sides (docs/data.md says what auto is)",
    )


@dataclass
class DataArguments(PreprocessingArguments, SubsetArguments, LoadingArguments, DatasetArguments):
    """What is done to each image."""

    decoded_cache: Literal["auto", "never"] = flag(
        "auto", "decode a set once, into the cache of `datasets`, where it fits (docs/data.md)", same_run=True
    )
    data_on_device: Literal["auto", "never"] = flag(
        "auto", "keep a decoded set in the memory of the GPU where it fits a fifth of it", same_run=True
    )
    shuffle_buffer_size: int = flag(
        32768, "images that a stream mixes, in the memory of all processes together", low=1
    )
    image_size: int | tuple[int, int] | None = flag(
        None, "input in pixels: SIDE, or HEIGHTxWIDTH (default: the model's)", kind=IMAGE_SIZE
    )
    image_mean: tuple[float, float, float] | None = flag(
        None, "mean of each channel in [0, 1], e.g. 0.485,0.456,0.406 (default: 0.5, or the model's)", kind=MEAN
    )
    image_std: tuple[float, float, float] | None = flag(
        None, "standard deviation of each channel (default: 0.5, or the model's)", kind=STD
    )
    interpolation: Literal["auto", "bilinear", "bicubic", "random"] = flag(
        "auto",
        "how images are resized, also random crops; auto: as the model's image processor says, else bilinear; random: each "
        "crop draws bilinear or bicubic, evaluation is as with auto",
    )
    random_crop: RandomCrop = flag(
        RandomCrop(),
        'none, padding=4 (pixels), scale=0.08 (smallest share of the area), with ",rule=tensorflow" as TensorFlow draws '
        "it, or simple (DeiT III)",
        kind=RANDOM_CROP,
        mendable=True,
    )
    random_flip: float = flag(0.0, "probability of a horizontal flip", low=0, high=1, mendable=True)
    randaugment: RandAugment | None = flag(
        None,
        'none, or e.g. "num_ops=2,magnitude=9", with ",ops=big_vision" the operations of arXiv 2205.01580, with '
        '",magnitude_std=0.5,increasing=true" timm\'s rand-m9-mstd0.5-inc1',
        kind=RANDAUGMENT,
        mendable=True,
    )
    trivial_augment: bool = flag(False, "TrivialAugment: one operation of random strength", mendable=True)
    three_augment: bool = flag(False, "3-Augment of DeiT III: grey, solarized or blurred", mendable=True)
    color_jitter: float = flag(
        0.0, "brightness, contrast and saturation by a factor of 1 +- this", low=0, high=1, mendable=True
    )
    random_erasing: float = flag(0.0, "probability that a box is covered up", low=0, high=1, mendable=True)
    random_erasing_mode: Literal["uniform", "pixel", "const"] = flag(
        "uniform", "what covers it: even grey levels, normal noise of each pixel, or the mean colour", mendable=True
    )
    mixup_alpha: float = flag(0.0, "mixup strength, 0 is off", low=0, mendable=True)
    cutmix_alpha: float = flag(
        0.0, "cutmix strength, 0 is off; with mixup on too, each draw takes one of the two", low=0, mendable=True
    )
    mixup_prob: float = flag(
        1.0, "probability that a draw of mixup or cutmix mixes at all", low=0, high=1, mendable=True
    )
    mixup_switch_prob: float = flag(0.5, "probability of cutmix where mixup is on too", low=0, high=1, mendable=True)
    mixup_off_epoch: int = flag(
        0, "from this epoch on (the first is 0) nothing is mixed; 0 mixes to the end", low=0, mendable=True
    )
    mixup_mode: Literal["batch", "elem"] = flag(
        "batch", "draw mixup and cutmix for a micro-batch, or for each image", mendable=True
    )
    aug_repeats: int = flag(1, "times that each image comes in a row, augmented otherwise each time", low=1)
    class_balanced: bool = flag(False, "all classes come equally often; the length of an epoch stays")


@dataclass
class TrainArguments:
    """How it is trained."""

    num_train_epochs: float | None = flag(
        None, "length of the run in passes over the training set", low=0, mendable=True
    )
    max_steps: int | None = flag(None, "length of the run in optimizer steps", low=1, mendable=True)
    global_batch_size: int = flag(128, "images an optimizer step, over all processes", low=1)
    per_device_train_batch_size: int | Literal["auto"] | None = flag(
        None,
        "most images a process takes at once; gradient accumulation is derived from it; auto: the largest power of two "
        "that fits, tried before the first step",
        kind=BATCH_SIZE,
        same_run=True,
    )
    learning_rate: float = flag(1e-3, "peak learning rate", low=0, mendable=True)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag(
        "cosine", "decay after the warm-up", mendable=True
    )
    warmup_steps: int | None = flag(None, "steps of linear warm-up", low=0, mendable=True)
    warmup_ratio: float | None = flag(None, "warm-up as a share of all steps", low=0, high=1, mendable=True)
    optim: Literal["adamw_torch", "sgd"] = flag("adamw_torch", "optimizer")
    adam_beta1: float = flag(0.9, "AdamW beta1", low=0, high=1, mendable=True)
    adam_beta2: float = flag(0.999, "AdamW beta2", low=0, high=1, mendable=True)
    momentum: float = flag(0.9, "momentum of SGD", low=0, high=1, mendable=True)
    weight_decay: float = flag(
        0.1, "decoupled weight decay (AdamW) or L2 (SGD); never on norms, biases, tokens", low=0, mendable=True
    )
    layer_decay: float = flag(
        1.0, "learning rate factor from one layer to the one below it", low=0, high=1, mendable=True
    )
    max_grad_norm: float = flag(1.0, "clip the global gradient norm, 0 is off", low=0, mendable=True)
    loss: Literal["auto", "softmax", "sigmoid"] = flag(
        "auto", "softmax over the classes, or sigmoid of each class by itself; auto: sigmoid where labels are lists"
    )
    label_smoothing_factor: float = flag(0.0, "label smoothing", low=0, high=1, mendable=True)
    ema_decay: float = flag(
        0.0, "decay of an exponential moving average of the weights, 0 is off", low=0, high=1, mendable=True
    )
    freeze: tuple[str, ...] = flag(
        (),
        'parts of the model that are not trained, e.g. "embeddings,layers.0-5"; encoder: all but the head',
        kind=FREEZE,
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory", same_run=True
    )
    torch_compile: bool = flag(False, "compile the model with torch.compile", same_run=True)
    seed: int = flag(0, "seed of initialisation, data order, augmentation and dropout", low=0, high=2**32 - 1)


@dataclass
class CourseArguments:
    """The course of a run: where it writes, how often, and what is done when something goes wrong."""

    output_dir: str | None = flag(None, "folder of the run; becomes a Hub model folder", same_run=True)
    logging_steps: int = flag(50, "steps between log lines", low=1, same_run=True)
    eval_steps: int | None = flag(
        None,
        "steps between evaluations (default: once an epoch, at most a hundred in a run)",
        low=1,
        same_run=True,
    )
    save_predictions: bool = flag(
        False, "write predictions.parquet at each evaluation: the last answers to each image", same_run=True
    )
    log_figures_steps: int | None = flag(
        None, "steps between figures of the model, and once at the end (default: none are drawn)", low=1, same_run=True
    )
    probe_steps: int | None = flag(
        None,
        "steps between few-shot evaluations of the model's features, and once at the end: ten training images of each "
        "class, three draws (default: none)",
        low=1,
        same_run=True,
    )
    save_steps: int | None = flag(
        None, "steps between checkpoints (default: once an epoch, at most a hundred in a run)", low=1, same_run=True
    )
    save_total_limit: int | None = flag(
        2, "keep only the newest so many checkpoints; none keeps all", low=1, same_run=True
    )
    on_save_error: Literal["warn", "stop"] = flag(
        "warn",
        "a checkpoint that cannot be written, for a full disk say: a warning, and training goes on; or stop",
        same_run=True,
    )
    resume_from_checkpoint: str = flag(
        "auto",
        "auto, none, the path of a checkpoint, or hub: the one that --hub_strategy checkpoint keeps on the Hub",
        same_run=True,
    )
    change: tuple[str, ...] = flag(
        (),
        "flags of optimisation, augmentation or length, by comma, that may differ from those of the checkpoint, e.g. "
        "learning_rate,max_grad_norm",
        kind=NAMES,
        same_run=True,
    )
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "a step whose gradients are not finite: stop, or leave it out and go on", same_run=True
    )
    spike_threshold: float = flag(
        10.0, "record a loss that is so many robust deviations above the last ones, 0 is off", low=0, same_run=True
    )
    report_to: tuple[str, ...] = flag(
        (), "tensorboard, wandb, trackio (several by comma) or none", kind=TRACKERS, same_run=True
    )
    run_name: str | None = flag(
        None, "name of the run in the trackers (default: the name of the output folder)", same_run=True
    )
    dry_run: bool = flag(False, "print what would be run, and stop", same_run=True)


@dataclass
class WaitingArguments:
    """How long processes wait for each other."""

    ddp_timeout: int = flag(
        1800,
        "seconds a process waits for the others, but for one that loads or decodes a set: as long as it lives",
        low=1,
        same_run=True,
    )


@dataclass
class HubArguments:
    """Sharing the finished folder."""

    push_to_hub: bool = flag(False, "upload the finished folder to the Hub", same_run=True)
    hub_model_id: str | None = flag(
        None, "repository to push to (default: the name of the output folder)", same_run=True
    )
    hub_private_repo: bool = flag(False, "create the repository as private", same_run=True)
    hub_revision: str | None = flag(None, "branch to push to and to resume from (default: main)", same_run=True)
    hub_strategy: Literal["end", "every_save", "checkpoint"] = flag(
        "end",
        "what is uploaded, in the background: the finished folder; the model at each checkpoint too; that and the whole "
        "checkpoint, in last-checkpoint/",
        same_run=True,
    )


@dataclass
class CardArguments:
    """What the model card says that no run can know."""

    license: str | None = flag(
        None,
        "licence of the model, by its name on the Hub, e.g. apache-2.0 (default: none is named)",
        kind=LICENSE,
        same_run=True,
    )
    carbon_intensity: float | None = flag(
        None,
        "grams of CO2 for each kWh of the local grid; with --power_watts the card has the run's emissions",
        low=0,
        same_run=True,
    )
    power_watts: float | None = flag(
        None, "mean power that all machines of the run draw together, as you measured it", low=0, same_run=True
    )
    expected: tuple[Expected, ...] = flag(
        (), "the results that the recipe promises", kind=EXPECTED, same_run=True, file_only=True
    )


@dataclass
class RunArguments(
    CardArguments, HubArguments, WaitingArguments, CourseArguments, TrainArguments, DataArguments, ModelArguments
):
    """All flags of run_pretrain.py and run_finetune.py, flat."""
