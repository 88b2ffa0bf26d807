"""docs/results/*.jsonl → docs/results/README.md, plots, and the tables of quality in docs/benchmarks.md.

The best rate is that of least valid loss at seed 0.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from integration.evidence.cells import CLASSIFYING, GENERATING, RESULTS, RUNS, Cell, Results, cell
from lorasb_export.metrics import pearson
from lorasb_export.settings import DRAWN

from .quality import METHODS, summary
from .tradeoff import plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASKS = (*GENERATING, *CLASSIFYING)
COLUMNS = ("own", "mixture", "mixture, balanced", "without", "another task", "wsvd", *DRAWN)
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
# README's table: the tasks that tell methods apart, and what a reader chooses between.
CHOSEN_TASKS = ("banking77", "e2e", "sst2", "cola")
CHOSEN = {
    "PEFT's LoRA, r = 8": "LoRA r=8",
    "PEFT's rsLoRA, r = 32": "rsLoRA r=32",
    "as published: own basis, r = 64, AdamW": "as published: own basis, r=64, AdamW",
    "own basis, r = 64": "own basis, r=64",
    "a basis made from all tasks, r = 64": "shared basis, r=64",
    "one random basis for all tasks, r = 64": "random basis, r=64",
    "**what `init` sets for text**: r = 128 on `down_proj`, a basis made from five tasks": "down: shared basis, r=128",
    "the same, own basis": "down: own basis, r=128",
    "the same, one random basis for all tasks": "down: random basis, r=128",
    "a block of r = 256 on `down_proj`": "down: block, r=256",
}
Line = dict[str, Any]
Identity = tuple[tuple[str, Any], ...]  # what a cell is, apart from rate and seed
_UNTRAINED = ("key", "lr", "seed", "loss", "metric", "value", "trainable", "adapter_bytes", "seconds", "device")


class Best(NamedTuple):
    """A cell's lines at its best rate, one for each seed, and all rates that were tried."""

    lines: list[Line]
    rates: frozenset[float]

    @property
    def closed(self) -> bool:
        """Whether worse rates lie on both sides."""
        return self.lines[0]["method"] == "base" or min(self.rates) < self.lines[0]["lr"] < max(self.rates)


def run(*, quick: bool) -> dict[str, Any]:
    runs = list(Results(RUNS).lines().values())
    best = best_rates(runs)
    captures = {_identity(line): line for line in Results(RESULTS / "capture.jsonl").lines().values()}
    found = by_method(best)
    sections = [
        "# Results\n\nMade by `python -m integration.bench report` from the JSON lines beside this page; "
        "[benchmarks](../benchmarks.md#quality) says what they mean, and has the metrics.",
        _costs(found),
        *_basis_tables(best, captures),
        _prediction(best, captures),
    ]
    page = RESULTS / "README.md"
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    of_quality = {"metrics": _methods_table(found, _metric), "losses": _methods_table(found, _loss)}
    of_readme = {"chosen": _methods_table(found, _settled, CHOSEN, CHOSEN_TASKS)}
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


def _identity(line: Line) -> Identity:
    return tuple((key, value) for key, value in sorted(line.items()) if key not in (*_UNTRAINED, "capture", "random"))


def _changed(identity: Identity, **fields: Any) -> Identity:
    return tuple(sorted((dict(identity) | fields).items()))


