"""`vit-hf predict`: the classes of image files, of a folder of them, or of a set."""

import contextlib
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vit_hf.arguments import parse, pick
from vit_hf.arguments.fields import (
    GivenModelArguments,
    LoadingArguments,
    PreprocessingArguments,
    WaitingArguments,
    flag,
)
from vit_hf.commands.given import GivenImages, GivenModel, open_files, open_images, open_model, set_settings, with_tta
from vit_hf.commands.predicted import check_output, copy_to_classes, image_files, rows_of, shown, write
from vit_hf.errors import ArgumentError


@dataclass
class PredictArguments(WaitingArguments, PreprocessingArguments, LoadingArguments, GivenModelArguments):
    """Flags of `vit-hf predict`; the model and the images are positional."""

    images: list[str] | None = flag(None, "image files, folders of them, or the name of one set (as --dataset_name)")
    top_k: int = flag(5, "how many classes are told of each image, best first", low=1)
    output_file: str | None = flag(None, "new file, .csv, .json, .jsonl or .parquet (default: a table on stdout)")
    copy_to: str | None = flag(None, "folder that gets a copy of each image file in the folder of its class")
    tta: Literal["none", "flip"] = flag("none", "flip: the mean of the logits of each image and its mirror image")
    on_bad_image: Literal["raise", "skip"] = flag("raise", "an image that does not decode: stop, or leave it out")
    dataset_config_name: str | None = flag(None, "configuration of the Hub dataset, or options of fractal")
    image_column_name: str | None = flag(None, "image column of a set (default: found by its type)")
    label_column_name: str | None = flag(None, "label column of a set (default: found by its type)")
    eval_split: str | None = flag(None, "split of a set (default: test, or validation)")
    max_eval_samples: int | None = flag(None, "a seeded draw of so many images of a set", low=1)
    split_seed: int | None = flag(
        None, "of the draw and of what is held out (default: the run's)", low=0, high=2**32 - 1
    )


def main(argv: list[str]) -> None:
    """Tells the classes of images: of files, of folders of them, or of a set."""
    args = parse(
        PredictArguments, argv, prog="vit-hf predict", description=main.__doc__, positional=("model", "images")
    )
    check_output(args.output_file, args.copy_to)
    files = image_files(args.images)
    if files is None and args.copy_to is not None:
        raise ArgumentError(f"--copy_to {args.copy_to}: is for image files and folders, not for a set")
    from vit_hf.evaluation.answers import best_classes
    from vit_hf.progress import at_terminal, progress
    from vit_hf.training.accelerator import build_accelerator, end

    accelerator = build_accelerator(args.ddp_timeout)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        given = with_tta(open_model(args.model, args.revision, args.trust_remote_code), args.tta)
        images = _opened(given, accelerator, files, args)
    model, several = given.model.to(accelerator.device), has_several(given)
    hidden = not accelerator.is_main_process or not at_terminal()
    share = -(-len(images.rows) // accelerator.num_processes)
    with progress(share, "Predicting", "image", disable=hidden) as bar, accelerator.autocast():
        look = functools.partial(best_classes, several=several, seen=bar.update)
        answers = look(model, images.batches, images.normalise, accelerator, args.top_k)
    left_out = images.report.collect().get("bad_images", 0)
    if accelerator.is_main_process:
        _finish(args, given, images, files, answers, left_out)
    end(accelerator)


def _opened(given: GivenModel, accelerator: Any, files: list[str] | None, args: PredictArguments) -> GivenImages:
    """The images that the words name."""
    from vit_hf.data.feed import LoadingSettings
    from vit_hf.data.preprocessing import PreprocessingSettings

    inputs, loading = pick(PreprocessingSettings, args), pick(LoadingSettings, args)
    if files is not None:
        return open_files(given, accelerator, files, inputs, loading)
    sets = set_settings(args, args.model, dataset_name=args.images[0])
    return open_images(given, accelerator, sets, inputs, loading, class_index_of=lambda names: None)


def has_several(given: GivenModel) -> bool:
    """Whether an image may have several classes, as transformers' pipelines decide it."""
    from vit_hf.training.objective import loss_of

    config = given.model.config
    return loss_of(config) == "sigmoid" or config.num_labels == 1


def _finish(
    args: PredictArguments,
    given: GivenModel,
    images: GivenImages,
    files: list[str] | None,
    answers: Any,
    left_out: int,
) -> None:
    """The table or the file, the copies, and what is to be said, of the main process."""
    known = images.splits.class_names if images.splits is not None else None
    rows = rows_of(answers, given.class_names, files, images.rows.source_rows, known)
    if args.output_file is None:
        print("\n".join(shown(rows)))
    else:
        write(rows, Path(args.output_file))
        print(f"{len(rows)} images, written to {args.output_file}", file=sys.stderr)
    if args.copy_to is not None:
        count = copy_to_classes(rows, given.class_names, Path(args.copy_to))
        print(f"{count} copies in {args.copy_to}", file=sys.stderr)
    if left_out:
        print(f"left out: {left_out} images that do not decode", file=sys.stderr)
