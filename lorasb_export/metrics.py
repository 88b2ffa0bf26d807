"""How good are predictions? Plain functions of what was found and what was expected, in the same order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def exact_match(found: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to the expected one, white space at the ends aside."""
    return accuracy([text.strip() for text in found], [text.strip() for text in expected])


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


def pearson(found: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation, -1 to 1; 0 when either side is constant."""
    pairs = list(zip(found, expected, strict=True))
    if len(set(found)) == 1 or len(set(expected)) == 1:
        return 0.0
    mean_found, mean_expected = math.fsum(found) / len(pairs), math.fsum(expected) / len(pairs)
    covariance = math.fsum((a - mean_found) * (b - mean_expected) for a, b in pairs)
    norm_found = math.hypot(*(a - mean_found for a in found))
    return covariance / (norm_found * math.hypot(*(b - mean_expected for b in expected)))


def prediction_metrics(predicted: Sequence[float], expected: Sequence[float], *, regression: bool) -> dict[str, float]:
    """Pearson's correlation for regression; accuracy and Matthews' correlation for classes."""
    if regression:
        return {"pearson": pearson(predicted, expected)}
    return {"accuracy": accuracy(predicted, expected), "mcc": mcc(predicted, expected)}


def better(metric: str, value: float, than: float) -> bool:
    """Whether `value` beats `than`: lower for the loss, higher for all else. NaN beats nothing, and all beat NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if metric == "loss" else value > than
