"""Image files as rows without labels.

Must not know: which files are wanted, pixels.
"""

from typing import Any

import numpy as np

from vit_hf.data.rows.retries import patiently
from vit_hf.data.rows.table import file_bytes
from vit_hf.errors import UserError


class FileRows:
    """Files by index, each read when it is asked for; every label is 0.

    Args:
        paths: of N files.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.source_rows = np.arange(len(paths))
        self.source_name = ("", "")
        self.retried: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The images {"bytes", "path"} and labels int64 (B,) at `index`. A file that cannot be read stays a path, and
        fails where it is decoded."""
        images: list[dict[str, Any]] = []
        for path in (self.paths[row] for row in index.tolist()):
            try:
                content = patiently(lambda path=path: file_bytes(path), path, self.retried)
            except UserError:
                content = None
            images.append({"bytes": content, "path": path})
        return images, np.zeros(len(index), dtype=np.int64)