def best_rates(lines: Iterable[Line]) -> dict[Identity, Best]:
    """Of every cell that was trained with the first seed."""
    grouped: dict[Identity, list[Line]] = defaultdict(list)
    for line in lines:
        grouped[_identity(line)].append(line)
    found = {}
    for identity, of_cell in grouped.items():
        losses = {line["lr"]: line["loss"] for line in of_cell if line["seed"] == 0}
        if losses:
            best = min(losses, key=losses.__getitem__)
            found[identity] = Best([line for line in of_cell if line["lr"] == best], frozenset(losses))
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_method(best: Mapping[Identity, Best]) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, task) → what its seeds came to, and its loss less that of LoRA r = 8 with the same seeds."""
    found = {}
    for task, (name, fields) in itertools.product(TASKS, METHODS.items()):
        if there := best.get(_identity(cell(task, **fields).fields)):
            found[name, task] = _summary(there)
    for (_, task), of in found.items():
        of_lora = found.get(("LoRA r=8", task), {"losses": {}})["losses"]
        of["less_lora"] = [loss - of_lora[seed] for seed, loss in of["losses"].items() if seed in of_lora]
    return found


def _summary(best: Best) -> dict[str, Any]:
    losses = {line["seed"]: line["loss"] for line in best.lines}
    return summary(best.lines) | {"seeds": len(best.lines), "closed": best.closed, "losses": losses}


def _methods_table(
    found: Mapping[tuple[str, str], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    methods: Mapping[str, str] | None = None,
    tasks: Sequence[str] = TASKS,
) -> str:
    """A row for each method that was run; `methods` are those to show, by what they are called there."""
    tasks = [task for task in tasks if any(of == task for _, of in found)]
    metrics = {task: next(s["metric"] for (_, of), s in found.items() if of == task) for task in tasks}
    rows = []
    for label, name in (methods or {name: name for name in METHODS}).items():
        of_tasks = [found.get((name, task)) for task in tasks]
        if any(of_tasks):
            rows.append([label, _trained(name, found), *("" if of is None else show(of) for of in of_tasks)])
    return _table(["", "trained", *(f"{task}, {metrics[task].replace('_', ' ')}" for task in tasks)], rows)


def _trained(name: str, found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """The parameters that are trained, of those of LoRA r = 8 on the same task: on text, and on the encoder."""
    ratios = {
        kind: of["trainable"] / found["LoRA r=8", task]["trainable"]
        for kind, tasks in (("text", GENERATING), ("encoder", CLASSIFYING))
        for task in tasks
        if (of := found.get((name, task))) and ("LoRA r=8", task) in found
    }
    return ", ".join(dict.fromkeys(f"{ratio:.2g}" for ratio in ratios.values()))


def _metric(of: dict[str, Any]) -> str:
    """Mean ± sd in percent; the number of seeds where it is not three; * where the search for a rate has not ended."""
    spread = f" ± {100 * of['sd']:.1f}" if of["seeds"] > 1 else ""
    few = f" ({of['seeds']})" if of["seeds"] < 3 and of["steps"] else ""
    return f"{100 * of['mean']:.1f}{spread}{few}" + " *" * (not of["closed"])


def _settled(of: dict[str, Any]) -> str:
    """As `_metric`; nothing where the search for a rate has not ended."""
    return _metric(of) if of["closed"] else ""


def _loss(of: dict[str, Any]) -> str:
    """Mean, and the mean ± standard error of the differences from LoRA r = 8; * as for `_metric`."""
    differences, text = of["less_lora"], f"{of['loss']:.3f}"
    if of["steps"] and any(differences):
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
        text += f" ({statistics.mean(differences):+.3f}{'' if error is None else f' ± {error:.3f}'})"
    return text + " *" * (not of["closed"])


def _costs(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    sizes = _methods_table(found, lambda of: f"{of['trainable'] / 1e6:.2f} M, {of['adapter_bytes'] / 1e6:.2f} MB")
    runs = _methods_table(found, lambda of: f"{of['steps']} steps, {of['seconds']:.0f} s" if of["steps"] else "")
    rates = _methods_table(found, lambda of: f"{of['lr']:.0e}" + " *" * (not of["closed"]) if of["steps"] else "")
    return (
        "## Quality: what it takes\n\nParameters that are trained, and their bytes in fp32. A basis of a task's own "
        "lies in its adapter besides: of SmolLM2-135M B and A take 78 MB at r = 64 on all linear layers, and 32 MB at "
        f"r = 128 on `down_proj`.\n\n{sizes}\n\n"
        f"Steps, and seconds of training (of one core, where the device is a CPU):\n\n{runs}\n\n"
        f"Best learning rate of a grid in steps of three (* at an end of those tried, the search not ended):\n\n{rates}"
    )


def _column(line: Line) -> str:
    """The origin of a basis, in words."""
    if line["basis"] in COLUMNS:
        return line["basis"] + (", balanced" if line["balanced"] else "")
    return "another task"


def _basis_tables(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> Iterable[str]:
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

        def rows(show: Callable[[Identity], str], of_variant: Any = of_variant, names: Any = names) -> str:
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
            shown = {identity: _shown(best, of) for identity, of in cells.items()}
            if metric := rows(shown.__getitem__):
                section += (
                    f"\n\nTest metric in percent (and loss on valid rows), after training by {name} "
                    f"(* at the best rate tried, its search not ended):\n\n{metric}"
                )
        yield section


def comparable(best: Mapping[Identity, Best], identity: Identity) -> Best | None:
    """A basis beside the task's own: at its best rate, or, where the search has not ended, if the own's was tried."""
    own, found = best.get(_changed(identity, basis="own", balanced=False)), best.get(identity)
    own_was_tried = own and found and own.closed and own.lines[0]["lr"] in found.rates
    return found if found and (found.closed or own_was_tried) else None


def _shown(best: Mapping[Identity, Best], identity: Identity) -> str:
    if (found := comparable(best, identity)) is None:
        return "-"
    of = _summary(found)
    return f"{_metric(of)} ({of['loss']:.3f})"


def _prediction(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> str:
    """Does the capture ratio say how much a basis costs? Each basis against the task's own, same variant."""
    points: Mapping[str, dict[str, tuple[list[float], list[float]]]]
    points = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for identity in best:
        own_identity = _changed(identity, basis="own", balanced=False)
        of, own_capture = (captures.get(_changed(i, optimizer=Cell.optimizer)) for i in (identity, own_identity))
        found, own = comparable(best, identity), comparable(best, own_identity)
        if identity == own_identity or of is None or own_capture is None or found is None or own is None:
            continue
        seeds = {line["seed"] for line in found.lines} & {line["seed"] for line in own.lines}
        of_basis, of_own = (statistics.mean(x["loss"] for x in b.lines if x["seed"] in seeds) for b in (found, own))
        x, y = points[f"{OPTIMIZERS[dict(identity)['optimizer']]}, r = {of['rank']}"][of["task"]]
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
