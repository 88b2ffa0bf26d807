"""docs/results/*.jsonl → docs/results/README.md, plots, and the tables in docs/benchmarks.md and README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integration.evidence.best import Best, Identity, Line, best_rates, identity
from integration.evidence.cells import LEARNT, RESULTS, RUNS, Results

from .basis_tables import basis_tables, captured, equal_rates, origins, pairs, planned, prediction
from .basis_tables import plot as plot_bases
from .comparisons import between, calibrations, draws, four_bits, rate_steps, small_lora, unlisted
from .method_tables import (
    CHOSEN,
    CHOSEN_TASKS,
    MAIN,
    USUAL,
    beside_lora,
    by_method,
    costs,
    longer,
    loss,
    methods_table,
    metric,
    score_and_loss,
    settled,
    sharing,
    unfinished,
)
from .tradeoff import plot as plot_methods

CAPTURE_PICTURE = "capture-loss.png"
LOSSES = (
    "On valid rows, mean over the seeds; in parentheses the difference from LoRA r = 8 (seed by seed, ± its standard "
    "error; without one it is of one seed). †: four errors or more, of three seeds or more, on a task that is learnt. "
    "*: the search for a rate has not ended; then there is no †."
)
ORIGINS = "Losses less the loss in the task's own basis, otherwise as above; all linear layers, by Muon."
CALIBRATED = (
    "Losses less those in bases from signs of 50 rows a task, otherwise as above; r = 64, all linear layers, by Muon."
)
CAPTURED = "The capture ratio before training, mean of the five tasks of text, in per cent."


def run(*, quick: bool) -> dict[str, Any]:
    best, captures = known()
    written = pages(best, captures)
    for path, text in written.items():
        path.write_text(text)
    plot_methods(by_method(best), RESULTS / "trained-loss.png")
    plot_bases(pairs(best, captures), RESULTS / CAPTURE_PICTURE)
    print(written[RESULTS / "README.md"])
    return {"name": "report", "cells": len(best), "captures": len(captures)}


def known() -> tuple[dict[Identity, Best], dict[Identity, Line]]:
    """The results that are kept: of training, and of capture."""
    captures = Results(RESULTS / "capture.jsonl").lines().values()
    return best_rates(Results(RUNS).lines().values()), {identity(line): line for line in captures}


def pages(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> dict[Path, str]:
    """The pages that hold tables, as they should be."""
    found = by_method(best)
    sections = [
        "# Results\n\nMade by `python -m integration.bench report` from the JSON lines beside this page; "
        "[benchmarks](../benchmarks.md#quality) says what they mean, and what was learnt from them.",
        f"## Scores\n\nOf all methods and tasks.\n\n{methods_table(found, metric)}",
        f"## Losses\n\n{LOSSES}\n\n{methods_table(found, loss)}",
        costs(found, best),
        f"## Bases of other origin\n\n{planned(best)}\n\n{ORIGINS}",
        *(f"At r = {rank}:\n\n{origins(best, rank)}" for rank in (16, 64, 128)),
        f"## What bases capture\n\n{CAPTURED}\n\n{captured(captures)}",
        f"## Bases otherwise calibrated\n\n{CALIBRATED}\n\n{calibrations(best)}",
        *basis_tables(best, captures),
        prediction(pairs(best, captures), CAPTURE_PICTURE),
        unlisted(best, captures),
    ]
    of_quality = {
        "main": methods_table(found, beside_lora, MAIN, LEARNT),
        "metrics": f"{methods_table(found, metric, USUAL, LEARNT)}\n\n{unfinished(found)}",
        "score-and-loss": score_and_loss(found),
        "between": between(found),
        "small-lora": small_lora(found),
        "rates": rate_steps(best),
        "origins": origins(best, 64),
        "draws": draws(best),
        "sharing": sharing(found),
        "longer": longer(by_method(best, steps=600)),
        "four-bits": four_bits(by_method(best, dtype="nf4"), found),
        "correlations": equal_rates(best, captures),
    }
    of_readme = {"chosen": methods_table(found, settled, CHOSEN, CHOSEN_TASKS), "small-lora": small_lora(found)}
    benchmarks, readme = RESULTS.parent / "benchmarks.md", RESULTS.parents[1] / "README.md"
    return {
        RESULTS / "README.md": "\n\n".join(sections) + "\n",
        benchmarks: with_tables(benchmarks.read_text(), of_quality),
        readme: with_tables(readme.read_text(), of_readme),
    }


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """`page` with each table between the comments that name it."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by bench report -->\n", f"\n<!-- end of {name} -->"
        assert begin in page.partition(end)[0], f"the page has no place for {name}"
        page = page[: page.index(begin) + len(begin)] + table + page[page.index(end) :]
    return page
