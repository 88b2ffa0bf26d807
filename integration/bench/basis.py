"""What does sharing a basis cost? Every task in bases of different origin: what they capture, what comes of training.

Results lie in docs/results/capture.jsonl (of a gradient over valid rows, before training) and runs.jsonl (training
runs). A run that is there is not repeated; `--minutes` ends a sitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from integration.evidence.cells import (
    CLASSIFYING,
    GENERATING,
    RESULTS,
    RUNS,
    Budget,
    Cell,
    OutOfTime,
    Results,
    Runner,
    cell,
    over_seeds,
)

from .quality import arguments as arguments

TASKS = (*CLASSIFYING, *GENERATING)
VARIANTS: tuple[dict[str, Any], ...] = (
    {"rank": 64},
    {"rank": 64, "reduction": "raw"},
    {"rank": 16},
    {"rank": 128},
    {"rank": 64, "samples": 8},
    {"rank": 64, "samples": 500},
)


def columns(task: str) -> list[dict[str, Any]]:
    """The origins of a basis, for one task."""
    kind = CLASSIFYING if task in CLASSIFYING else GENERATING
    another = kind[(kind.index(task) + 1) % len(kind)]
    return [
        {"basis": "own"},
        {"basis": "mixture"},
        {"basis": "mixture", "balanced": True},
        {"basis": "without"},
        {"basis": another},
        {"basis": "wsvd"},
        {"basis": "random"},
    ]


def cells(task: str) -> list[Cell]:
    found = []
    for variant in VARIANTS:
        for column in columns(task):
            uncalibrated = column["basis"] in ("wsvd", "random") and ("reduction" in variant or "samples" in variant)
            if not uncalibrated:
                found.append(cell(task, method="lora-sb", **column, **variant))
    return found


def run(*, quick: bool, minutes: float | None = None, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """Captures first, which are cheap; then training, the first variant of every task before the second of any."""
    from integration.evidence.training import capture_of

    captures, results = Results(RESULTS / "capture.jsonl"), Results(RUNS)
    budget = Budget(minutes)
    run_cell = Runner(results, budget)
    complete = True
    try:
        for task in tasks:
            for of in cells(task):
                if of.key not in captures.lines():
                    if budget.spent:
                        raise OutOfTime
                    captures.add({"key": of.key, **asdict(of), **capture_of(of)})
        for same in zip(*map(cells, tasks), strict=True):
            for of in same if not quick else ():
                seeds = (0, 1, 2) if of == replace(of, **VARIANTS[0]) else (0,)
                list(over_seeds(of, seeds, run_cell))
    except OutOfTime:
        complete = False
    return {"name": "basis", "complete": complete, "captures": len(captures.lines()), "runs": len(results.lines())}
