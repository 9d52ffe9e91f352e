"""A small real set whose images have several labels: two handwritten digits side by side, one, or none."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = [str(number) for number in range(10)]


def pictures(number: int, seed: int) -> dict[str, list]:
    """{"image": 32x32, "labels": each digit that is seen, once, "row"}; every eighth picture is empty."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    found: dict[str, list] = {"image": [], "labels": [], "row": []}
    for row in range(number):
        canvas, shown = np.zeros((32, 32), dtype=np.uint8), []
        for place in range(0 if row % 8 == 7 else 1 + row % 2):
            digit = int(rng.integers(len(digits.images)))
            small = np.kron(digits.images[digit], np.ones((2, 2)))
            canvas[8:24, 16 * place : 16 * place + 16] = np.clip(small * 16, 0, 255)
            shown.append(int(digits.target[digit]))
        found["image"].append(Image.fromarray(canvas).convert("RGB"))
        found["labels"].append(sorted(set(shown), reverse=True))
        found["row"].append(row)
    return found


def write_pairs(
    folder: Path, sizes: dict[str, int], label: datasets.features.features.FeatureType | None = None
) -> Path:
    """A folder of parquet, one file of small row groups a split."""
    features = {"image": datasets.Image(), "labels": label or datasets.List(datasets.ClassLabel(names=NAMES))}
    features["row"] = datasets.Value("int64")
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, number) in enumerate(sizes.items()):
        rows = pictures(number, seed)
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        dataset.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"), batch_size=16)
    return folder
