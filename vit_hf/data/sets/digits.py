"""The `digits` set: scikit-learn's 1,797 real handwritten digits as a cached `datasets.DatasetDict`.

Job: give the 8x8 images and their labels in the shape every other set has (PNG bytes, ClassLabel, fixed splits).
Must not know: models, training, image sizes, subset rules.
"""

import datasets
import numpy as np

from vit_hf.data.sets.glyphs import png_bytes

CLASS_NAMES = [str(digit) for digit in range(10)]
TEST_FRACTION = 0.25
SPLIT_SEED = 0  # part of what the set is: it never follows a run's seed


class DigitsBuilder(datasets.GeneratorBasedBuilder):
    """Builder of the digits set; raise VERSION whenever a pixel, a label or the split changes."""

    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name="train", gen_kwargs={"split": "train"}),
            datasets.SplitGenerator(name="test", gen_kwargs={"split": "test"}),
        ]

    def _generate_examples(self, split: str):
        # Imported here because a cached set must not pay a second for scikit-learn.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        source = load_digits()
        train_rows, test_rows = train_test_split(
            np.arange(len(source.target)), test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=source.target
        )
        for row in np.sort(train_rows if split == "train" else test_rows):
            pixels = np.rint(source.images[row] * (255 / 16)).astype(np.uint8)
            yield int(row), {"image": {"bytes": png_bytes(pixels), "path": None}, "label": int(source.target[row])}


def load_digits_splits(cache_dir: str | None = None) -> datasets.DatasetDict:
    """Return the digits as splits `train` (1,347 rows) and `test` (450 rows), made once and then read from the cache.

    Each row is `image`, a PNG of (8, 8) uint8 grey pixels (the source's 0..16 scaled to 0..255, light strokes on
    black), and `label`, a ClassLabel "0".."9". The split is fixed and stratified by class. Processes that ask at the
    same time wait for the one that generates.

    Args:
        cache_dir: folder of the cache; None is the usual Hugging Face datasets cache.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (the test part, as
    scikit-learn ships it).
    """
    builder = DigitsBuilder(cache_dir=cache_dir)
    builder.download_and_prepare()
    return builder.as_dataset()
