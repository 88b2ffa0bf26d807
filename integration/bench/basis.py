"""What does sharing a basis cost? Every task in bases of different origin: what they capture, what comes of training.

Results lie in docs/results/capture.jsonl (of a gradient over valid rows, before training) and runs.jsonl (training
runs). A run that is there is not repeated; `--minutes` ends a sitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from lorasb_export.settings import DRAWN

from .quality import SEEDS, TASKS
from .quality import arguments as arguments

VARIANTS: tuple[dict[str, Any], ...] = (
    {"rank": 64, "optimizer": "muon"},
    {"rank": 64},
    {"rank": 16, "optimizer": "muon"},
    {"rank": 128, "optimizer": "muon"},
    {"rank": 64, "optimizer": "muon", "reduction": "raw"},
    {"rank": 64, "optimizer": "muon", "samples": 8},
    {"rank": 64, "optimizer": "muon", "samples": 500},
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
        *({"basis": drawn} for drawn in DRAWN),
    ]


def cells(task: str, variant: Mapping[str, Any]) -> list[Cell]:
    calibrates = "reduction" in variant or "samples" in variant  # which is nothing to a basis that is not calibrated
    wanted = [column for column in columns(task) if not (calibrates and column["basis"] in ("wsvd", *DRAWN))]
    return [cell(task, method="lora-sb", **column, **variant) for column in wanted]


def run(*, quick: bool, minutes: float | None = None, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """Captures first, which are cheap; then training. The first variant of all tasks comes before the second of any."""
    from integration.evidence.captures import captures

    known, results = Results(RESULTS / "capture.jsonl"), Results(RUNS)
    budget = Budget(minutes)
    run_cell = Runner(results, budget)
    complete = True
    try:
        for missing in _untaken(tasks, known):
            for of, ratios in captures(missing):
                known.add({"key": of.key, **of.fields, **ratios})
                if budget.spent:
                    raise OutOfTime
        for variant in VARIANTS if not quick else ():
            seeds = SEEDS if variant in VARIANTS[:2] else SEEDS[:1]
            for same in zip(*(cells(task, variant) for task in tasks), strict=True):
                for of in same:
                    list(over_seeds(of, seeds, run_cell))
    except OutOfTime:
        complete = False
    return {"name": "basis", "complete": complete, "captures": len(known.lines()), "runs": len(results.lines())}


def _untaken(tasks: Sequence[str], known: Results) -> Iterator[list[Cell]]:
    """The cells of classifiers, then those of generators, whose capture is not known; nothing has been trained."""
    lines = known.lines()
    for kind in (CLASSIFYING, GENERATING):
        wanted = [of for variant in VARIANTS for task in kind if task in tasks for of in cells(task, variant)]
        untrained = dict.fromkeys(replace(of, optimizer=Cell.optimizer) for of in wanted)
        yield [of for of in untrained if of.key not in lines]
