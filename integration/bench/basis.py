"""What does sharing a basis cost? Every task in bases of different origin: what they capture, what comes of training.

Results lie in docs/results/capture.jsonl (of a gradient over valid rows, before training) and runs.jsonl (training
runs, here all with the first seed). A run that is there is not repeated; `--minutes` ends a sitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from integration.evidence.cells import (
    CLASSIFYING,
    GENERATING,
    LEARNT,
    RESULTS,
    RUNS,
    Budget,
    Cell,
    OutOfTime,
    Results,
    Runner,
    cell,
    tuned,
)
from lorasb_export.settings import DRAWN

from .quality import TASKS
from .quality import arguments as arguments

RANKS: tuple[dict[str, Any], ...] = ({"rank": 64}, {"rank": 16}, {"rank": 128})
CALIBRATIONS: tuple[dict[str, Any], ...] = ({"reduction": "raw"}, {"samples": 8}, {"samples": 500})  # at r = 64
VARIANTS = (*RANKS, *CALIBRATIONS)


def origins(task: str) -> list[dict[str, Any]]:
    """What a basis for one task may be made from."""
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
    """Those whose basis is looked at, before training."""
    calibrated = variant in CALIBRATIONS
    wanted = [of for of in origins(task) if not (calibrated and of["basis"] in ("wsvd", *DRAWN))]
    return [cell(task, method="lora-sb", **of, **variant) for of in wanted]


def trained_in(task: str, variant: Mapping[str, Any]) -> list[Cell]:
    """Other calibrations: in a task's own basis and in one of all tasks, where something is learnt."""
    found = [replace(of, optimizer="muon") for of in cells(task, variant) if not of.balanced and of.basis != "block"]
    if variant in CALIBRATIONS:
        return [of for of in found if task in LEARNT and of.basis in ("own", "mixture")]
    return found


def run(*, quick: bool, minutes: float | None = None, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """Captures first, which are cheap; then training. The first rank of all tasks comes before the second of any."""
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
            for of in (of for task in tasks for of in trained_in(task, variant)):
                tuned(of, run_cell)
    except OutOfTime:
        complete = False
    return {"name": "basis", "complete": complete, "captures": len(known.lines()), "runs": len(results.lines())}


def _untaken(tasks: Sequence[str], known: Results) -> Iterator[list[Cell]]:
    """The cells of classifiers, then those of generators, whose capture is not known; nothing has been trained."""
    lines = known.lines()
    for kind in (CLASSIFYING, GENERATING):
        wanted = [of for variant in VARIANTS for task in kind if task in tasks for of in cells(task, variant)]
        yield [of for of in wanted if of.key not in lines]
