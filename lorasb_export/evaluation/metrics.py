"""How good are predictions? Plain functions of what was found and what was expected, in the same order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def exact_match(found: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to the expected one, white space at the ends aside."""
    return accuracy([text.strip() for text in found], [text.strip() for text in expected])


def gained_and_lost(before: Sequence[str], after: Sequence[str], expected: Sequence[str]) -> tuple[int, int]:
    """How many answers are right, as for `exact_match`, of those after alone, and of those before alone."""
    right = [
        [exact_match([one], [wanted]) for one, wanted in zip(said, expected, strict=True)] for said in (before, after)
    ]
    pairs = list(zip(*right, strict=True))
    return pairs.count((0, 1)), pairs.count((1, 0))


def accuracy(found: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Share of predictions that are right."""
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def mcc(found: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Matthews' correlation of two or more classes, -1 to 1; 0 when either side is constant."""
    n = len(expected)
    right = sum(a == b for a, b in zip(found, expected, strict=True))
    predicted, true = Counter(found), Counter(expected)
    covariance = right * n - sum(predicted[label] * true[label] for label in true)
    spread = (n * n - sum(k * k for k in predicted.values())) * (n * n - sum(k * k for k in true.values()))
    return covariance / math.sqrt(spread) if spread else 0.0


def f1(found: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Mean over the classes, each counting once (macro), of F1: the harmonic mean of precision and recall.

    A class that is neither expected nor found does not count.
    """
    right = Counter(a for a, b in zip(found, expected, strict=True) if a == b)
    both = Counter(found) + Counter(expected)
    return math.fsum(2 * right[label] / both[label] for label in both) / len(both)


def pearson(found: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation, -1 to 1; 0 when either side is constant, NaN when a prediction is not finite."""
    pairs = list(zip(found, expected, strict=True))
    if not all(map(math.isfinite, found)):
        return math.nan
    if len(set(found)) == 1 or len(set(expected)) == 1:
        return 0.0
    mean_found, mean_expected = math.fsum(found) / len(pairs), math.fsum(expected) / len(pairs)
    covariance = math.fsum((a - mean_found) * (b - mean_expected) for a, b in pairs)
    norm_found = math.hypot(*(a - mean_found for a in found))
    return covariance / (norm_found * math.hypot(*(b - mean_expected for b in expected)))


def rmse(found: Sequence[float], expected: Sequence[float]) -> float:
    """Root of the mean squared error, in the unit of the numbers."""
    return math.dist(found, expected) / math.sqrt(len(expected))


def prediction_metrics(predicted: Sequence[float], expected: Sequence[float], *, regression: bool) -> dict[str, float]:
    """All that apply, of numbers (regression) or of classes."""
    of_kind = (pearson, rmse) if regression else (accuracy, mcc, f1)
    return {metric.__name__: metric(predicted, expected) for metric in of_kind}


def better(metric: str, value: float, than: float) -> bool:
    """Whether `value` beats `than`: lower for loss and error, else higher. NaN beats nothing, all beat NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if lower_is_better(metric) else value > than


def lower_is_better(metric: str) -> bool:
    """Of losses and errors."""
    return metric in ("loss", "rmse")
