"""The subset filter: which rows of a training split are used, decided by class and by image content.

Job: rules, class lists, exact row selection, the hash that identifies a selection, and the plain draws: a trial's
samples, and the rows held out where a set has no evaluation split.
Must not know: where a set comes from, its splits and column names (load.py), models, training.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from vit_hf.data.randomness import mix_bits, sample_keys
from vit_hf.data.rows.interface import Rows
from vit_hf.data.rows.labels import LabelLists
from vit_hf.data.sets.origin import DIGEST_BYTES, Origin
from vit_hf.errors import UserError


@dataclasses.dataclass(frozen=True)
class SubsetRule:
    """Which rows of the training split to keep; the default keeps all.

    Args:
        fraction: share of each class to keep, above 0 and at most 1.
        per_class: exact number of rows of each class to keep; not together with `fraction`.
        classes: names or indices of the classes to keep, in any order.
        seed: which rows `fraction` and `per_class` keep.

    Raises:
        UserError: a value is out of range, or `fraction` and `per_class` are both given.
    """

    fraction: float | None = None
    per_class: int | None = None
    classes: list[str] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.fraction is not None and self.per_class is not None:
            raise UserError(
                f"--subset_fraction {self.fraction} and --subset_per_class {self.per_class} exclude each other: "
                "give one of them"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(f"--subset_fraction {self.fraction}: must be above 0 and at most 1")
        if self.per_class is not None and self.per_class < 1:
            raise UserError(f"--subset_per_class {self.per_class}: must be at least 1")
        if self.classes is not None and not self.classes:
            raise UserError("--subset_classes names no class: give names or indices, by comma or one a line in a file")

    @property
    def is_empty(self) -> bool:
        """True where the rule keeps every row."""
        return self.fraction is None and self.per_class is None and self.classes is None

    def describe(self) -> dict:
        """Return the parts that are set, as plain values for YAML and the model card; {} keeps every row."""
        parts = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {} if self.is_empty else parts


def resolve_classes(wanted: list[str] | None, class_names: list[str]) -> np.ndarray:
    """Return the indices of the wanted classes, int64 (K,), ascending: the source's class order, not the user's.

    An item is a class name if there is such a name, and an index into `class_names` otherwise. None is all.

    Raises:
        UserError: an item is neither (the nearest names are offered).
    """
    if wanted is None:
        return np.arange(len(class_names))
    index_of = {name: index for index, name in enumerate(class_names)}
    kept = set()
    for item in wanted:
        if item in index_of:
            kept.add(index_of[item])
        elif item.isdecimal() and int(item) < len(class_names):
            kept.add(int(item))
        else:
            near = difflib.get_close_matches(item, class_names, n=3, cutoff=0.5)
            shown = f"nearest: {', '.join(near)}" if near else _shortened(class_names)
            raise UserError(
                f"--subset_classes: {item!r} is not a class ({shown}; or an index 0..{len(class_names) - 1}, or a "
                "file with one a line)"
            )
    return np.array(sorted(kept), dtype=np.int64)


def _shortened(names: list[str]) -> str:
    return "classes: " + ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def class_quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Share out `fraction` of all rows over the classes: int64 (K,), each within one of fraction x its count.

    The total is fraction x N rounded to the nearest integer, halves up. Each class first gets its exact share rounded
    down; the rows still missing go one each to the classes with the largest remainders, lower class index first.

    Source: the method of largest remainders (Hamilton apportionment).
    """
    # A fraction of its decimal digits, because 0.29 * 100 in binary is below 29.
    share = Fraction(str(fraction))
    exact = [share * int(count) for count in counts]
    quotas = [math.floor(value) for value in exact]
    missing = math.floor(sum(exact) + Fraction(1, 2)) - sum(quotas)
    order = sorted(range(len(exact)), key=lambda index: (quotas[index] - exact[index], index))
    for index in order[:missing]:
        quotas[index] += 1
    return np.array(quotas, dtype=np.int64)


