"""A smaller copy of a set: its images shrunk once, as parquet files that load and stream like any other set.

Job: shrink and encode images, write the files whole or not at all, go on after a kill, describe the copy.
Must not know: models, training, where a set comes from and which rows were chosen (sources.py and subset.py did that).

    DIR/prepare.json                             what the copy is; written first, and compared by a later start
    DIR/data/train-00000-of-00313.parquet        rows in the source's order; features and bad rows in the footer
    DIR/data/validation-00000-of-00013.parquet   or test-...
    DIR/bad_images.jsonl                         the rows that were left out, if any were
    DIR/README.md                                the dataset card
    DIR/checksums.sha256                         for `sha256sum -c`; written last, so a copy that has it is finished

A file under its final name is whole. Every byte follows from the source and the settings, whatever the number of
processes and however often the work was interrupted.
"""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tqdm.auto import tqdm

import vit_hf
from vit_hf.data.decode import DECODE_ERRORS, open_image
from vit_hf.data.rows import TableRows
from vit_hf.errors import UserError

if TYPE_CHECKING:  # it imports torch, and each of the worker processes imports this file
    from vit_hf.data.sources import ImageSplits

ROWS_PER_GROUP = 100  # what a reader of a stream has to fetch and hold at least
BAD_ROWS = "vit_hf.bad_images"  # key in a file's footer: the rows of its range that it lacks, as JSON
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file of the copy: rows start..stop-1 of a split."""

    split: str
    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every shard is made with."""

    sets: dict[str, datasets.Dataset]  # by the split's name in the copy
    class_names: list[str]
    shorter_side: int
    jpeg_quality: int
    on_bad_image: str


class _Stopped(Exception):
    """Another process failed, or the user stopped the work."""


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
    orientation tag. A start in a folder where another one was interrupted makes only the files that are missing.

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
        on_bad_image: `raise`, or `skip`: the row is left out and listed in bad_images.jsonl, by its number in `splits`.
            A later start may choose the other.

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
    sets, origins = _named(splits)
    work = _Work(sets, splits.class_names, shorter_side, jpeg_quality, on_bad_image)
    content = _content(work, origins, {**source, "subset": splits.subset}, rows_per_shard)
    shards = _shards(output_dir / "data", sets, rows_per_shard)
    recorded = _recorded(output_dir)
    finished = (output_dir / "checksums.sha256").exists() and all(_footer(shard) for shard in shards)
    if recorded is not None:
        _check_same(output_dir, recorded, content, finished)
    if finished:
        print(f"{output_dir} holds this copy, finished: nothing to do")
        return _summary(shards)
    try:
        (output_dir / "data").mkdir(parents=True, exist_ok=True)
        if recorded is None:
            _write_text(output_dir / "prepare.json", json.dumps(content, indent=1) + "\n")
        with _alone(output_dir):
            digests = _make(shards, work, min(num_processes or _cores(), len(shards)))
            _describe(output_dir, content, shards, digests)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _disk_full(output_dir, shards) from None
    return _summary(shards)


@contextlib.contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """Raises UserError where another process is writing the same copy."""
    with open(output_dir / "prepare.json") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--output_dir {output_dir}: another process is writing this copy; let it finish"
                ) from None
        yield


# ---- what the copy is ----


def _named(splits: "ImageSplits") -> tuple[dict[str, datasets.Dataset], dict[str, str]]:
    """The splits, and what the source calls them, by their names in the copy: names that are found without a flag."""
    evaluation = "validation" if splits.eval_split in ("validation", "val", "valid", "dev") else "test"
    sets = {"train": splits.train, evaluation: splits.eval}
    origins = {"train": splits.train_split, evaluation: splits.eval_split}
    return {name: rows for name, rows in sets.items() if rows is not None}, origins


def _content(work: _Work, origins: dict[str, str], source: dict[str, Any], rows_per_shard: int) -> dict[str, Any]:
    """What decides the bytes of the copy, for prepare.json, in plain values."""
    from vit_hf.data.sources import NAMED_SETS

    name = source["dataset_name"]
    if name not in NAMED_SETS and os.path.isdir(os.path.expanduser(name)):
        # "./" as on the command line: a folder, not a set of that name; where it lies is this machine's own business
        source = {**source, "dataset_name": f"./{os.path.basename(os.path.abspath(os.path.expanduser(name)))}"}
    labels = {split: dataset.with_format("numpy")["label"][:] for split, dataset in work.sets.items()}
    content = {
        "source": source,
        "shorter_side": work.shorter_side,
        "jpeg_quality": work.jpeg_quality,
        "rows_per_shard": rows_per_shard,
        "splits": {
            split: {
                "source": origins[split],
                "rows": len(values),
                "labels_sha256": hashlib.sha256(values.astype("<i8").tobytes()).hexdigest(),
            }
            for split, values in labels.items()
        },
        "classes": {
            "number": len(work.class_names),
            "sha256": hashlib.sha256("\n".join(work.class_names).encode()).hexdigest(),
        },
        "versions": {"vit_hf": vit_hf.__version__, "pillow": PIL.__version__},
    }
    return json.loads(json.dumps(content))  # as it will be read back


