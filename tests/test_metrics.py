"""Metrics against known values."""

from __future__ import annotations

import math

import pytest
import torch

from lorasb_export.evaluation.metrics import accuracy, better, exact_match, f1, gained_and_lost, mcc, pearson, rmse


def test_exact_match_and_accuracy() -> None:
    assert exact_match(["2", " 3\n", "x"], ["2", "3", "4"]) == pytest.approx(2 / 3)
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75


def test_gained_and_lost_are_rows_that_one_alone_has_right() -> None:
    expected = ["a", "b", "c", "d", "e"]
    before, after = ["a", "x", "c ", "x", "x"], ["a", " b", "x", "d", "y"]
    assert gained_and_lost(before, after, expected) == (2, 1)
    assert gained_and_lost([], [], []) == (0, 0)


def test_mcc() -> None:
    assert mcc(list("yynny"), list("yynny")) == 1
    assert mcc([0, 0, 1, 1], [1, 1, 0, 0]) == -1
    found, expected = [1] * 6 + [1] + [0] * 3 + [0] * 2, [1] * 6 + [0] + [0] * 3 + [1] * 2
    tp, fp, tn, fn = 6, 1, 3, 2
    of_two = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert mcc(found, expected) == pytest.approx(of_two)
    # Three classes: the correlation of the one-hot indicators, summed over classes, as Gorodkin defines it.
    found, expected = [0, 1, 2, 2, 1, 0, 0], [0, 1, 2, 1, 1, 2, 0]
    a, b = (torch.nn.functional.one_hot(torch.tensor(side)).double() for side in (found, expected))
    a, b = a - a.mean(0), b - b.mean(0)
    assert mcc(found, expected) == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    assert mcc([1, 1, 1], [0, 1, 1]) == mcc([0, 1, 1], [1, 1, 1]) == mcc([1, 1], [1, 1]) == 0


def test_f1_counts_every_class_once() -> None:
    found, expected = list("aabbc"), list("ababa")
    of_a, of_b, of_c = 2 * 1 / (2 + 3), 2 * 1 / (2 + 2), 0.0  # 2·right / (found + expected)
    assert f1(found, expected) == pytest.approx((of_a + of_b + of_c) / 3)
    tp, fp, fn, tn = 6, 1, 2, 3
    found, expected = [1] * (tp + fp) + [0] * (fn + tn), [1] * tp + [0] * fp + [1] * fn + [0] * tn
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    of_zero = 2 * tn / (2 * tn + fp + fn)
    assert f1(found, expected) == pytest.approx((2 * precision * recall / (precision + recall) + of_zero) / 2)
    assert (f1([1, 1], [1, 1]), f1([0, 0], [1, 1])) == (1, 0)


def test_rmse_is_in_the_unit_of_the_numbers_and_less_is_better() -> None:
    assert rmse([1.0, 2.0, 6.0], [1.0, 5.0, 2.0]) == pytest.approx(5 / math.sqrt(3))
    assert better("rmse", 0.5, 0.75)
    assert not better("rmse", 0.75, 0.5)


def test_pearson() -> None:
    assert pearson([1, 2, 3], [-1, 3, 7]) == pytest.approx(1)
    assert pearson([1, 2, 3], [5, 4, 3]) == pytest.approx(-1)
    found, expected = [0.1, 0.7, 0.3, 0.9], [1.0, 2.0, 2.5, 3.0]
    known = float(torch.corrcoef(torch.tensor([found, expected], dtype=torch.float64))[0, 1])
    assert pearson(found, expected) == pytest.approx(known)
    assert pearson([1e-170, 2e-170], [1, 2]) == pytest.approx(1)
    assert pearson([0.1] * 3, [1, 2, 3]) == pearson([1, 2, 3], [0.1] * 3) == pearson([1], [2]) == 0


def test_predictions_that_are_not_finite_correlate_with_nothing() -> None:
    for found in ([math.inf, -math.inf, 1.0], [math.inf] * 3, [math.nan, 1.0, 2.0]):
        assert math.isnan(pearson(found, [1.0, 2.0, 3.0]))
