"""Tables of bases: capture before training and metric after; does the one predict the other?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from integration.evidence.best import Best, Identity, Line, changed, identity
from integration.evidence.cells import GENERATING, LEARNT, Cell, cell
from lorasb_export.evaluation.metrics import pearson
from lorasb_export.settings import DRAWN

from .basis import VARIANTS, trained_in
from .comparisons import setting
from .method_tables import TASKS, differences, marked, mean_error, metric, table
from .quality import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("own", "mixture", "mixture, balanced", "without", "another task", "wsvd", *DRAWN)
ORIGINS = {
    "one other task": "another task",
    "all other tasks": "without",
    "all tasks": "mixture",
    "the weights' directions": "wsvd",
    "random (draw 0)": "random",
}
REDUCTIONS = {"sign": "signs", "raw": "the gradient itself"}
_SAID = {"own": "its own", "mixture": "all tasks", "mixture, balanced": "all, balanced", "without": "all other tasks"}
_SAID |= {"another task": "one other task", "wsvd": "the weights' directions"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def _column(line: Line) -> str:
    """The origin of a basis, in words."""
    if line["basis"] in COLUMNS:
        return line["basis"] + (", balanced" if line["balanced"] else "")
    return "another task"


def basis_tables(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> Iterable[str]:
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
            return table(["", *names], lines) if lines else ""

        capture = rows(lambda identity: f"{captures[identity]['capture']:.0%}")
        section = (
            f"## Bases of rank {rank}, {reduction}, {samples} samples\n\n"
            f"Capture ratio of a valid gradient, before training:\n\n{capture}"
        )
        for optimizer, name in OPTIMIZERS.items():
            cells = {identity: changed(identity, optimizer=optimizer) for identity in of_variant}
            shown = {identity: _shown(best, of) for identity, of in cells.items()}
            if metric := rows(shown.__getitem__):
                section += (
                    f"\n\nTest metric in percent after training by {name}, and the loss on valid rows, in other bases "
                    f"less that in the task's own (* at the best rate tried, its search not ended):\n\n{metric}"
                )
        yield section


def origins(best: Mapping[Identity, Best], rank: int) -> str:
    """Loss in bases of other origin, less that in the task's own, seed by seed: all linear layers, by Muon."""
    lines: dict[str, list[str]] = {name: [] for name in ORIGINS}
    for task in LEARNT:
        own = identity(cell(task, **{**METHODS["own basis, r=64"], "rank": rank}).fields)
        kin = {
            _column(b.lines[0]): found
            for i, b in best.items()
            if changed(i, basis="own") == own and (found := comparable(best, i))
        }
        its_own = kin.get("own")
        for name, column in ORIGINS.items():
            of = kin.get(column)
            less = differences(of.summary["losses"], its_own.summary["losses"]) if of and its_own else []
            shown = "" if not (of and less) else marked(less) if of.closed else f"{mean_error(less, 3)} *"
            lines[name].append(shown)
    return table(["made from", *LEARNT], [[name, *cells] for name, cells in lines.items()])


def planned(best: Mapping[Identity, Best]) -> str:
    """How many of the runs that `bench basis` plans are there, and with how many seeds."""
    cells = [of for variant in VARIANTS for task in TASKS for of in trained_in(task, variant)]
    there = {of: found for of in (identity(of.fields) for of in cells) if (found := best.get(of))}
    ended = [len(found.lines) for found in there.values() if found.closed]
    others = [this for this, found in there.items() if not found.closed and dict(this)["task"] != "rte"]
    unended = len(there) - len(ended)
    more = sum(seeds > 2 for seeds in ended)
    counts = f"{ended.count(1)} with one seed, {ended.count(2)} with two, {more} with three or more"
    missing = len(cells) - len(there)
    return (
        f"Of the {len(cells)} cells of training that `bench basis` plans, {len(ended)} have a search that has ended: "
        f"{counts}. Of {unended} it has not ended; {unended - len(others)} of these are of rte, which is in no table "
        "of bases: there the smallest rate is the best, and a search cannot end."
        + (f" The others (with a \\*, or not shown): {'; '.join(map(setting, others))}." if others else "")
        + (f" {missing} have not been begun." if missing else "")
    )


def captured(captures: Mapping[Identity, Line]) -> str:
    """The capture ratio in bases of every origin, mean of the tasks that generate text, in per cent."""
    found: dict[tuple[int, str, int], dict[str, list[float]]] = {}
    for line in captures.values():
        if line["task"] in GENERATING:
            variant = found.setdefault((line["rank"], line["reduction"], line["samples"]), {})
            variant.setdefault(_column(line), []).append(100 * line["capture"])
    names = [name for name in COLUMNS if any(name in of for of in found.values())]
    rows = [
        [
            f"r = {rank}, {REDUCTIONS[reduction]}, {samples} rows a task",
            *(f"{statistics.mean(of[name]):.0f}" if len(of.get(name, ())) == len(GENERATING) else "" for name in names),
        ]
        for (rank, reduction, samples), of in sorted(found.items())
    ]
    return table(["", *(_SAID.get(name, name) for name in names)], rows)


def comparable(best: Mapping[Identity, Best], identity: Identity) -> Best | None:
    """A basis beside the task's own: at its best rate, or, where the search has not ended, if the own's was tried."""
    own, found = best.get(changed(identity, basis="own", balanced=False)), best.get(identity)
    own_was_tried = own and found and own.closed and own.lines[0]["lr"] in found.rates
    return found if found and (found.closed or own_was_tried) else None