def _recorded(output_dir: Path) -> dict[str, Any] | None:
    """What the folder's prepare.json says; None where there is nothing yet.

    Raises:
        UserError: the folder holds something else.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; name a folder")
    try:
        return json.loads((output_dir / "prepare.json").read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        raise UserError(f"--output_dir {output_dir}: its prepare.json cannot be read; choose another folder") from None
    ours = ("data", ".prepare.json.tmp")  # a kill may have come before prepare.json was whole
    others = sorted(path.name for path in output_dir.iterdir() if path.name not in ours) if output_dir.exists() else []
    data = output_dir / "data"
    if others or (data.exists() and (not data.is_dir() or any(data.iterdir()))):
        raise UserError(
            f"--output_dir {output_dir}: holds {(others or ['data'])[0]} and no prepare.json, so it is no copy that "
            "could be gone on with; choose a new or an empty folder"
        )
    return None


def _check_same(output_dir: Path, recorded: dict[str, Any], content: dict[str, Any], finished: bool) -> None:
    """Raises UserError where the folder's copy is another one. Other versions of the programs write other bytes, so
    they may not go on with a copy; a finished one is not touched."""
    then, now = _flat(recorded), _flat(content)
    different = [
        f"{name} {_short(then.get(name))} then, {_short(now.get(name))} now"
        for name in dict.fromkeys([*now, *then])
        if then.get(name) != now.get(name) and not (finished and name.startswith("versions."))
    ]
    if different:
        raise UserError(
            f"--output_dir {output_dir}: holds another copy ({'; '.join(different[:5])}); choose another folder, or "
            "give the same flags to go on"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; parts that are None or empty are left out."""
    if isinstance(value, dict):
        return {key: item for part in value for key, item in _flat(value[part], f"{name}.{part}".strip(".")).items()}
    return {name: value} if value not in (None, []) else {}


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shards(folder: Path, sets: dict[str, datasets.Dataset], rows_per_shard: int) -> list[_Shard]:
    shards = []
    for split, dataset in sets.items():
        starts = range(0, len(dataset), rows_per_shard)
        for number, start in enumerate(starts):
            path = folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
            shards.append(_Shard(split, path, start, min(start + rows_per_shard, len(dataset))))
    return shards


# ---- one image ----


def _copied(value: dict[str, Any], shorter_side: int, jpeg_quality: int) -> dict[str, Any]:
    """A row's image {"bytes", "path"} as it is in the copy. Raises one of DECODE_ERRORS."""
    data, path = value["bytes"], value["path"]
    if data is None and path is None:
        raise ValueError("neither bytes nor a path")
    if data is None:
        data = Path(path).read_bytes()
    image = _shrunk(data, shorter_side)
    if image is not None:
        # Chroma at half the resolution, as nearly all photographs have it: a quarter to a third fewer bytes to store
        # and to decode than 4:4:4. An empty comment, or else Pillow would copy the source's.
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=jpeg_quality, subsampling="4:2:0", comment=b"")
        data = encoded.getvalue()
    # the name alone, also of a file in an archive: zip://class/a.jpg::/home/...
    return {"bytes": data, "path": path and os.path.basename(path.split("::")[0])}


