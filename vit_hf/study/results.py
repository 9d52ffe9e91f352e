"""What finished runs say together: means with intervals over the seeds, and whether they support a claim.

Must not know: how runs are started, and how a page looks.
"""

import dataclasses
import itertools
import json
import math
import statistics
from typing import Any

from scipy import stats

from vit_hf.evaluation.intervals import LEVEL, half_width
from vit_hf.evaluation.main_metric import main_metric
from vit_hf.study.execute import is_finished
from vit_hf.study.plan import Study
from vit_hf.study.questions import Claim

Results = dict[str, dict[int, dict[str, Any]]]  # {cell: {seed: all_results.json}}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over the seeds and half the width of its 95 % interval (None with one seed)."""

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def __str__(self) -> str:
        if self.half_width == 0:
            return f"{self.mean:.4f} (all seeds)"
        if self.half_width is None:
            return f"{self.mean:.4f}"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        if 0 <= low and high <= 1:
            return f"{self.mean:.4f} ± {self.half_width:.4f}"
        return f"{self.mean:.4f} ({max(low, 0):.4f} to {min(high, 1):.4f})"  # no accuracy lies beyond


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of one test: what was tested, what came out, and supported, contradicted, undecided or not tested."""

    test: str
    result: str
    verdict: str


def collect(study: Study) -> Results:
    """What the finished runs say."""
    found: Results = {}
    for cell in study.cells:
        if is_finished(cell):
            results = json.loads((cell.output_dir / "all_results.json").read_text())
            found.setdefault(cell.name, {})[cell.seed] = results
    return found


def accuracies(results: Results, cell: str) -> list[float]:
    """Of each seed; of sets with several labels an image the mean average precision."""
    found = [result for _, result in sorted(results.get(cell, {}).items())]
    return [result[main_metric(result) or "eval_accuracy"] for result in found]


def estimate(values: list[float]) -> Estimate | None:
    """Mean and interval by Student's t over the seeds; None where there are no values. The evaluation set is the same
    for all seeds, so the interval says nothing about other images."""
    if not values:
        return None
    return Estimate(statistics.fmean(values), half_width(values, LEVEL), tuple(values))


@dataclasses.dataclass(frozen=True)
class Sample:
    """A mean, the variance of that mean, and the degrees of freedom behind the variance."""

    mean: float
    variance: float
    freedom: float


def sample(results: Results, cell: str | float) -> Sample | None:
    """Over the seeds of a cell; over the evaluation images where it has one seed; a number is exact. None where the
    cell has no results.

    Source: the binomial variance of Agresti and Coull (The American Statistician 52, 1998), which is not 0 at 0 or 1.
    """
    if isinstance(cell, float):
        return Sample(cell, 0.0, math.inf)
    values = accuracies(results, cell)
    if len(values) == 1:
        (result,) = results[cell].values()
        images = result["eval_samples"]
        share = (values[0] * images + 2) / (images + 4)
        return Sample(values[0], share * (1 - share) / (images + 4), math.inf)
    return (
        Sample(statistics.fmean(values), statistics.variance(values) / len(values), len(values) - 1)
        if values
        else None
    )


def difference_interval(a: Sample, b: Sample, level: float) -> tuple[float, float, float]:
    """(mean of a - mean of b, its lower and its upper bound). Source: Welch's t interval (Biometrika 34, 1947)."""
    difference, variance = a.mean - b.mean, a.variance + b.variance
    spread = a.variance**2 / a.freedom + b.variance**2 / b.freedom
    freedom = variance**2 / spread if spread else math.inf
    width = float(stats.t.ppf((1 + level) / 2, freedom)) * variance**0.5
    return difference, difference - width, difference + width


def judge(claim: Claim, results: Results) -> Verdict:
    """Holds one claim against the accuracies.

    `greater`: supported where the 95 % interval of the difference lies above the margin, contradicted where it lies
    below. `equal`: supported where for each pair the 90 % interval lies within the bounds (two one-sided tests at 5 %:
    Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987), contradicted where the 95 % interval of a pair lies outside.
    Undecided is all else, and where no cell varies over its seeds, which leaves no interval. Nothing is corrected for
    the number of tests.
    """
    names = claim.equal or (claim.greater, claim.than)
    margin = f" by more than {claim.margin:g}" if claim.margin else ""
    listed = ", ".join(map(str, names))
    text = f"{listed}: equal within {claim.within:g}" if claim.equal else f"{claim.greater} > {claim.than}{margin}"
    samples = {name: sample(results, name) for name in names}
    missing = [str(name) for name in names if samples[name] is None]
    if missing:
        return Verdict(text, f"no result of {', '.join(missing)}", "not tested")
    if not any(one.variance for one in samples.values()):
        means = ", ".join(f"{one.mean:.4f}" for one in samples.values())
        return Verdict(text, f"{means}, the same for all seeds: no interval", "undecided")
    single = [str(name) for name in names if len(results.get(name, {})) == 1]
    note = f" (one seed of {', '.join(single)}: over the evaluation images)" if single else ""
    if not claim.equal:
        difference, low, high = difference_interval(samples[claim.greater], samples[claim.than], LEVEL)
        verdict = "supported" if low > claim.margin else "contradicted" if high < claim.margin else "undecided"
        return Verdict(text, f"difference {difference:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]{note}", verdict)
    pairs = list(itertools.combinations(names, 2))
    narrow = {pair: difference_interval(*(samples[name] for name in pair), 2 * LEVEL - 1) for pair in pairs}
    wide = [difference_interval(*(samples[name] for name in pair), LEVEL) for pair in pairs]
    first, second = max(pairs, key=lambda pair: max(map(abs, narrow[pair][1:])))
    difference, low, high = narrow[first, second]
    within = all(-claim.within < low and high < claim.within for _, low, high in narrow.values())
    outside = any(low > claim.within or high < -claim.within for _, low, high in wide)
    result = f"farthest: {first} - {second} {difference:+.4f}, 90 % interval [{low:+.4f}, {high:+.4f}]{note}"
    return Verdict(text, result, "supported" if within else "contradicted" if outside else "undecided")


def overall(verdicts: list[Verdict]) -> str:
    """The tests of a question counted: `3 of 4 supported, 1 undecided`."""
    counts = {
        kind: sum(one.verdict == kind for one in verdicts) for kind in ("contradicted", "undecided", "not tested")
    }
    rest = "".join(f", {number} {kind}" for kind, number in counts.items() if number)
    return f"{len(verdicts) - sum(counts.values())} of {len(verdicts)} supported{rest}"
