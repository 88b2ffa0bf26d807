"""Tables of what differs in one thing alone: the method, the rate, the calibration, the draw, the base's precision."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from integration.evidence.best import Best, Identity, Line, changed, identity
from integration.evidence.cells import LADDER, LEARNT, UPPER_DOWN, Cell, cell
from lorasb_export.settings import DRAWN

from .basis import CALIBRATIONS
from .method_tables import TASKS, differences, loss, marked, mean_error, metric, table
from .quality import METHODS

# What is said of two methods: the first, and what is taken away.
BETWEEN = {
    "LoRA-SB as published less LoRA r = 8": ("as published: own basis, r=64, AdamW", "LoRA r=8"),
    "shared basis, r = 64, less LoRA r = 8": ("shared basis, r=64", "LoRA r=8"),
    "Muon less AdamW: own basis, r = 64": ("own basis, r=64", "as published: own basis, r=64, AdamW"),
    "R0 = 0 less R0 = S/s: own basis, r = 64": ("own basis, r=64, R0 = 0", "own basis, r=64"),
    "LoRA-XS less LoRA-SB as published": ("LoRA-XS r=64", "as published: own basis, r=64, AdamW"),
    "rsLoRA r = 32 less what `init` sets for text": ("rsLoRA r=32", "down: shared basis, r=128"),
    "block of r = 256 on `down_proj` less rsLoRA r = 32": ("down: block, r=256", "rsLoRA r=32"),
    "r = 128 less r = 64: own basis": ("own basis, r=128", "own basis, r=64"),
    "block less random basis (draw 0 of each): r = 64": ("block, r=64", "random basis, r=64"),
    "r = 128 on `down_proj` less r = 64 on all: own basis": ("down: own basis, r=128", "own basis, r=64"),
    "the same, shared basis": ("down: shared basis, r=128", "shared basis, r=64"),
    "the same, random basis": ("down: random basis, r=128", "random basis, r=64"),
    "LoRA r = 8 on `down_proj` less on all": ("down: LoRA r=8", "LoRA r=8"),
    "what `init` sets for text less LoRA r = 2": ("down: shared basis, r=128", "LoRA r=2"),
    "random basis, r = 64, less LoRA r = 2": ("random basis, r=64", "LoRA r=2"),
}
_IN_WORDS = {"task", "method", "basis", "balanced", "rank", "targets", "optimizer"}  # of a cell's fields
_LAYERS = {UPPER_DOWN: "the upper `down_proj`"}  # others as they are
_ORIGINS = {"own": "own", "mixture": "all tasks"}
_CALIBRATIONS = {"reduction": "the gradient, not its signs", "samples": "{} rows a task"}


def between(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """Points, and loss in parentheses, of one method less another, seed by seed; where both searches have ended."""
    rows = []
    for label, (name, less) in BETWEEN.items():
        cells = [_less(found.get((name, task)), found.get((less, task))) for task in LEARNT]
        if any(cells):
            rows.append([label, *cells])
    return table(["points (loss)", *LEARNT], rows)


def _less(of: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Points, and loss in parentheses, of the one less the other, seed by seed; nothing before both searches end."""
    if not (of and other and of["closed"] and other["closed"]):
        return ""
    points = [100 * difference for difference in differences(of["values"], other["values"])]
    return f"{mean_error(points, 1)} ({marked(differences(of['losses'], other['losses']))})"