def _shrunk(data: bytes, shorter_side: int) -> Image.Image | None:
    """The image upright in RGB, its shorter side `shorter_side` pixels; None where it has no more than that.

    Bicubic: Lanczos takes a third longer and rings more around edges. A JPEG that is at least four times too large is
    decoded at a half, a quarter or an eighth, and is still at least twice too large for the resize, which itself starts
    by averaging whole pixels down to three times the size. On photographs both together are a quarter of a grey level
    off the plain resize, in the mean; the JPEG that is then written is two or three off.
    """
    with Image.open(io.BytesIO(data)) as image:
        short = min(image.size)
        if image.format == "JPEG" and short >= 4 * shorter_side:
            width, height = _size(image.size, shorter_side)
            image.draft(None, (2 * width, 2 * height))
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
            return ImageOps.exif_transpose(small)
    image = open_image({"bytes": data, "path": None})  # also one that stays as it is: it must decode
    if short <= shorter_side:
        return None
    return image.resize(_size(image.size, shorter_side), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """(width, height) after the resize, rounded down as the evaluation's resize does: that one then changes nothing."""
    short, long = sorted(size)
    sides = (shorter_side, int(shorter_side * long / short))
    return sides if size[0] <= size[1] else sides[::-1]


# ---- one file ----


def _finish(shard: _Shard, rows: TableRows, work: _Work, count: Callable[[int], Any]) -> str:
    """Writes a shard unless an earlier start did, and returns the SHA-256 (hex) of the file.

    Args:
        count: told the number of rows done since the last call.
    """
    if _footer(shard) is None:
        _write(shard, rows, work, count)
    else:
        count(len(shard))
    with open(shard.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(shard: _Shard, rows: TableRows, work: _Work, count: Callable[[int], Any]) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=work.class_names)}
    schema = datasets.Features(features).arrow_schema
    # images are compressed already, and no two are the same
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["label"], "write_page_index": True}
    bad = []
    with _whole(shard.path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for start in range(shard.start, shard.stop, ROWS_PER_GROUP):
            index = np.arange(start, min(start + ROWS_PER_GROUP, shard.stop))
            kept = []
            for row, value, label in zip(index.tolist(), *rows.read(index)):
                try:
                    image = _copied(value, work.shorter_side, work.jpeg_quality)
                    kept.append({"image": image, "label": int(label)})
                except DECODE_ERRORS as error:
                    bad.append(_bad_row(shard.split, row, value["path"], error, work.on_bad_image))
                count(1)
            if kept:
                writer.write_table(pa.Table.from_pylist(kept, schema=schema))
        writer.add_key_value_metadata({BAD_ROWS: json.dumps(bad)})


def _bad_row(split: str, row: int, path: str | None, error: Exception, on_bad_image: str) -> dict[str, Any]:
    """The record of a row that is left out. Raises UserError where none may be."""
    # without the file's folder and without an address in memory: the copy holds nothing of this machine
    text = re.sub(r" <[^>]* at 0x\w+>", "", getattr(error, "strerror", None) or str(error))
    reason = f"{type(error).__name__}: {' '.join(text.split())}"
    if on_bad_image == "raise":
        raise UserError(
            f"{split} split, row {row}{f', file {path}' if path else ''}: the image cannot be copied: {reason}; "
            "repair it, or leave such rows out with --on_bad_image skip"
        )
    return {"split": split, "row": row, "file": path and os.path.basename(path), "reason": reason}


def _footer(shard: _Shard) -> dict[str, Any] | None:
    """Rows, bytes and bad rows of a shard; None where it is missing or is not the whole of its rows."""
    try:
        footer = pq.read_metadata(shard.path)
        bad = json.loads(footer.metadata[BAD_ROWS.encode()])
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError):
        return None
    if footer.num_rows + len(bad) != len(shard):
        return None
    return {"rows": footer.num_rows, "bytes": shard.path.stat().st_size, "bad": bad}


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is complete and on the disk, and is removed when it does not get there."""
    # A name that no pattern for data files matches. What a kill leaves under it, the next start overwrites.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    with _whole(path) as file:
        file.write(text.encode())


# ---- all files, on all cores ----


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make(shards: list[_Shard], work: _Work, num_processes: int) -> list[str]:
    """Makes the shards that are missing, and returns the SHA-256 of each.

    Raises:
        UserError: an image cannot be copied; a worker process was killed.
        OSError: a file cannot be written.
    """
    with tqdm(total=sum(map(len, shards)), unit="image", desc="preparing", dynamic_ncols=True) as bar:
        if num_processes == 1:
            rows = {split: TableRows(dataset) for split, dataset in work.sets.items()}
            return [_finish(shard, rows[shard.split], work, bar.update) for shard in shards]
        # Spawned, not forked: the libraries have threads by now, which a fork would leave in the middle of something.
        context = multiprocessing.get_context("spawn")
        done, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
        state = (work, done, stop, os.getpid())
        with ProcessPoolExecutor(num_processes, context, initializer=_start_worker, initargs=state) as pool:
            try:
                futures = [pool.submit(_work_on, shard) for shard in shards]
                waiting = set(futures)
                while waiting:
                    ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                    bar.update(done.value - bar.n)
                    for future in ended:
                        future.result()
                return [future.result() for future in futures]
            except BaseException as error:
                stop.value = 1  # a worker in the middle of a shard removes it
                pool.shutdown(cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise UserError(
                        "a worker process was killed (is there enough memory?); the same command goes on after the "
                        "finished files"
                    ) from None
                raise


_worker: dict[str, Any] = {}  # in a worker process: what `_work_on` needs besides the shard


def _start_worker(work: _Work, done: Any, stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    if sys.platform == "linux":  # a parent that is killed tells nobody
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    _worker.update(work=work, done=done, stop=stop, rows={name: TableRows(rows) for name, rows in work.sets.items()})


def _work_on(shard: _Shard) -> str:
    def count(rows: int) -> None:
        with _worker["done"].get_lock():
            _worker["done"].value += rows
        if _worker["stop"].value:
            raise _Stopped

    return _finish(shard, _worker["rows"][shard.split], _worker["work"], count)


# ---- around the files ----


def _summary(shards: list[_Shard]) -> dict[str, dict[str, int]]:
    summary: dict[str, dict[str, int]] = {}
    for shard in shards:
        footer = _footer(shard)
        total = summary.setdefault(shard.split, {"rows": 0, "shards": 0, "bytes": 0, "skipped": 0})
        for name, value in (
            ("rows", footer["rows"]), ("shards", 1), ("bytes", footer["bytes"]), ("skipped", len(footer["bad"])),
        ):  # fmt: skip
            total[name] += value
    return summary


def _describe(output_dir: Path, content: dict[str, Any], shards: list[_Shard], digests: list[str]) -> None:
    """Writes what stands beside the parquet files; the checksums last, which say that the copy is finished.

    Raises:
        UserError: a split has no row left.
    """
    summary = _summary(shards)
    for split, total in summary.items():
        if total["rows"] == 0:
            raise UserError(f"{split} split: none of its {total['skipped']} images decodes; look at --dataset_name")
    bad = [row for shard in shards for row in _footer(shard)["bad"]]
    if bad:
        _write_text(output_dir / "bad_images.jsonl", "".join(f"{json.dumps(row)}\n" for row in bad))
        print(f"warning: {len(bad)} images are left out: {output_dir / 'bad_images.jsonl'}", file=sys.stderr)
    _write_text(output_dir / "README.md", _card(content, summary))
    lines = [f"{digest}  data/{shard.path.name}\n" for shard, digest in zip(shards, digests)]
    _write_text(output_dir / "checksums.sha256", "".join(lines))


def _card(content: dict[str, Any], summary: dict[str, dict[str, int]]) -> str:
    """The dataset card. Without sizes in its front matter: the parquet files say them, and the classes, themselves."""
    source, side, versions = content["source"], content["shorter_side"], content["versions"]
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in summary)
    splits = "".join(
        f"| {split} | {content['splits'][split]['source']} | {total['rows']:,} | {total['skipped']:,} "
        f"| {total['shards']} | {_megabytes(total['bytes'])} |\n"
        for split, total in summary.items()
    )
    subset = source.get("subset") or {}
    rows = "All rows of the training split"
    if subset:
        rule, digest = json.dumps(subset["rule"]), subset["subset_hash"]
        rows = f"A subset of the training split, `{rule}` with the hash `{digest}`"
    if any(total["skipped"] for total in summary.values()):
        rows += ", without the images that do not decode, which bad_images.jsonl lists"
    rows += "; in the order of the source.\n"
    others = {name: value for name, value in source.items() if name not in ("dataset_name", "subset") and value}
    if others:
        rows += "\n" + "".join(f"- {name}: `{value}`\n" for name, value in others.items())
    return f"""---
