"""A cell is one training run, fixed by its fields. Its result is one JSON line, found again by the fields' hash."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorasb_export.settings import ALL_LINEAR

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RUNS = RESULTS / "runs.jsonl"  # of all tables: some share runs
DATA = Path(__file__).parents[3] / "shared" / "data"  # real task data, not part of this repository


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task: a folder of the task data.
        method: `base` (untrained), `lora`, `rslora`, `dora`, `pissa` (PEFT's), `lora-xs`, `lora-sb`; or
            `lora-xs-mirrored`, which has the weight's singular values in B, where LoRA-XS has them in A.
        basis: of `lora-sb`, what the basis was calibrated on: `own`; another task's name; `mixture` of all tasks of
            this kind; `without` this one; `wsvd`, the weight's own singular vectors; `random`; or `block`.
        balanced: of a mixture, whether every task's gradient sum is divided by its norm first.
        samples: calibration rows, of each task of a mixture too.
        init: R0, as for `fit`.
        dtype: of the frozen base; what is trained is float32.
        optimizer: `adamw`, or `muon`: of R ours, of the other methods' factors torch's. A classifier's head is
            trained by AdamW in any case.
        targets: the linear layers that a method is put on, as for `calibrate`; PEFT's methods too.
        draw: of a basis without data, which one.
    """

    task: str
    method: str
    lr: float = 0.0
    seed: int = 0
    rank: int = 64
    basis: str = ""
    reduction: str = "sign"
    balanced: bool = False
    samples: int = 50
    init: str = "svd"
    steps: int = 120
    batch_size: int = 8
    valid_rows: int = 200
    test_rows: int = 256
    dtype: str = "float32"
    optimizer: str = "adamw"
    targets: str = ALL_LINEAR
    draw: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """What a line of results holds of it: not the usual targets and draw, since the first lines knew no other."""
        usual = {"targets": ALL_LINEAR, "draw": 0}
        return {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The lines of one file, which only grows. Several processes may add to it: a line is one write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> dict[str, dict[str, Any]]:
        """Key → line."""
        if not self.path.exists():
            return {}
        return {line["key"]: line for line in map(json.loads, self.path.read_text().splitlines())}

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())


class Budget:
    """Minutes after which no further cell is begun."""

    def __init__(self, minutes: float | None) -> None:
        self._until = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def spent(self) -> bool:
        return self._until is not None and time.monotonic() > self._until


class OutOfTime(Exception):
    """The budget is spent; what is there is kept."""


class Runner:
    """Runs cells that have no result yet."""

    def __init__(self, results: Results, budget: Budget) -> None:
        self.results, self.budget = results, budget

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """The result of `cell`. Raises OutOfTime where it would have to be run and the budget is spent."""
        known = self.results.lines().get(cell.key)
        if known is not None:
            return known
        if self.budget.spent:
            raise OutOfTime
        from .training import run_cell

        line = {"key": cell.key, **cell.fields, **run_cell(cell)}
        self.results.add(line)
        print(
            f"{cell.task:10} {cell.method:8} {cell.basis:10} {cell.targets} lr {cell.lr:.0e} seed {cell.seed}: "
            f"loss {line['loss']:.4f}, {line['metric']} {line['value']:.4f}, {line['seconds']:.0f} s",
            flush=True,
        )
        return line


CLASSIFYING = ("cola", "rte", "sst2")
GENERATING = ("banking77", "e2e", "arc_easy", "boolq", "mawps")
# Models of this size do not learn the others: there every method is as good as any, and says nothing of one.
LEARNT = ("banking77", "e2e", "mawps", "cola", "sst2")
# The layers that bring the wide middle of an MLP back to the width of the model: all, or the upper half of thirty.
DOWN, UPPER_DOWN = "down_proj", r".*layers[.](1[5-9]|2[0-9])[.]mlp[.]down_proj"
# Of cola nothing is learnt in 400 steps; of the others nothing in the usual number but how to answer.
_STEPS = {"cola": 1200, "rte": 60, "arc_easy": 40}
_OF_THE_ENCODER = {DOWN: ".*layer[.][0-9][.]output[.]dense", UPPER_DOWN: ".*layer[.][3-5][.]output[.]dense"}


def cell(task: str, **fields: Any) -> Cell:
    """A cell of the full tables; `targets` may be DOWN or UPPER_DOWN for classifiers too.

    Classifiers are small, train on more rows and answer all that are held out; of generators the base is bfloat16.
    """
    if task in CLASSIFYING:
        targets = fields.get("targets", ALL_LINEAR)
        fields["targets"] = _OF_THE_ENCODER.get(targets, targets)
        own: dict[str, Any] = {"steps": 400, "batch_size": 16, "valid_rows": 500, "test_rows": 1100}
    else:
        own = {"dtype": "bfloat16"}  # as such models are used, and in two thirds of the time
    if task in _STEPS:
        own["steps"] = _STEPS[task]
    return Cell(task, **{**own, **fields})


def calibrated_on(cell: Cell) -> list[str]:
    """The tasks whose gradients the cell's basis is made from."""
    kind = CLASSIFYING if cell.task in CLASSIFYING else GENERATING
    named = {"own": [cell.task], "mixture": kind, "without": [task for task in kind if task != cell.task]}
    return list(named.get(cell.basis, [cell.basis]))


LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
START = {
    **{"lora": 1e-3, "rslora": 3e-4, "dora": 1e-3, "pissa": 3e-4},
    **{"lora-xs": 3e-3, "lora-xs-mirrored": 3e-3, "lora-sb": 1e-2},
}


def tuned(cell: Cell, run: Runner) -> Cell:
    """`cell` at the rate of least validation loss: a descent along the ladder that ends between two worse rates.

    It begins at the best of those that have been run, wherever an earlier search began.
    """

    def loss(place: int) -> float:
        return float(run(replace(cell, lr=LADDER[place]))["loss"])

    known, start = run.results.lines(), LADDER.index(START[cell.method])
    there = [place for place, lr in enumerate(LADDER) if replace(cell, lr=lr).key in known]
    best = min(there or [start], key=loss)
    while True:
        neighbours = [place for place in (best - 1, best + 1) if 0 <= place < len(LADDER)]
        better = min(neighbours, key=loss)
        if loss(better) >= loss(best):
            return replace(cell, lr=LADDER[best])
        best = better


def over_seeds(cell: Cell, seeds: Sequence[int], run: Runner) -> Iterator[dict[str, Any]]:
    """The tuned cell's results, one for each seed; the rate is chosen with the first."""
    chosen = tuned(replace(cell, seed=seeds[0]), run) if cell.method != "base" else cell
    for seed in seeds if cell.method != "base" else seeds[:1]:
        yield run(replace(chosen, seed=seed))
