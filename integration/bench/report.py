"""docs/results/*.jsonl → docs/results/README.md and its plots. The best rate is that of least valid loss at seed 0."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from integration.evidence.cells import CLASSIFYING, GENERATING, RESULTS, RUNS, Cell, Results, cell
from lorasb_export.metrics import pearson
from lorasb_export.settings import DRAWN

from .quality import METHODS, summary

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASKS = (*CLASSIFYING, *GENERATING)
COLUMNS = ("own", "mixture", "mixture, balanced", "without", "another task", "wsvd", *DRAWN)
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
Line = dict[str, Any]
_UNTRAINED = ("key", "lr", "seed", "loss", "metric", "value", "trainable", "adapter_bytes", "seconds", "device")


def run(*, quick: bool) -> dict[str, Any]:
    runs = Results(RUNS).lines().values()
    tuned = best_of(runs)
    trained = tuned | best_tried(runs, tuned)
    captures = {_identity(line): line for line in Results(RESULTS / "capture.jsonl").lines().values()}
    sections = [
        "# Results\n\nMade by `python -m integration.bench report` from the JSON lines beside this page; "
        "[benchmarks](../benchmarks.md) says what they mean.",
        _quality_table(tuned),
        *_basis_tables(trained, tuned, captures),
        _prediction(trained, captures),
    ]
    page = RESULTS / "README.md"
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    print(page.read_text())
    return {"name": "report", "cells": len(tuned), "captures": len(captures)}


def _identity(line: Line) -> tuple[Any, ...]:
    """What a cell is, apart from rate and seed."""
    return tuple((key, value) for key, value in sorted(line.items()) if key not in (*_UNTRAINED, "capture", "random"))


def _changed(identity: tuple[Any, ...], **fields: Any) -> tuple[Any, ...]:
    return tuple(sorted((dict(identity) | fields).items()))


def best_of(lines: Iterable[Line]) -> dict[tuple[Any, ...], list[Line]]:
    """Identity of a cell → its lines at the best rate, one for each seed; only where worse rates lie on both sides."""
    found = {}
    for identity, of_cell in _grouped(lines).items():
        first = sorted((line for line in of_cell if line["seed"] == 0), key=lambda line: line["lr"])
        best = min(first, key=lambda line: line["loss"])
        inside = best["method"] == "base" or first[0]["lr"] < best["lr"] < first[-1]["lr"]
        if inside:
            found[identity] = [line for line in of_cell if line["lr"] == best["lr"]]
    return found


def best_tried(
    lines: Iterable[Line], trained: Mapping[tuple[Any, ...], list[Line]]
) -> dict[tuple[Any, ...], list[Line]]:
    """Of bases whose search for a rate has not ended: their lines at the best so far, where the own's was tried too."""
    found = {}
    for identity, of_cell in _grouped(lines).items():
        own = trained.get(_changed(identity, basis="own", balanced=False))
        first = {line["lr"]: line["loss"] for line in of_cell if line["seed"] == 0}
        if own and identity not in trained and own[0]["lr"] in first:
            found[identity] = [line for line in of_cell if line["lr"] == min(first, key=first.__getitem__)]
    return found