configs:
- config_name: default
  data_files:
{files}task_categories:
- image-classification
---

# {source["dataset_name"].removeprefix("./")}, shorter side {side}

A copy of {_link(source["dataset_name"])} for image classification with {content["classes"]["number"]:,} classes,
in which the shorter side of an image has at most {side} pixels. Larger images were resized (bicubic, aspect kept)
and written as JPEG of quality {content["jpeg_quality"]} with 4:2:0 chroma, upright, in RGB and without metadata;
all others have their original bytes.

| split | of the source | rows | left out | files | size |
|---|---|---|---|---|---|
{splits}
{rows}
The terms of use are those of the source. Written by vit_hf {versions["vit_hf"]} with Pillow {versions["pillow"]};
`sha256sum -c checksums.sha256` checks the files.
"""


def _link(name: str) -> str:
    from vit_hf.data.sources import GENERATED_SETS, HUB_SETS

    if name.startswith("./"):
        return f"the folder `{name[2:]}`"
    if name in GENERATED_SETS:
        return f"the generated set `{name}`"
    path = HUB_SETS.get(name, name)
    return f"[{path}](https://huggingface.co/datasets/{path})"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _disk_full(output_dir: Path, shards: list[_Shard]) -> UserError:
    """The error for a full disk: how much is free, and, from the finished files, how much is still needed."""
    footers = [footer for footer in map(_footer, shards) if footer]
    rows, size = (sum(footer[name] for footer in footers) for name in ("rows", "bytes"))
    needed = f", about {_megabytes(size / rows * (sum(map(len, shards)) - rows))} more needed" if rows else ""
    free = _megabytes(shutil.disk_usage(output_dir).free)
    return UserError(
        f"--output_dir {output_dir}: the disk is full ({free} free{needed}); make room, and the same command goes on "
        f"after the {len(footers)} finished files of {len(shards)}"
    )
