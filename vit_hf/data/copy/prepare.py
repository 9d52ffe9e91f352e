"""A smaller copy of a set: its images shrunk once, as parquet files that load and stream like any other set.

Job: shrink and encode images, write the files whole or not at all, go on after a kill, describe the copy.
Must not know: models, training, where a set comes from and which rows were chosen (sets/ did that).

    DIR/prepare.json                             what the copy is; written first, and compared by a later start
    DIR/data/train-00000-of-00313.parquet        rows in a seeded order, with their numbers and digests in the source;
                                                 features and bad rows in the footer
    DIR/data/validation-00000-of-00013.parquet   or test-...; in the source's order
    DIR/bad_images.jsonl                         the rows that were left out, if any were
    DIR/README.md                                the dataset card
    DIR/checksums.sha256                         for `sha256sum -c`; written last, so a copy that has it is finished

A file under its final name is whole. Every byte follows from the source and the settings, whatever the number of
processes and however often the work was interrupted.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_hf.data.copy.card import describe_copy, megabytes, summarise
from vit_hf.data.copy.plan import (
    Shard,
    Work,
    check_same,
    describe_content,
    named_splits,
    plan_shards,
    recorded_content,
)
from vit_hf.data.copy.pool import make_shards
from vit_hf.data.copy.shard import read_footer, write_text
from vit_hf.data.machine import usable_cores
from vit_hf.errors import UserError

if TYPE_CHECKING:
    from vit_hf.data.sets.names import ImageSplits


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def prepare(
    splits: "ImageSplits",
    output_dir: Path,
    *,
    source: dict[str, Any],
    shorter_side: int = 256,
    jpeg_quality: int = 90,
    rows_per_shard: int = 4096,
    num_processes: int | None = None,
    on_bad_image: str = "raise",
) -> dict[str, dict[str, int]]:
    """Writes a copy of both splits whose images have at most `shorter_side` pixels on their shorter side.

    An image that is larger is shrunk and written as JPEG; any other keeps its bytes, with its format and its
    orientation tag. A start in a folder where another one was interrupted makes only the files that are missing. The
    training rows come in another order, a function of their number alone.

    Args:
        splits: as `load_image_splits` returns them without streaming. Their training split is called train in the
            copy, the other one validation if the source calls it so (or val, valid, dev), and test in all other cases.
        output_dir: new, empty, or with the same copy, finished or not.
        source: what `splits` was loaded from: `dataset_name` (of a folder only the last part is written down) and
            whatever else decides which rows it has (`dataset_config_name`, `revision`, draws and their seed); plain
            values. The subset is added from `splits`.
        shorter_side: in pixels.
        jpeg_quality: 1 to 100.
        rows_per_shard: source rows behind each parquet file.
        num_processes: default, all cores that this process may use; 1 works in this process.
        on_bad_image: `raise`, or `skip`: the row is left out and listed in bad_images.jsonl, by its number in the
            split of the source. A later start may choose the other.

    Returns:
        {split: {"rows", "shards", "bytes", "skipped"}}: rows and parquet files of the copy, their size, and the rows
        that were left out.

    Raises:
        UserError: the folder holds something else, or a copy with other settings; an image does not decode; no image
            of a split does; the disk is full; a worker process was killed.
    """
    output_dir = Path(output_dir)
    if shorter_side < 1:
        raise UserError(f"--shorter_side {shorter_side}: must be at least 1 pixel")
    if not 1 <= jpeg_quality <= 100:
        raise UserError(f"--jpeg_quality {jpeg_quality}: must be in 1..100")
    sets, origins, names = named_splits(splits)
    numbers = {split: origin.numbers() for split, origin in origins.items()}
    digests = {split: origin.known_digests() for split, origin in origins.items()}
    digests = {split: known for split, known in digests.items() if known is not None}
    work = Work(sets, numbers, digests, splits.class_names, shorter_side, jpeg_quality, on_bad_image)
    content = describe_content(work, names, {**source, "subset": splits.subset}, rows_per_shard)
    shards = plan_shards(output_dir / "data", sets, rows_per_shard)
    recorded, finished = _look(output_dir, content, shards)
    if finished:
        print(f"{output_dir} holds this copy, finished: nothing to do")
        if recorded is not None and "row_order_seed" not in recorded:
            print(
                "note: an earlier version made it, in the order of the source and without the digests of its images, "
                "so its subsets differ from the source's; a new copy needs another --output_dir"
            )
        return summarise(shards)
    try:
        (output_dir / "data").mkdir(parents=True, exist_ok=True)
        with _alone(output_dir):
            recorded, _ = _look(output_dir, content, shards)  # again: another process may have been here since
            if recorded is None:
                write_text(output_dir / "prepare.json", json.dumps(content, indent=1) + "\n")
            checksums = make_shards(shards, work, min(num_processes or usable_cores(), len(shards)))
            describe_copy(output_dir, content, shards, checksums)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _disk_full(output_dir, shards) from None
    return summarise(shards)


def _look(output_dir: Path, content: dict[str, Any], shards: list[Shard]) -> tuple[dict[str, Any] | None, bool]:
    """What the folder's prepare.json says, and whether the copy is finished. Raises UserError where it is another one."""
    recorded = recorded_content(output_dir)
    finished = (output_dir / "checksums.sha256").exists() and all(read_footer(shard) for shard in shards)
    if recorded is not None:
        check_same(output_dir, recorded, content, finished)
    return recorded, finished


@contextlib.contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """Raises UserError where another process of this machine is writing in the folder. The lock is on the folder itself:
    a file in it may be replaced, and then two processes would hold two locks of one name."""
    if os.name != "posix":
        yield
        return
    import fcntl

    folder = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output_dir {output_dir}: another process is writing this copy; let it finish"
            ) from None
        yield
    finally:
        os.close(folder)


def _disk_full(output_dir: Path, shards: list[Shard]) -> UserError:
    """The error for a full disk: how much is free, and, from the finished files, how much is still needed."""
    footers = [footer for footer in map(read_footer, shards) if footer]
    rows, size = (sum(footer[name] for footer in footers) for name in ("rows", "bytes"))
    needed = f", about {megabytes(size / rows * (sum(map(len, shards)) - rows))} more needed" if rows else ""
    free = megabytes(shutil.disk_usage(output_dir).free)
    return UserError(
        f"--output_dir {output_dir}: the disk is full ({free} free{needed}); make room, and the same command goes on "
        f"after the {len(footers)} finished files of {len(shards)}"
    )
