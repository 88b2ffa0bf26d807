"""The card of a repository that holds a whole project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..choices import SEQ_CLS
from ..hub.ids import kind_of_part
from .card import whole_card
from .loading import adapter_lines
from .sections import MAX_ROWS, Facts, base_link, figure_rows, grid


def project_card(index: Mapping[str, Any], name: str, facts: Facts) -> str:
    """From the index of the repository (`lorasb.json`); `name` is what a reader loads it by."""
    base, parts = index["base"], index["parts"]
    adapters = {part: about for part, about in parts.items() if kind_of_part(part) == "adapter"}
    bases = {part: about for part, about in parts.items() if part not in adapters}
    first, about = next(iter(adapters.items()))
    task_type = about["task_type"]
    served = [f"{name}/{part}" for part in adapters if adapters[part]["task_type"] != SEQ_CLS][:2]
    body = f"""# {len(adapters):,} LoRA-SB adapters for {base_link(base)}

Each adds `s·B·R·A` to the weights of linear layers, and is a file of its `R` alone.{_shared(bases)}

## How to load one

{adapter_lines(base, task_type, about, f"{name}/{first}", served)}
{_table(adapters)}"""
    made = {f"{part} sha256": about["sha256"] for part, about in bases.items()}
    return whole_card(body, base, made, facts, name, task_type, {}, library="lorasb", tags=["lora-sb-project"])


def _shared(bases: Mapping[str, Any]) -> str:
    """Where `B` and `A` are; those of some adapters may lie inside of them, or elsewhere on the Hub."""
    if not bases:
        return ""
    places = ", ".join(f"`{part}`" for part in bases)
    return f" The frozen `B` and `A`, which many share, lie here once: {places}."


def _table(adapters: Mapping[str, Any]) -> str:
    """What every adapter scores on held-out rows, beside the base."""
    rows = [row for part, about in adapters.items() for row in _figures(part, about["evaluation"])]
    said = [f"The first {MAX_ROWS:,} of {len(rows):,} figures; `lorasb.json` has all."] if len(rows) > MAX_ROWS else []
    if any(split == "valid" for _, split, *_ in rows):
        said.append("The `valid` rows may have chosen the checkpoint too: the adapter's own card says so.")
    header = ["adapter", "split", "metric", "rows", "base", "with it"]
    return grid("Adapters", header, rows[:MAX_ROWS], before=" ".join(said))


def _figures(part: str, evaluation: Mapping[str, Any]) -> Iterator[list[Any]]:
    """A line for each figure; for an adapter without any, one that says so."""
    name = part.partition("/")[2]
    if not any(evaluation.values()):
        yield [name, *["-"] * 5]
    for figures in figure_rows(evaluation):
        yield [name, *figures]