def select_indices(
    labels: np.ndarray | LabelLists,
    rule: SubsetRule,
    class_names: list[str],
    content_digests: Callable[[np.ndarray], np.ndarray],
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """Return the rows that a rule keeps, ascending int64 (n,): the same rows in whatever order the source has them.

    Inside a class, rows are ranked by a hash of their content and the seed, never by position; rows with identical
    content are interchangeable and ranked by their numbers. Where images have lists of labels, one that has any of the
    classes is of them, and a fraction is one of all images: there is no class to keep a share of.

    Args:
        labels: int (N,), each in 0..K-1; or lists.
        rule: what to keep.
        class_names: the K names, in the source's order.
        content_digests: called with rows (M,), returns uint8 (M, 32), a digest of each row's image; only called when
            the rule needs a ranking, because it reads every one of these images.
        numbers: int (N,), the number of each row in the original set; None where that is its position.

    Raises:
        UserError: an unknown class, or a class with fewer rows than `per_class`; `per_class` of lists.
    """
    kept_classes = resolve_classes(rule.classes, class_names)
    rows = rows_of_classes(labels, kept_classes)
    if isinstance(labels, LabelLists) and rule.per_class is not None:
        raise UserError(
            f"--subset_per_class {rule.per_class}: needs one label an image, and the label column holds lists of labels; "
            "allowed are --subset_fraction and --subset_classes"
        )
    labels = np.zeros(len(labels), dtype=np.int64) if isinstance(labels, LabelLists) else np.asarray(labels)
    if rule.fraction in (None, 1) and rule.per_class is None:
        return rows
    counts = np.bincount(labels[rows], minlength=len(class_names))
    if rule.per_class is None:
        quotas = class_quotas(counts, rule.fraction)
    else:
        quotas = np.zeros_like(counts)
        quotas[kept_classes] = rule.per_class
        index = kept_classes[np.argmin(counts[kept_classes])]
        if counts[index] < rule.per_class:
            raise UserError(
                f"--subset_per_class {rule.per_class}: class {class_names[index]!r} has {counts[index]} training "
                f"images, so no more of each class can be kept"
            )
    keys = [*_content_keys(content_digests(rows), rule.seed), rows if numbers is None else numbers[rows]]
    ranks = _ranks_within_class(labels[rows], *keys)
    return rows[ranks < quotas[labels[rows]]]


def rows_of_classes(labels: np.ndarray | LabelLists, kept_classes: np.ndarray) -> np.ndarray:
    """The rows of some classes, ascending int64 (n,); of all classes all rows, those without a label, too."""
    if not isinstance(labels, LabelLists):
        return np.flatnonzero(np.isin(labels, kept_classes))
    if len(kept_classes) == labels.num_classes:
        return np.arange(len(labels))
    return np.unique(labels.rows()[np.isin(labels.numbers, kept_classes)])


def taken(labels: np.ndarray | LabelLists, rows: np.ndarray) -> np.ndarray | LabelLists:
    """The labels of some rows, as they are."""
    return labels.take(rows) if isinstance(labels, LabelLists) else labels[rows]


def _content_keys(digests: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash each content digest together with the seed: two uint64 (N,), the order of the rows under this seed."""
    prefix = b"vit_hf subset %d " % seed
    content = digests.tobytes()
    keyed = b"".join(
        hashlib.sha256(prefix + content[start : start + DIGEST_BYTES]).digest()[:16]
        for start in range(0, len(content), DIGEST_BYTES)
    )
    first, second = np.frombuffer(keyed, dtype=">u8").reshape(-1, 2).T
    return first, second


def _ranks_within_class(labels: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Rank each row in its class by the keys, then by position: int64 (N,), 0 for a class's first row."""
    order = np.lexsort((*reversed(keys), labels))
    sorted_labels = labels[order]
    first_of_class = np.searchsorted(sorted_labels, sorted_labels, side="left")
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - first_of_class
    return ranks


def subset_hash(rows: np.ndarray) -> str:
    """Return the sha256 (hex) of the chosen rows' numbers, ascending, as little-endian int64."""
    return hashlib.sha256(np.sort(rows).astype("<i8").tobytes()).hexdigest()


def identity_of(rows: Rows) -> str:
    """Which images some rows are, as one text: "digits test 1f0c5a..." (the set by its last name, the split, a hash of the
    chosen rows' numbers). Another set, split or draw gives another text."""
    name, split = rows.source_name
    return " ".join(filter(None, [name.rstrip("/").split("/")[-1], split, subset_hash(rows.source_rows)[:16]]))


def apply_rule(
    labels: np.ndarray | LabelLists, rows: np.ndarray, rule: SubsetRule, class_names: list[str], origin: Origin
) -> tuple[np.ndarray, dict]:
    """Narrow `rows` to the rule: returns ascending rows and the record {rule, subset_hash, train_samples}.

    The images and the hash are the same for a set, its copy by `vit-hf data prepare`, and a stream of that copy.

    Args:
        labels: int (N,), each in 0..K-1; or lists.
        rows: ascending int (n,), the rows of the split to choose from.
        rule, class_names: as for `select_indices`.
        origin: of all N rows.

    Raises:
        UserError: as `select_indices`; no row is left.
    """
    if rule.is_empty:
        return rows, {}
    numbers = origin.at(rows).numbers()
    chosen = select_indices(
        taken(labels, rows), rule, class_names, lambda positions: origin.at(rows[positions]).digests(), numbers
    )
    if len(chosen) == 0:
        raise UserError(f"the subset {rule.describe()} keeps zero training samples: raise --subset_fraction")
    record = {"rule": rule.describe(), "subset_hash": subset_hash(numbers[chosen]), "train_samples": len(chosen)}
    return rows[chosen], record


def check_untrained(
    train_labels: np.ndarray | LabelLists,
    eval_labels: np.ndarray | LabelLists,
    class_names: list[str],
    rule: SubsetRule,
    notes: list[str],
) -> None:
    """Refuse a subset that evaluates a class it does not train; without a subset, the set itself is like that."""
    trained, evaluated = (
        labels.numbers if isinstance(labels, LabelLists) else labels for labels in (train_labels, eval_labels)
    )
    kept = resolve_classes(rule.classes, class_names)  # images of theirs may have other labels beside them
    names = [class_names[index] for index in np.intersect1d(np.setdiff1d(evaluated, trained), kept)]
    if not names:
        return
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if not rule.is_empty:
        raise UserError(
            f"the subset {rule.describe()} leaves no training images of evaluation class {shown}: raise "
            "--subset_fraction or drop the class with --subset_classes"
        )
    notes.append(f"The evaluation split has classes without a training image: {shown}.")


def hold_out(labels: np.ndarray | LabelLists, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into kept and held out, both ascending int64: a seeded `fraction` of every class is held out, of lists
    of labels one of all rows.

    Every class keeps at least one row, so a class of one row is never held out.
    """
    if isinstance(labels, LabelLists):
        labels = np.zeros(len(labels), dtype=np.int64)
    counts = np.bincount(labels)
    quotas = np.minimum(class_quotas(counts, fraction), np.maximum(counts - 1, 0))
    places = np.random.RandomState(seed % 2**32).permutation(len(labels))
    is_held_out = _ranks_within_class(labels, places) < quotas[labels]
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def draw_samples(num_rows: int, max_samples: int | None, seed: int) -> np.ndarray:
    """Draw rows for a trial: ascending int64 (min(num_rows, max_samples),), the same for the same seed.

    Classes play no part: a small draw may miss some. None, or more than there are, keeps all.
    """
    if max_samples is None or max_samples >= num_rows:
        return np.arange(num_rows)
    # RandomState's stream is frozen by numpy, so the draw is the same under every numpy version.
    return np.sort(np.random.RandomState(seed % 2**32).permutation(num_rows)[:max_samples])


def keep_fraction(num_rows: int, fraction: float, seed: int) -> np.ndarray:
    """The rows of a stream's subset, ascending int64: each row is in it or not by a hash of (seed, its number), so the
    share is met up to chance, and nothing has to be read to know it."""
    row = np.arange(num_rows, dtype=np.int64)
    drawn = mix_bits(sample_keys(seed, np.full_like(row, -1), row)) >> 1  # beside all epochs
    return np.flatnonzero((drawn & ((1 << 62) - 1)) < int(fraction * (1 << 62)))
