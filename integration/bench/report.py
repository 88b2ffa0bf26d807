"""docs/results/*.jsonl → docs/results/README.md, plots, and the tables in docs/benchmarks.md and README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integration.evidence.best import Best, Identity, Line, best_rates, identity
from integration.evidence.cells import RESULTS, RUNS, Results

from .basis_tables import basis_tables, captured, origins, pairs, prediction
from .basis_tables import plot as plot_bases
from .method_tables import (
    CHOSEN,
    CHOSEN_TASKS,
    MAIN,
    MAIN_TASKS,
    by_method,
    costs,
    longer,
    loss,
    methods_table,
    metric,
    optimizers,
    settled,
    settled_means,
    sharing,
    unfinished,
)
from .tradeoff import plot as plot_methods

CAPTURE_PICTURE = "capture-loss.png"


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
        "[benchmarks](../benchmarks.md#quality) says what they mean, and has the metrics.",
        costs(found),
        *basis_tables(best, captures),
        prediction(pairs(best, captures), CAPTURE_PICTURE),
    ]
    of_quality = {
        "main": methods_table(found, settled_means, MAIN, MAIN_TASKS),
        "metrics": f"{methods_table(found, metric)}\n\n{unfinished(found)}",
        "losses": methods_table(found, loss),
        "sharing": sharing(found),
        **{f"origins-{rank}": origins(best, rank) for rank in (16, 64, 128)},
        "captured": captured(captures),
        "optimizers": optimizers(found),
        "longer": longer(by_method(best, steps=600)),
    }
    of_readme = {"chosen": methods_table(found, settled, CHOSEN, CHOSEN_TASKS)}
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
