"""Errors that are the user's to change, and how a script or a command ends with one.

This module must not import torch or anything else of vit_hf.
"""

import contextlib
import difflib
import errno
import functools
import os
import sys
import typing


class UserError(Exception):
    """A mistake of the user or of the surroundings: printed as one line, without a traceback; exit status 1."""

    exit_status = 1


class ArgumentError(UserError):
    """Flags that cannot be right, whatever the data: exit status 2."""

    exit_status = 2


@contextlib.contextmanager
def model_errors(preset: str | None = None, model: str | None = None) -> typing.Iterator[None]:
    """Turns what models and the libraries that load them raise for a wrong name, field or file into one line.

    Args:
        preset: it is known from the flags alone, and so are its mistakes: exit status 2.
        model: Hub id or folder of given weights.
    """
    where = f"model {model}" if model else f"--preset {preset}"
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise (UserError if model else ArgumentError)(f"{where}: {' '.join(str(error).split())}") from None
    except Exception as error:
        libraries = ("safetensors", "huggingface_hub", "httpx")
        if not isinstance(error, OSError | KeyError | RuntimeError) and not type(error).__module__.startswith(
            libraries
        ):
            raise
        raise UserError(f"{where} cannot be loaded: {' '.join(str(error).split())[:400]}") from None


# errors of the system that are not ours: no space, no permission, read-only, over quota
SURROUNDINGS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT)
MEMORY = (
    "this process found no more memory (RAM): lower --dataloader_num_workers, --per_device_train_batch_size or "
    "--per_device_eval_batch_size, or run on a machine with more"
)


TOLD = "told"  # argument of a KeyboardInterrupt of which a line was printed already


def exit_with(entry: typing.Callable[[], None]) -> typing.NoReturn:
    """Runs a script or a command and ends the process: a user's error becomes one line and its exit status."""
    status = 0
    try:
        entry()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr)
        status = error.exit_status
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        print(
            f"error: {error.strerror}: {error.filename or 'while writing'}; look at the flag that says where files go (--output_dir, --output_file)",
            file=sys.stderr,
        )
        status = 1
    except MemoryError as error:
        print(f"error: {MEMORY}{f' ({error})' if str(error) else ''}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as stop:
        if stop.args != (TOLD,) and os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


@functools.cache  # once for a name
def note_near(name: str, known: tuple[str, ...], what: str) -> None:
    """Before the Hub is asked for a name without an owner, which is slow without a connection: says where it looks like
    the mistyped name of something that is here (`what`: a set, a preset). A Hub id may have no owner, so it is asked all
    the same."""
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    if not close or name in known or "/" in name or os.path.exists(name) or os.environ.get("RANK", "0") != "0":
        return
    print(
        f"note: {name} is no {what} and no folder, so the Hub is asked; did you mean {' or '.join(close)}?",
        file=sys.stderr,
    )


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Says which known names come closest: "did you mean 'a' or 'b'?", or else lists the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close = close or [k for k in known if name and (name in k or k in name)][:5]
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known: {', '.join(known)}" if len(known) <= 12 else "--help lists the known ones"
