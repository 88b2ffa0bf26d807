"""docs/results/*.jsonl → docs/results/README.md, plots, and the tables in docs/benchmarks.md and README.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from integration.evidence.best import best_rates, identity
from integration.evidence.cells import RESULTS, RUNS, Results

from .basis_tables import basis_tables, prediction
from .method_tables import CHOSEN, CHOSEN_TASKS, by_method, costs, longer, loss, methods_table, metric, settled, sharing
from .tradeoff import plot


def run(*, quick: bool) -> dict[str, Any]:
    runs = list(Results(RUNS).lines().values())
    best = best_rates(runs)
    captures = {identity(line): line for line in Results(RESULTS / "capture.jsonl").lines().values()}
    found = by_method(best)
    sections = [
        "# Results\n\nMade by `python -m integration.bench report` from the JSON lines beside this page; "
        "[benchmarks](../benchmarks.md#quality) says what they mean, and has the metrics.",
        costs(found),
        *basis_tables(best, captures),
        prediction(best, captures),
    ]
    page = RESULTS / "README.md"
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    of_quality = {
        "metrics": methods_table(found, metric),
        "losses": methods_table(found, loss),
        "sharing": sharing(found),
        "longer": longer(by_method(best, steps=600)),
    }
    of_readme = {"chosen": methods_table(found, settled, CHOSEN, CHOSEN_TASKS)}
    for path, tables in ((RESULTS.parent / "benchmarks.md", of_quality), (RESULTS.parents[1] / "README.md", of_readme)):
        path.write_text(with_tables(path.read_text(), tables))
    plot(found, RESULTS / "trained-loss.png")
    print(page.read_text())
    return {"name": "report", "cells": len(best), "captures": len(captures)}


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """`page` with each table between the comments that name it."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by bench report -->\n", f"\n<!-- end of {name} -->"
        assert begin in page.partition(end)[0], f"the page has no place for {name}"
        page = page[: page.index(begin) + len(begin)] + table + page[page.index(end) :]
    return page
