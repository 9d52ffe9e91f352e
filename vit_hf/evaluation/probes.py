"""How well frozen features tell classes apart: few-shot regression, nearest neighbours, and logistic regression.

They take float32 features (N, D) and labels int64 (N,) on one device and give predicted classes int64 (M,). This module
must not know of which set the features are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import accelerate
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from vit_hf.evaluation.features import extract_features
from vit_hf.evaluation.intervals import half_width

L2 = 2.0**10  # big_vision, configs/common_fewshot.py
BIAS = 100.0  # so large that it is hardly regularised: big_vision, fewshot_lsr.py
BLOCK = 2**27  # numbers that are worked on at once, in float64: one gibibyte
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of the mean loss; from strong to weak
HELD_OUT = 5  # of so many images of a class one is held out to choose among them


@dataclass(frozen=True)
class Standard:
    """Features at mean 0 and deviation 1, by those of the training features, float64 (1, D)."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Standard":
        """Source: big_vision, fewshot_lsr.py: the deviation over N, plus 1e-5."""
        mean = sum(part.sum(0, keepdim=True) for part in _parts(values)) / len(values)
        variance = sum((part - mean).square().sum(0, keepdim=True) for part in _parts(values)) / len(values)
        return cls(mean, variance.sqrt() + 1e-5)

    def parts(self, values: Tensor) -> Iterator[Tensor]:
        """Standardised float64 (at most some thousands, D), one part after the other."""
        return ((part - self.mean) / self.deviation for part in _parts(values))


