"""LoRA-SB beside LoRA and its kin on real tasks, every method at its best learning rate, over several seeds.

Results lie in docs/results/runs.jsonl, one line a training run; a run that is there is not repeated, so the table
may be filled over many sittings: `--minutes` ends one. `python -m integration.bench report` makes tables and plots.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration.evidence.best import summary
from integration.evidence.cells import (
    CLASSIFYING,
    DOWN,
    GENERATING,
    RUNS,
    UPPER_DOWN,
    Budget,
    OutOfTime,
    Results,
    Runner,
    cell,
    over_seeds,
)

TASKS = (*CLASSIFYING, *GENERATING)
_MUON = {"method": "lora-sb", "optimizer": "muon"}
METHODS: dict[str, dict[str, Any]] = {
    "base": {"method": "base", "rank": 0, "steps": 0},
    "LoRA r=2": {"method": "lora", "rank": 2},
    "LoRA r=8": {"method": "lora", "rank": 8},
    "LoRA r=8, Muon": {"method": "lora", "rank": 8, "optimizer": "muon"},
    "LoRA r=32": {"method": "lora", "rank": 32},
    "rsLoRA r=8": {"method": "rslora", "rank": 8},
    "rsLoRA r=32": {"method": "rslora", "rank": 32},
    "PiSSA r=8": {"method": "pissa", "rank": 8},
    "DoRA r=8": {"method": "dora", "rank": 8},
    "LoRA-XS r=64": {"method": "lora-xs", "rank": 64},
    "LoRA-XS r=64, mirrored": {"method": "lora-xs-mirrored", "rank": 64},
    "as published: own basis, r=64, AdamW": {"method": "lora-sb", "rank": 64, "basis": "own"},
    "shared basis, r=64, AdamW": {"method": "lora-sb", "rank": 64, "basis": "mixture"},
    "own basis, r=64": {**_MUON, "rank": 64, "basis": "own"},
    "own basis, r=64, R0 = 0": {**_MUON, "rank": 64, "basis": "own", "init": "zero"},
    "shared basis, r=64": {**_MUON, "rank": 64, "basis": "mixture"},
    "balanced basis, r=64": {**_MUON, "rank": 64, "basis": "mixture", "balanced": True},
    "the weights' directions, r=64": {**_MUON, "rank": 64, "basis": "wsvd"},
    "random basis, r=64": {**_MUON, "rank": 64, "basis": "random"},
    "random basis, r=96": {**_MUON, "rank": 96, "basis": "random"},
    "own basis, r=128": {**_MUON, "rank": 128, "basis": "own"},
    "block, r=64": {**_MUON, "rank": 64, "basis": "block"},
    "block, r=96": {**_MUON, "rank": 96, "basis": "block"},
    "block, r=128": {**_MUON, "rank": 128, "basis": "block"},
    "down: own basis, r=128": {**_MUON, "rank": 128, "basis": "own", "targets": DOWN},
    "down: shared basis, r=128": {**_MUON, "rank": 128, "basis": "mixture", "targets": DOWN},
    "down: random basis, r=128": {**_MUON, "rank": 128, "basis": "random", "targets": DOWN},
    "down: block, r=128": {**_MUON, "rank": 128, "basis": "block", "targets": DOWN},
    "down: block, r=256": {**_MUON, "rank": 256, "basis": "block", "targets": DOWN},
    "upper down: block, r=256": {**_MUON, "rank": 256, "basis": "block", "targets": UPPER_DOWN},
    "down: LoRA r=8": {"method": "lora", "rank": 8, "targets": DOWN},
    "down: LoRA r=32": {"method": "lora", "rank": 32, "targets": DOWN},
}
# These on every task; the others, which were tried where they promised something, are asked for one by one.
EVERYWHERE = (
    "base",
    *("LoRA r=8", "LoRA r=32", "rsLoRA r=32", "PiSSA r=8", "DoRA r=8", "LoRA-XS r=64"),
    *("as published: own basis, r=64, AdamW", "own basis, r=64", "shared basis, r=64"),
)
SEEDS = (0, 1, 2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--tasks", type=lambda words: words.split(","), default=TASKS, help="some, with commas")


def run(*, quick: bool, minutes: float | None = None, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """Runs what is missing. The quick run is one task, two methods, one seed and fewer steps, and keeps nothing."""
    if not quick:
        return _fill(Results(RUNS), tasks, EVERYWHERE, SEEDS, minutes)
    with tempfile.TemporaryDirectory() as scratch:
        short = {"steps": 20, "batch_size": 6, "valid_rows": 64, "test_rows": 64, "samples": 8}
        results = Results(Path(scratch) / "quick.jsonl")
        return _fill(results, ("sst2",), ("LoRA r=8", "as published: own basis, r=64, AdamW"), (0,), minutes, **short)


def _fill(
    results: Results,
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    minutes: float | None,
    **fields: Any,
) -> dict[str, Any]:
    runner, complete = Runner(results, Budget(minutes)), True
    table: dict[str, dict[str, Any]] = {}
    try:
        for method in methods:  # one for every task, before the next for any
            for task in tasks:
                lines = list(over_seeds(cell(task, **METHODS[method], **fields), seeds, runner))
                table.setdefault(task, {})[method] = summary(lines)
    except OutOfTime:
        complete = False
    for task, of_methods in table.items():
        for method, found in of_methods.items():
            spread = f"{found['mean']:.4f} ± {found['sd']:.4f}"
            print(f"{task:10} {method:38} {found['metric']:11} {spread}  lr {found['lr']:.0e}")
    return {"name": "quality", "complete": complete, "runs": len(results.lines()), "table": table}
