"""Whether what a command will write can be written, asked before it works."""

import contextlib
import os
import tempfile
from pathlib import Path

from vit_hf.errors import UserError


def check_folder(folder: str | Path, flag: str = "--output_dir") -> None:
    """Tries to write into a folder, which need not exist yet; leaves nothing behind.

    Args:
        flag: that names the folder.

    Raises:
        UserError: nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":  # the main process writes
        return
    folder = Path(folder)
    made: list[Path] = []
    try:
        for path in reversed((folder, *folder.parents)):
            if not path.is_dir():
                path.mkdir(exist_ok=True)
                made.append(path)
        tempfile.TemporaryFile(dir=folder).close()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{flag}: {path} is a file; name a folder") from None
    except OSError as error:
        raise UserError(
            f"{flag}: nothing can be written to {folder} ({error.strerror}); name another folder"
        ) from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another command may have begun to write there
                path.rmdir()