def _shown(best: Mapping[Identity, Best], identity: Identity) -> str:
    if (found := comparable(best, identity)) is None:
        return "-"
    of, own = found.summary, best.get(changed(identity, basis="own", balanced=False))
    less = differences(of["losses"], own.summary["losses"]) if own and own is not found else []
    return f"{metric(of)} ({mean_error(less, 3) if less else format(of['loss'], '.3f')})"


# Kind of training → task → for each basis, what it captures and loses more than the task's own.
Pairs = dict[str, dict[str, tuple[list[float], list[float]]]]


def pairs(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> Pairs:
    """Each basis less the task's own of the same variant: capture ratio of seed 0, and valid loss of the same seeds."""
    points: Pairs = {}
    for this in (this for this in best if dict(this)["task"] in LEARNT):
        own_basis = changed(this, basis="own", balanced=False)
        of, own_capture = (captures.get(changed(i, optimizer=Cell.optimizer)) for i in (this, own_basis))
        found, own = comparable(best, this), comparable(best, own_basis)
        if this == own_basis or of is None or own_capture is None or found is None or own is None:
            continue
        seeds = {line["seed"] for line in found.lines} & {line["seed"] for line in own.lines}
        of_basis, of_own = (statistics.mean(x["loss"] for x in b.lines if x["seed"] in seeds) for b in (found, own))
        kind = f"{OPTIMIZERS[dict(this)['optimizer']]}, r = {of['rank']}"
        x, y = points.setdefault(kind, {}).setdefault(of["task"], ([], []))
        x.append(of["capture"] - own_capture["capture"])
        y.append(of_basis - of_own)
    # Of two pairs the correlation is 1 or -1.
    return {kind: points[kind] for kind in sorted(points) if any(len(x) > 2 for x, _ in points[kind].values())}


def correlation(of_tasks: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Pearson's correlation within the tasks, and of each of them with more than two pairs."""
    alone = [f"{task} {pearson(*pair):.2f} of {len(pair[0])}" for task, pair in of_tasks.items() if len(pair[0]) > 2]
    return f"{_within(of_tasks.values())} pairs within the tasks ({', '.join(alone)})"


def _within(groups: Iterable[tuple[Sequence[float], Sequence[float]]]) -> str:
    """Pearson's correlation of the pairs of all groups, less the means of their group and by its deviations: a group
    of large losses would else outweigh all others. Groups of fewer than three pairs, or without spread, are left out.
    """
    scaled: tuple[list[float], list[float]] = ([], [])
    for pair in groups:
        if len(pair[0]) > 2 and all(map(statistics.pstdev, pair)):
            for values, into in zip(pair, scaled, strict=True):
                mean, deviation = statistics.mean(values), statistics.pstdev(values)
                into += [(value - mean) / deviation for value in values]
    return f"{pearson(*scaled):.2f} of {len(scaled[0])}" if scaled[0] else ""


def equal_rates(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> str:
    """The correlation of capture and loss at the best rates, and among bases that were trained at one and the same.

    The latter with the first seed, among at least three bases of one task, rank, reduction and number of samples.
    """
    # (rank, where the rate lies) → the task's own basis and the rate → what every basis captures, and its loss
    found: dict[tuple[int, str], dict[tuple[Identity, float], tuple[list[float], list[float]]]] = {}
    for this, of in best.items():
        own = changed(this, basis="own", balanced=False)
        capture, of_own = captures.get(changed(this, optimizer=Cell.optimizer)), best.get(own)
        line = of.lines[0]
        if line["task"] not in LEARNT or line["optimizer"] != "muon" or not (capture and of_own and of_own.closed):
            continue
        best_rate = of_own.lines[0]["lr"]
        for rate, trained in of.first.items():
            where = "below" if rate < best_rate else "at" if rate == best_rate else "above"
            x, y = found.setdefault((line["rank"], where), {}).setdefault((own, rate), ([], []))
            x.append(capture["capture"])
            y.append(trained["loss"])
    points, rows = pairs(best, captures), []
    for rank in sorted({rank for rank, _ in found}):
        at_best = _within(points.get(f"{OPTIMIZERS['muon']}, r = {rank}", {}).values())
        at_one = (_within(found.get((rank, where), {}).values()) for where in ("below", "at", "above"))
        rows.append([f"r = {rank}", at_best, *at_one])
    places = ("below the best of the own basis", "at it", "above it")
    return table(["", "each at its best rate", *(f"one rate, {place}" for place in places)], rows)


def prediction(points: Pairs, picture: str) -> str:
    """Does the capture ratio say how much a basis costs?"""
    said = " ".join(f"{kind}: {correlation(of_tasks)}." for kind, of_tasks in points.items())
    return (
        "## Does the capture ratio predict the loss?\n\n"
        "Every basis against the task's own at the same rank, reduction and samples, and the same seeds of training; "
        f"captures are of seed 0. Pearson's correlation: {said}\n\n![loss against capture]({picture})"
    )


def plot(points: Pairs, path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(points), figsize=(5 * len(points), 4), layout="constrained", squeeze=False)
    for axes, (kind, of_tasks) in zip(all_axes[0], points.items(), strict=True):
        for task in sorted(of_tasks, key=TASKS.index):
            axes.scatter(*of_tasks[task], label=task, color=f"C{TASKS.index(task)}")  # in every panel the same
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set_title(kind)
        axes.set_xlabel("capture ratio, less the own basis's")
        axes.set_ylabel("valid loss, less the own basis's")
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
