"""Lines of results → each cell at its best rate, that of least valid loss at seed 0."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Line = dict[str, Any]
Identity = tuple[tuple[str, Any], ...]  # what a cell is, apart from rate and seed
_UNTRAINED = ("key", "lr", "seed", "loss", "metric", "value", "trainable", "adapter_bytes", "seconds", "device")


class Best(NamedTuple):
    """A cell's lines at its best rate, one for each seed; and the first seed's at every rate that was tried."""

    lines: list[Line]
    first: dict[float, Line]

    @property
    def rates(self) -> frozenset[float]:
        return frozenset(self.first)

    @property
    def closed(self) -> bool:
        """Whether worse rates lie on both sides."""
        return self.lines[0]["method"] == "base" or min(self.rates) < self.lines[0]["lr"] < max(self.rates)

    @property
    def summary(self) -> dict[str, Any]:
        return summary(self.lines) | {"closed": self.closed, "rates": sorted(self.rates)}


def identity(line: Line) -> Identity:
    return tuple((key, value) for key, value in sorted(line.items()) if key not in (*_UNTRAINED, "capture", "random"))


def changed(cell: Identity, **fields: Any) -> Identity:
    return tuple(sorted((dict(cell) | fields).items()))


def best_rates(lines: Iterable[Line]) -> dict[Identity, Best]:
    """Of every cell that was trained with the first seed."""
    grouped: dict[Identity, list[Line]] = defaultdict(list)
    for line in lines:
        grouped[identity(line)].append(line)
    found = {}
    for cell, of_cell in grouped.items():
        first = {line["lr"]: line for line in of_cell if line["seed"] == 0}
        if first:
            best = min(first, key=lambda rate: first[rate]["loss"])
            found[cell] = Best([line for line in of_cell if line["lr"] == best], first)
    return found


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Over the seeds of one tuned method on one task."""
    values = [line["value"] for line in lines]
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    same = {key: lines[0][key] for key in ("task", "metric", "lr", "trainable", "adapter_bytes", "steps")}
    return same | {
        "mean": round(statistics.mean(values), 6),
        "sd": round(sd, 4),
        "loss": round(statistics.mean(line["loss"] for line in lines), 4),
        "seconds": round(statistics.mean(line["seconds"] for line in lines), 1),
        "seeds": len(lines),
        "losses": {line["seed"]: line["loss"] for line in lines},
        "values": {line["seed"]: line["value"] for line in lines},
    }
