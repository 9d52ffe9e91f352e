"""Files that are written once: hashed on their way to the disk, and there when the call returns.

Tensors are written in the safetensors format by this module itself, since that library's own writer does not hash, so that
every file would have to be read again. Source: the format's page, https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Description = dict[str, int | str]  # {"bytes": ..., "sha256": ...}
CHUNK_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Description:
    """Writes tensors on the CPU as one safetensors file, which transformers too reads as one of torch's.

    Raises:
        OSError: of the disk; what is written of the file by then stays.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # the widest first: all aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, _chunks([struct.pack("<Q", len(text)) + text, *(_bytes(tensors[name]) for name in names)]))


def write_bytes(path: Path, content: bytes) -> Description:
    """Writes a small file. Raises OSError."""
    return _write(path, _chunks([content]))


def describe(path: Path) -> Description:
    """Size and SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, chunks: Iterable[memoryview]) -> Description:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:  # both calls let other threads run
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in map(memoryview, parts):
        for start in range(0, len(part), CHUNK_BYTES):
            yield part[start : start + CHUNK_BYTES]
