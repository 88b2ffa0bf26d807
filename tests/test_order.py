"""Which rows every step sees, and at which rate."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from lorasb_export.settings import FitSettings
from lorasb_export.training.optimizer import learning_rate_factor
from lorasb_export.training.order import RowOrder


def test_a_single_step_is_taken_at_the_whole_rate() -> None:
    assert [learning_rate_factor(FitSettings(), steps)(0) for steps in (1, 2)] == [1, 0]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed_alone(grouped: bool) -> None:
    lengths = [random.Random(0).randint(5, 50) for _ in range(100)]
    settings = FitSettings(epochs=2, batch_size=4, accumulate=2, group_by_length=grouped)
    order, again = RowOrder(lengths, settings), RowOrder(lengths, settings)
    assert order.steps == 26
    epochs = [[order.step(step) for step in range(epoch * 13, epoch * 13 + 13)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert again.step(20) == order.step(20)
    assert RowOrder(lengths, replace(settings, seed=1)).step(0) != order.step(0)
    for epoch in epochs:
        assert sorted(row for step in epoch for part in step for row in part) == list(range(100))
        assert [len(part) for part in epoch[0]] == [4, 4]
        assert sum(map(len, epoch[-1])) == 4  # the short step is the last


def test_grouping_by_length_pads_less() -> None:
    lengths = [random.Random(i).randint(5, 100) for i in range(200)]

    def tokens(grouped: bool) -> int:
        order = RowOrder(lengths, FitSettings(epochs=1, batch_size=8, group_by_length=grouped))
        batches = [part for step in range(order.steps) for part in order.step(step)]
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    assert tokens(True) < 0.75 * tokens(False)


def test_steps_of_like_length_come_in_any_order() -> None:
    """Not the longest rows first and the shortest last."""
    lengths = [random.Random(i).randint(5, 100) for i in range(200)]
    order = RowOrder(lengths, FitSettings(epochs=1, batch_size=8, group_by_length=True))
    longest = [max(lengths[row] for part in order.step(step) for row in part) for step in range(order.steps)]
    down = sum(before > after for before, after in pairwise(longest))
    assert 0.25 * order.steps < down < 0.75 * order.steps