def _parts(values: Tensor) -> Iterator[Tensor]:
    rows = max(1, BLOCK // values.shape[1])
    return (values[first : first + rows].double() for first in range(0, len(values), rows))


def fit_regression(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Standard, Tensor]:
    """Regularised least squares of targets in {-1, 1}^K on standardised features and a constant column, in closed form
    in float64; solved in the smaller of N and D + 1 dimensions.

    Returns:
        what standardises, and the weights (D + 1, K), the last row those of the constant column.

    Source: arXiv 2010.11929, section 4.1; column, strength and standardisation: big_vision, fewshot_lsr.py.
    """
    standard = Standard.of(values)
    targets = 2.0 * one_hot(labels, num_classes).double() - 1.0
    if len(values) <= values.shape[1]:
        inputs = _with_constant(torch.cat(list(standard.parts(values))))
        kernel = inputs @ inputs.T
        kernel.diagonal().add_(L2)
        return standard, inputs.T @ torch.cholesky_solve(targets, torch.linalg.cholesky(kernel))
    products, crossed, first = 0, 0, 0
    for part in map(_with_constant, standard.parts(values)):
        products = products + part.T @ part
        crossed = crossed + part.T @ targets[first : first + len(part)]
        first += len(part)
    products.diagonal().add_(L2)
    return standard, torch.cholesky_solve(crossed, torch.linalg.cholesky(products))


def _with_constant(part: Tensor) -> Tensor:
    return torch.nn.functional.pad(part, (0, 1), value=BIAS)


def regression(train: tuple[Tensor, Tensor], test: Tensor, num_classes: int) -> Tensor:
    """Classes int64 (M,) by the few-shot regression of `fit_regression`."""
    standard, weights = fit_regression(*train, num_classes)
    return torch.cat([(_with_constant(part) @ weights).argmax(1) for part in standard.parts(test)])


def nearest(
    train: tuple[Tensor, Tensor], test: Tensor, num_classes: int, *, k: int = 20, temperature: float | None = 0.07
) -> Tensor:
    """Classes int64 (M,) by the votes of the k training images of the highest cosine similarity, in blocks of test images.

    Args:
        k: at most as many as there are training images.
        temperature: a vote weighs exp(similarity / temperature); None: one.

    Source: DINO (arXiv 2104.14294), eval_knn.py: k 20, temperature 0.07.
    """
    values, labels = normalize(train[0], dim=1), train[1]
    votes = []
    for part in normalize(test, dim=1).split(max(1, BLOCK // len(values))):
        similarity, found = (part @ values.T).topk(min(k, len(values)), dim=1)
        weight = torch.ones_like(similarity) if temperature is None else (similarity / temperature).exp()
        counted = torch.zeros(len(part), num_classes, device=part.device)
        votes.append(counted.scatter_add_(1, labels[found], weight).argmax(1))
    return torch.cat(votes)


def fit_logistic(
    parts: list[Tensor], labels: Tensor, num_classes: int, l2: float, start: Tensor | None = None
) -> Tensor:
    """Multinomial logistic regression: mean cross-entropy + l2 / 2 x the squared weights, the bias left alone, by L-BFGS
    in float64. (scikit-learn's C is 1 / (l2 x N).)

    Args:
        parts: the standardised features, float64, in blocks.
        start: weights of another strength to begin with.

    Returns:
        float64 (D + 1, K), the last row the bias.
    """
    shape = (parts[0].shape[1] + 1, num_classes)
    weights = torch.zeros(shape, dtype=torch.float64, device=labels.device) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, history_size=10, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * l2 * weights[:-1].square().sum()
        total.backward()
        first = 0
        for part in parts:
            logits = torch.addmm(weights[-1], part, weights[:-1])
            loss = cross_entropy(logits, labels[first : first + len(part)], reduction="sum") / len(labels)
            loss.backward()
            total, first = total.detach() + loss.detach(), first + len(part)
        return total.detach()

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def choose_l2(parts: list[Tensor], labels: Tensor, num_classes: int) -> float:
    """The strength of L2_GRID that is best on a fifth of the training images of each class, which the others are fitted
    without; among equals the strongest. With fewer than five images of each class nothing can be held out, and it is the
    middle one.

    Source: a sweep of strengths on held-out training images: arXiv 1805.08974, section A.3.
    """
    held_out = _every_fifth(labels)
    if not held_out.any():
        return L2_GRID[len(L2_GRID) // 2]
    cuts = np.cumsum([len(part) for part in parts])[:-1].tolist()
    places = held_out.tensor_split(cuts)
    fitted = [part[~place] for part, place in zip(parts, places, strict=True)]
    tried = [part[place] for part, place in zip(parts, places, strict=True)]
    best, chosen, weights = -1, L2_GRID[0], None
    for l2 in L2_GRID:
        weights = fit_logistic(fitted, labels[~held_out], num_classes, l2, weights)
        correct = int((_classes(tried, weights) == labels[held_out]).sum())
        if correct > best:
            best, chosen = correct, l2
    return chosen


def _every_fifth(labels: Tensor) -> Tensor:
    """bool (N,): the fifth, tenth, ... image of each class."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    first = torch.searchsorted(ordered, ordered)  # where the class of each one begins
    number = torch.arange(len(labels), device=labels.device) - first
    chosen = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    chosen[order] = number % HELD_OUT == HELD_OUT - 1
    return chosen


def _classes(parts: list[Tensor], weights: Tensor) -> Tensor:
    return torch.cat([torch.addmm(weights[-1], part, weights[:-1]).argmax(1) for part in parts])


def logistic(train: tuple[Tensor, Tensor], test: Tensor, num_classes: int) -> tuple[Tensor, float]:
    """Classes int64 (M,) by logistic regression on standardised features, and the strength that was chosen for it."""
    values, labels = train
    standard = Standard.of(values)
    parts = list(standard.parts(values))
    l2 = choose_l2(parts, labels, num_classes)
    weights = fit_logistic(parts, labels, num_classes, l2)
    return torch.cat([_classes([part], weights) for part in standard.parts(test)]), l2


def few_shot_probe(
    model: torch.nn.Module,
    few: tuple[Iterable[dict[str, Tensor]], Sequence[np.ndarray]],
    eval_batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
) -> dict[str, float]:
    """{"probe_10shot_accuracy": mean over the draws, "probe_10shot_std": the deviation between them}, the same on all
    processes: few-shot regression on the drawn training images, measured on the evaluation images. Arguments are those of
    `extract_features`.

    Args:
        few: batches of the training images of all draws; for each draw int64 (n,), which of those images it is.
    """
    batches, draws = few
    train = extract_features(model, batches, normalise, accelerator)
    test = extract_features(model, eval_batches, normalise, accelerator)
    num_classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    told: list[dict[str, float] | None] = [None]
    if accelerator.is_main_process:
        found = []
        for rows in draws:
            drawn = train.at(torch.from_numpy(rows))
            predicted = regression((drawn.values, drawn.labels), test.values, num_classes)
            found.append(accuracy(predicted, test.labels))
        shots = round(len(draws[0]) / len(train.labels.unique()))
        told = [{f"probe_{shots}shot_accuracy": float(np.mean(found)), f"probe_{shots}shot_std": _deviation(found)}]
    return broadcast_object_list(told)[0]


METHODS_BY_NAME = {"regression": regression, "knn": nearest, "logistic": logistic}


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())


def interval_over_draws(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t, cut to [0, 1]; None of a single draw."""
    half = half_width(values)
    return None if half is None else (max(0.0, float(np.mean(values)) - half), min(1.0, float(np.mean(values)) + half))


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