def small_lora(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """How far LoRA with about as few parameters as ours has been run."""
    tasks: dict[str, list[str]] = {}
    for task in LEARNT:
        of = found.get(("LoRA r=2", task))
        ended = "it is in the tables" if of and of["closed"] else "its rate search has not ended"
        tasks.setdefault(ended if of else "it was not run", []).append(task)
    there = "; ".join(f"on {_in_a_row(of)} {state}" for state, of in tasks.items())
    return f"* **LoRA of our size:** r = 2 has a quarter of r = 8's parameters; {there}."


def _in_a_row(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def rate_steps(best: Mapping[Identity, Best]) -> str:
    """Points lost with the first seed at the rate below the best, and at that above it; medians over cells.

    Of every cell of a task that is learnt whose search has ended, whatever its rank, layers, steps and precision.
    """
    lost: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for of in best.values():
        line = of.lines[0]
        if line["task"] not in LEARNT or not line["steps"] or line["method"] == "lora-xs-mirrored":
            continue
        if not of.closed or line["lr"] not in LADDER:
            continue
        place = LADDER.index(line["lr"])
        lower, higher = LADDER[place - 1], LADDER[place + 1]
        if {lower, higher} <= of.rates:
            value = of.first[line["lr"]]["value"]
            below, above = (100 * (value - of.first[rate]["value"]) for rate in (lower, higher))
            lost.setdefault((line["task"], line["method"] == "lora-sb"), []).append((below, above))

    def row(pairs: list[tuple[float, float]]) -> str:
        below, above = (statistics.median(values) for values in zip(*pairs, strict=True))
        return f"{below:.1f}; {above:.1f} ({len(pairs)})"

    rows = [
        [name, *(row(lost[task, ours]) if (task, ours) in lost else "" for task in LEARNT)]
        for name, ours in (("LoRA-SB", True), ("PEFT's, and LoRA-XS", False))
    ]
    return table(["too low; too high (cells)", *LEARNT], rows)


def calibrations(best: Mapping[Identity, Best]) -> str:
    """Loss in bases made otherwise, less that in one of the signs of 50 rows, seed by seed, each at its best rate."""
    rows = []
    for variant in CALIBRATIONS:
        ((field, value),) = variant.items()
        for basis, made_from in _ORIGINS.items():
            cells = []
            for task in LEARNT:
                usual = cell(task, **{**METHODS["own basis, r=64"], "basis": basis}).fields
                of, other = (best.get(identity({**usual, **fields})) for fields in (variant, {}))
                there = of and other and of.closed and other.closed
                less = differences(of.summary["losses"], other.summary["losses"]) if of and other and there else []
                cells.append(marked(less) if less else "")
            rows.append([f"{_CALIBRATIONS[field].format(value)}: {made_from}", *cells])
    return table(["", *LEARNT], rows)


def draws(best: Mapping[Identity, Best]) -> str:
    """Loss and score of the first seed in every draw of a basis that was drawn more than once, beside the own basis.

    Where a search has not ended, the number of rates that were tried.
    """
    found: dict[Identity, dict[int, Best]] = {}
    for this, of in best.items():
        if dict(this).get("basis") in DRAWN:
            drawn = tuple((key, value) for key, value in this if key != "draw")
            found.setdefault(drawn, {})[of.first[of.lines[0]["lr"]].get("draw", 0)] = of
    again = {this: of for this, of in found.items() if len(of) > 1}

    def shown(of: Best | None) -> str:
        if of is None:
            return ""
        line = of.first[of.lines[0]["lr"]]
        tried = "" if of.closed else f" * of {len(of.rates)}"
        return f"{line['loss']:.3f} ({100 * line['value']:.1f}){tried}"

    most = range(max((max(of) for of in again.values()), default=0) + 1)
    rows = [
        [setting(this), shown(best.get(changed(this, basis="own"))), *(shown(of.get(draw)) for draw in most)]
        for this, of in again.items()
    ]
    return table(["loss (score)", "own basis", *(f"draw {draw}" for draw in most)], rows)


def four_bits(found: Mapping[tuple[str, str], dict[str, Any]], exact: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """Methods whose base was in NF4 while they were trained and scored, beside the same of the `exact` base."""
    rows = [
        [f"{task}: {name}", metric(of), loss(of), _less(of, exact.get((name, task)))]
        for (name, task), of in found.items()
    ]
    return table(["", "score", "loss (less LoRA r = 8's)", "less the same in bfloat16: points (loss)"], rows)


def unlisted(best: Mapping[Identity, Best], captures: Mapping[Identity, Line]) -> str:
    """The cells that are in none of the other tables."""
    others: Iterable[dict[str, Any]] = ({}, {"steps": 600}, {"dtype": "nf4"})
    listed = {
        identity(cell(task, **{**fields, **other}).fields)
        for other in others
        for task in TASKS
        for fields in METHODS.values()
    }
    rows = [
        [setting(this), metric(of.summary), f"{of.summary['loss']:.3f}", f"{of.summary['lr']:.0e}"]
        for this, of in best.items()
        if this not in listed and "draw" not in dict(this) and changed(this, optimizer=Cell.optimizer) not in captures
    ]
    return (
        "## Settings in no other table\n\nScore and loss as above, at the best of the rates that were tried (* the "
        f"search has not ended).\n\n{table(['', 'score', 'loss', 'rate'], rows)}"
    )


def setting(this: Identity) -> str:
    """A cell in words: its task, its method, and what is not as usual; ours is by Muon unless it says otherwise."""
    of = dict(this)
    usual = cell(of["task"], method=of["method"]).fields
    ours = of["method"] == "lora-sb"
    words = [of["task"], f"{'balanced ' * of['balanced']}{of['basis']} basis" if ours else of["method"]]
    words.append(f"r = {of['rank']}")
    if "targets" in of:
        words.append(_LAYERS.get(of["targets"], f"`{of['targets']}`".replace("|", "\\|")))
    words += ["by AdamW"] if ours and of["optimizer"] == "adamw" else []
    words += [f"{key} {value}" for key, value in this if key not in _IN_WORDS and value != usual.get(key)]
    return ", ".join(words)
