"""From the indices of a micro-batch to its uint8 images on the host: gathered from what is decoded, or read and
decoded, with other rows in place of bad ones. This module must not know which sample comes where.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_hf.arguments import RandomCrop
from vit_hf.data.augment.crops import resized_crop_boxes
from vit_hf.data.cache import Decoded
from vit_hf.data.decode import decode_row
from vit_hf.data.order import BatchIndices
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.randomness import CROP_LEFT, CROP_TOP, REPLACEMENT, sample_keys, uniform
from vit_hf.data.rows.interface import Rows
from vit_hf.errors import MEMORY, UserError

DEVICE_SHARE = 0.2  # of a device's memory: a decoded set that takes no more is kept there


class ImageBatches(torch.utils.data.Dataset):
    """Micro-batches on the host: batches[wanted] -> {pixel_values uint8 (B, H, W, C), labels int64 (B,) or bool (B, K),
    visit, index int64 (B,), valid bool (B,)}, and beside them "bad", the rows that did not decode, {row: reason}, "retried", and "error", a line
    that ends the run or None. Images of a decoded set have the size at which they are kept. Of a set that lies on the
    device, `rows` (B,) take the place of pixel_values.

    Args:
        rows: a table, a stream or a formula.
        decoded: all of it (cache.py); None decodes batch by batch.
        crop: the random crop, where it is cut while decoding.
        on_bad_image: `raise`, or `skip`: a training row is replaced by another, chosen from (seed, visit, index); an
            evaluation row does not count.
        training: whether bad rows are replaced.
    """

    def __init__(
        self,
        rows: Rows,
        preprocessing: Preprocessing,
        decoded: Decoded | None = None,
        *,
        seed: int = 0,
        crop: RandomCrop = RandomCrop(),
        on_bad_image: str = "raise",
        training: bool = False,
    ):
        self.rows, self.preprocessing, self.seed = rows, preprocessing, seed
        self.crop, self.on_bad_image, self.training = crop, on_bad_image, training
        self.decoded, self.bad = decoded, {} if decoded is None else decoded.bad
        self.bad_rows = np.array(sorted(self.bad), dtype=np.int64)
        self.on_device: Tensor | None = None
        if self.bad and on_bad_image == "raise":
            raise self.error(self.bad)

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, bad: dict[int, str]) -> UserError:
        """The error for a run that does not skip bad images."""
        row, reason = min(bad.items())
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        hint = "--on_bad_image skip leaves such rows out"
        if self.on_bad_image == "skip":
            hint = "and no row that does was found in its place"
        return UserError(f"image in row {row} does not decode{more}: {reason}; {hint}")

    def place_on_device(self, device: torch.device) -> None:
        """Moves a decoded set to the device, where it fits DEVICE_SHARE of its memory."""
        if self.decoded is None or device.type != "cuda":
            return
        free, total = torch.cuda.mem_get_info(device)
        if self.decoded.nbytes <= min(DEVICE_SHARE * total, free / 2):
            self.on_device = torch.empty((len(self), *self.decoded.size, 3), dtype=torch.uint8, device=device)
            for start in range(0, len(self), 8192):
                part = torch.from_numpy(self.decoded[start : start + 8192])
                self.on_device[start : start + len(part)] = part.to(device)
            torch.cuda.synchronize(device)  # it is read on another stream

    def __getitem__(self, wanted: BatchIndices) -> dict[str, Any]:
        bad: dict[int, str] = {}
        index, valid, error, batch = wanted.index.copy(), wanted.valid.copy(), None, {}
        try:
            if self.decoded is None:
                pixels, labels = self._decode(wanted, valid, bad)
                batch["pixel_values"] = torch.from_numpy(pixels)
            else:
                self._pass_over(wanted, index, valid, bad)
                labels = self.rows.labels[index]
                if self.on_device is None:
                    batch["pixel_values"] = torch.from_numpy(self.decoded[index])
                else:
                    batch["rows"] = torch.from_numpy(index)
            batch["labels"] = torch.from_numpy(labels)
        except UserError as caught:  # may be in a worker: a line is all that should come out of it
            error = str(caught)
        except MemoryError:
            error = MEMORY
        if bad and (self.on_bad_image == "raise" or (self.training and not valid.all())):
            error = str(self.error(bad))
        retried, self.rows.retried = self.rows.retried, []
        batch |= {"visit": wanted.visit, "index": wanted.index, "valid": valid}
        batch = {name: torch.as_tensor(value) for name, value in batch.items()}
        return {**batch, "bad": bad, "retried": retried, "error": error}

    def _pass_over(self, wanted: BatchIndices, index: np.ndarray, valid: np.ndarray, bad: dict[int, str]) -> None:
        """Puts good rows of a decoded set where the index names bad ones."""
        for place in np.flatnonzero(np.isin(index, self.bad_rows)) if self.bad else ():
            attempt = 0
            while (row := int(index[place])) in self.bad and attempt < 100:
                bad[row] = self.bad[row]
                index[place] = self._another(wanted, place, attempt)
                attempt += 1
            valid[place] &= self.training and attempt < 100

    def _another(self, wanted: BatchIndices, place: int, attempt: int) -> int:
        """A row in place of one that does not decode."""
        key = sample_keys(self.seed, wanted.visit[place : place + 1], wanted.index[place : place + 1])
        return int(uniform(key, REPLACEMENT + attempt)[0] * len(self))

    def _decode(self, wanted: BatchIndices, valid: np.ndarray, bad: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (B, H, W, 3), cropped where that is asked for, and labels (B,) or (B, K)."""
        index = wanted.index.copy()
        pixels = np.zeros((len(index), *self.preprocessing.image_size, 3), dtype=np.uint8)
        keys = sample_keys(self.seed, wanted.visit, wanted.index)
        bicubic = self.preprocessing.bicubic_crops(keys)
        left = np.arange(len(index))
        for attempt in range(100):
            images, found = self.rows.read(index[left])
            if attempt == 0:
                labels = found
            labels[left] = found
            again = []
            for place, image in zip(left.tolist(), images):
                cut = self._cut_of(keys[place : place + 1])
                result = decode_row(image, self.preprocessing, **cut, bicubic=bicubic[place])
                if isinstance(result, str):
                    bad[int(index[place])] = result
                    again.append(place)
                else:
                    pixels[place] = result
            if not again or not self.training or self.on_bad_image == "raise":
                break
            left = np.array(again)
            index[left] = [self._another(wanted, place, attempt) for place in again]
        valid[again] = False
        return pixels, labels

    def _cut_of(self, key: np.ndarray) -> dict[str, Any]:
        """What `decode_row` is told of a sample's random crop."""
        if self.crop.kind == "scale":
            return {"box_of": lambda size: tuple(resized_crop_boxes(key, size, self.crop)[0].tolist())}
        if self.crop.kind == "simple":
            return {"padding": int(self.crop.amount), "place": uniform(key, np.array([CROP_TOP, CROP_LEFT]))[0]}
        return {}