def _grouped(lines: Iterable[Line]) -> dict[tuple[Any, ...], list[Line]]:
    grouped: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        grouped[_identity(line)].append(line)
    return grouped


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quality_table(trained: Mapping[tuple[Any, ...], list[Line]]) -> str:
    """Rows: methods; columns: tasks. Mean ± sd over the seeds."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for task, (name, fields) in itertools.product(TASKS, METHODS.items()):
        if lines := trained.get(_identity(cell(task, **fields).fields)):
            found[name, task] = summary(lines) | {"seeds": len(lines)}
    tasks = [task for task in TASKS if any(of == task for _, of in found)]
    if not tasks:
        return ""
    metrics = {task: next(s["metric"] for (_, of), s in found.items() if of == task) for task in tasks}
    rows = []
    for name in METHODS:
        cells = [found.get((name, task)) for task in tasks]
        shown = [_cell(of) for of in cells]
        rows.append([name, *shown])
    table = _table(["", *(f"{task} ({metrics[task]})" for task in tasks)], rows)
    sizes = _table(
        ["", *tasks],
        [[name, *(_size(found.get((name, task))) for task in tasks)] for name in METHODS if name != "base"],
    )
    rates = _table(
        ["", *tasks],
        [[name, *(_rate(found.get((name, task))) for task in tasks)] for name in METHODS if name != "base"],
    )
    return (
        "## Quality\n\nTest metric in percent, mean ± sd over the seeds (their number where it is not three).\n\n"
        f"{table}\n\nTrained parameters, and seconds of training (of one core, where the device is a CPU):\n\n{sizes}"
        f"\n\nBest learning rate, and the loss on valid rows there:\n\n{rates}"
    )


def _cell(of: dict[str, Any] | None) -> str:
    if of is None:
        return "-"
    spread = f" ± {100 * of['sd']:.1f}" if of["seeds"] > 1 else ""
    few = f" ({of['seeds']})" if of["seeds"] == 2 or (of["seeds"] == 1 and of["steps"]) else ""
    return f"{100 * of['mean']:.1f}{spread}{few}"


def _size(of: dict[str, Any] | None) -> str:
    return "-" if of is None else f"{of['trainable'] / 1e6:.2f} M, {of['seconds']:.0f} s"


def _rate(of: dict[str, Any] | None) -> str:
    return "-" if of is None else f"{of['lr']:.0e}, {of['loss']:.3f}"


def _column(line: Line) -> str:
    """The origin of a basis, in words."""
    if line["basis"] in COLUMNS:
        return line["basis"] + (", balanced" if line["balanced"] else "")
    return "another task"


def _basis_tables(
    trained: Mapping[tuple[Any, ...], list[Line]],
    tuned: Mapping[tuple[Any, ...], list[Line]],
    captures: Mapping[tuple[Any, ...], Line],
) -> Iterable[str]:
    """For each rank, reduction and number of samples: capture, and the metric after training by each optimizer."""
    variants = sorted({(line["rank"], line["reduction"], line["samples"]) for line in captures.values()})
    for rank, reduction, samples in variants:
        of_variant = {
            identity: line
            for identity, line in captures.items()
            if (line["rank"], line["reduction"], line["samples"]) == (rank, reduction, samples)
        }
        there = {_column(line) for line in of_variant.values()}
        names = [name for name in COLUMNS if name in there]

        def rows(show: Callable[[tuple[Any, ...]], str], of_variant: Any = of_variant, names: Any = names) -> str:
            found = {(line["task"], _column(line)): show(identity) for identity, line in of_variant.items()}
            shown = [task for task in TASKS if any(found.get((task, name), "-") != "-" for name in names)]
            lines = [[task, *(found.get((task, name), "-") for name in names)] for task in shown]
            return _table(["", *names], lines) if lines else ""

        capture = rows(lambda identity: f"{captures[identity]['capture']:.0%}")
        section = (
            f"## Bases of rank {rank}, {reduction}, {samples} samples\n\n"
            f"Capture ratio of a valid gradient, before training:\n\n{capture}"
        )
        for optimizer, name in OPTIMIZERS.items():
            cells = {identity: _changed(identity, optimizer=optimizer) for identity in of_variant}
            shown = {
                i: _trained(trained.get(of)) + " *" * (of in trained and of not in tuned) for i, of in cells.items()
            }
            if metric := rows(shown.__getitem__):
                section += (
                    f"\n\nTest metric in percent (and loss on valid rows), after training by {name} "
                    f"(* at the best rate tried, its search not ended):\n\n{metric}"
                )
        yield section


def _trained(lines: list[Line] | None) -> str:
    if not lines:
        return "-"
    found = summary(lines) | {"seeds": len(lines)}
    return f"{_cell(found)} ({found['loss']:.3f})"


def _prediction(trained: Mapping[tuple[Any, ...], list[Line]], captures: Mapping[tuple[Any, ...], Line]) -> str:
    """Does the capture ratio say how much a basis costs? Each basis against the task's own, same variant."""
    points: Mapping[str, dict[str, tuple[list[float], list[float]]]]
    points = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for identity, lines in trained.items():
        own_identity = _changed(identity, basis="own", balanced=False)
        of, own_capture = (captures.get(_changed(i, optimizer=Cell.optimizer)) for i in (identity, own_identity))
        own = trained.get(own_identity)
        if of is None or own is None or own_capture is None or lines is own:
            continue
        seeds = {line["seed"] for line in lines} & {line["seed"] for line in own}
        of_basis, of_own = (statistics.mean(x["loss"] for x in some if x["seed"] in seeds) for some in (lines, own))
        x, y = points[f"{OPTIMIZERS[lines[0]['optimizer']]}, r = {of['rank']}"][of["task"]]
        x.append(of["capture"] - own_capture["capture"])
        y.append(of_basis - of_own)
    points = {kind: tasks for kind, tasks in points.items() if sum(len(x) for x, _ in tasks.values()) > 2}
    if not points:
        return ""
    figure, all_axes = plt.subplots(1, len(points), figsize=(5 * len(points), 4), layout="constrained", squeeze=False)
    said = []
    for axes, (kind, of_tasks) in zip(all_axes[0], sorted(points.items()), strict=True):
        for task, (xs, ys) in of_tasks.items():
            axes.scatter(xs, ys, label=task)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set_title(kind)
        axes.set_xlabel("capture ratio, less the own basis's")
        axes.set_ylabel("valid loss, less the own basis's")
        axes.legend()
        x, y = (list(itertools.chain.from_iterable(pair[i] for pair in of_tasks.values())) for i in (0, 1))
        said.append(f"{kind}: {len(x)} pairs of {', '.join(of_tasks)}, Pearson's correlation {pearson(x, y):.2f}.")
    path: Path = RESULTS / "capture-loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return (
        "## Does the capture ratio predict the loss?\n\n"
        "Every basis against the task's own at the same rank, reduction, samples and seeds. "
        f"{' '.join(said)}\n\n![loss against capture]({path.name})"
    )
