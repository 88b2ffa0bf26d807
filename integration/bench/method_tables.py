"""Tables with a row for each method: scores, losses, costs."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from integration.evidence.best import Best, Identity, identity
from integration.evidence.cells import CLASSIFYING, GENERATING, LEARNT, cell
from lorasb_export.evaluation.metrics import pearson

from .quality import METHODS

TASKS = (*GENERATING, *CLASSIFYING)
# The main table: what a reader chooses between.
MAIN = {
    "PEFT's LoRA, r = 2": "LoRA r=2",
    "PEFT's LoRA, r = 8": "LoRA r=8",
    "PEFT's rsLoRA, r = 32": "rsLoRA r=32",
    "as published: own basis, r = 64, AdamW": "as published: own basis, r=64, AdamW",
    "LoRA-XS, r = 64, AdamW": "LoRA-XS r=64",
    "own basis, r = 64": "own basis, r=64",
    "a basis made from all tasks, r = 64": "shared basis, r=64",
    "one random basis for all tasks (draw 0), r = 64": "random basis, r=64",
    "**what `init` sets for text**: r = 128 on `down_proj`, a basis made from five tasks": "down: shared basis, r=128",
    "the same, own basis": "down: own basis, r=128",
    "the same, one random basis for all tasks (draw 0; on banking77 the best of three)": "down: random basis, r=128",
    "a block of r = 256 on `down_proj` (draw 0)": "down: block, r=256",
}
# README's has fewer rows, scores alone, and cola in place of mawps, where all scores are low.
CHOSEN_TASKS = ("banking77", "e2e", "sst2", "cola")
_NOT_CHOSEN = {"LoRA-XS r=64", "own basis, r=64", "random basis, r=64", "down: own basis, r=128"}
CHOSEN = {label: name for label, name in MAIN.items() if name not in _NOT_CHOSEN}
# Tried on a task or two, where they promised something: in the results alone.
ONE_OFF = (
    *("LoRA r=8, Muon", "rsLoRA r=8", "shared basis, r=64, AdamW", "random basis, r=96", "block, r=128"),
    *("own basis, r=64, R0 = 0", "upper down: block, r=256", "down: LoRA r=8", "down: LoRA r=32"),
    "LoRA-XS r=64, mirrored",  # on every task, before we saw that it is not LoRA-XS
)
USUAL = {name: name for name in METHODS if name not in ONE_OFF}

# What one basis for all tasks may be; and where.
SHARED = {"made from all tasks": "shared", "balanced": "balanced", "random (draw 0)": "random"}
# Of its two best rates, which are level by the loss, one gives Mcc of 7 and the other of 20.
UNSTEADY = "cola"
PLACES = {"all linear layers, r = 64": "{} basis, r=64", "`down_proj`, r = 128": "down: {} basis, r=128"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_method(best: Mapping[Identity, Best], **other: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, task) → what its seeds came to, and its loss less that of LoRA r = 8 with the same seeds.

    Args:
        other: fields that are not those of the full tables.
    """
    found = {}
    for task, (name, fields) in itertools.product(TASKS, METHODS.items()):
        if there := best.get(identity(cell(task, **{**fields, **other}).fields)):
            found[name, task] = there.summary
    for (_, task), of in found.items():
        of_lora = found.get(("LoRA r=8", task), {"losses": {}})["losses"]
        of["less_lora"] = differences(of["losses"], of_lora)
    return found


def methods_table(
    found: Mapping[tuple[str, str], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    methods: Mapping[str, str] | None = None,
    tasks: Sequence[str] = TASKS,
) -> str:
    """A row for each method that `show` has something of; `methods` are those wanted, by what they are called there."""
    tasks = [task for task in tasks if any(of == task for _, of in found)]
    metrics = {task: next(s["metric"] for (_, of), s in found.items() if of == task) for task in tasks}
    rows = []
    for label, name in (methods or {name: name for name in METHODS}).items():
        cells = [show(found[name, task]) if (name, task) in found else "" for task in tasks]
        if any(cells):
            rows.append([label, _trained(name, found), *cells])
    return table(["", "trained", *(f"{task}, {metrics[task].replace('_', ' ')}" for task in tasks)], rows)


def _trained(name: str, found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """The parameters that are trained, of those of LoRA r = 8 on the same task: on text, and on the encoder."""
    ratios = {
        kind: of["trainable"] / found["LoRA r=8", task]["trainable"]
        for kind, tasks in (("text", GENERATING), ("encoder", CLASSIFYING))
        for task in tasks
        if (of := found.get((name, task))) and ("LoRA r=8", task) in found
    }
    return ", ".join(dict.fromkeys(f"{ratio:.2g}" for ratio in ratios.values()))


def metric(of: dict[str, Any]) -> str:
    """Mean ± sd in percent; the number of seeds where it is not three; * where the search for a rate has not ended."""
    spread = f" ± {100 * of['sd']:.1f}" if of["seeds"] > 1 else ""
    few = f" ({of['seeds']})" if of["seeds"] != 3 and of["steps"] else ""
    return f"{100 * of['mean']:.1f}{spread}{few}" + " *" * (not of["closed"])


def settled(of: dict[str, Any]) -> str:
    """As `metric`; nothing where the search for a rate has not ended."""
    return metric(of) if of["closed"] else ""


def beside_lora(of: dict[str, Any]) -> str:
    """Mean score, and the loss less that of LoRA r = 8 (of LoRA itself its loss); nothing as for `settled`."""
    if not of["closed"]:
        return ""
    few = f", {of['seeds']} seed{'s' * (of['seeds'] > 1)}" if of["seeds"] != 3 else ""
    less = marked(of["less_lora"]) if any(of["less_lora"]) else f"{of['loss']:.3f}"
    return f"{100 * of['mean']:.1f} ({less}{few})"


def loss(of: dict[str, Any]) -> str:
    """Mean, and the mean ± standard error of the differences from LoRA r = 8; * as for `metric`.

    None is called clear on a task that is not learnt, or before the search has ended.
    """
    differences, text = of["less_lora"], f"{of['loss']:.3f}"
    if of["steps"] and any(differences):
        tells = of["closed"] and of["task"] in LEARNT
        text += f" ({marked(differences) if tells else mean_error(differences, 3)})"
    return text + " *" * (not of["closed"])


def sharing(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """What one basis for all tasks costs each of them: its results less those in the task's own, seed by seed.

    A mean is of all tasks: of some it would be another than its neighbours.
    """
    rows: list[list[str]] = []
    for label, kind in PLACES.items():
        scores: dict[str, dict[str, list[float]]] = defaultdict(dict)
        compared: list[str] = []
        for task in LEARNT:
            own, cells = found.get((kind.format("own"), task)), []
            for basis in SHARED.values():
                of = found.get((kind.format(basis), task))
                if not (own and of and own["closed"] and of["closed"]):
                    cells += ["", ""]
                    continue
                score = [100 * difference for difference in differences(of["values"], own["values"])]
                scores[basis][task] = score
                cells += [mean_error(score, 1), marked(differences(of["losses"], own["losses"]))]
            if own and any(cells):
                compared.append(task)
                rows.append([f"{label}: {task}, {own['metric'].replace('_', ' ')}", *cells])
        means = {"**mean**": compared}
        if set(compared) > {UNSTEADY}:
            means[f"**mean without {UNSTEADY}**"] = [task for task in compared if task != UNSTEADY]
        for name, tasks in means.items() if compared else ():
            whole = {basis: of for basis, of in scores.items() if len(of) == len(compared)}
            of_tasks = ([whole[basis][task] for task in tasks] if basis in whole else None for basis in SHARED.values())
            rows.append([name, *itertools.chain.from_iterable((_mean_of(of) if of else "", "") for of in of_tasks)])
    return table(["", *itertools.chain.from_iterable((f"{name}: points", "loss") for name in SHARED)], rows)


def unfinished(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """How far the cells are from what the tables promise: each at its best rate, three seeds."""
    trained = [of for of in found.values() if of["steps"]]
    learnt = [of for (_, task), of in found.items() if of["steps"] and task in LEARNT]
    counts = [(sum(not of["closed"] for of in some), sum(of["seeds"] < 3 for of in some)) for some in (trained, learnt)]
    return (
        f"Of the {len(trained)} cells of the tables of scores, here and beside the results, {counts[0][0]} have a "
        f"search that has not ended, and {counts[0][1]} fewer than three seeds; of the {len(learnt)} of tasks that are "
        f"learnt, {counts[1][0]} and {counts[1][1]}."
    )


def score_and_loss(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """Whether scores say of methods what losses say: the correlation of the two over the cells of the table."""
    said = []
    for task in LEARNT:
        cells = [of for name in USUAL if (of := found.get((name, task))) and of["steps"]]
        cells = [of for of in cells if of["closed"] and of["seeds"] >= 3]
        if len(cells) > 2:
            value = pearson([of["mean"] for of in cells], [of["loss"] for of in cells])
            said.append(f"{value:.2f} on {task} ({len(cells)})")
    return (
        "* **Score against loss:** their correlation over the cells of this table with three seeds or more, whose "
        f"search has ended (and how many these are): {', '.join(said)}."
    )


def differences(of: Mapping[int, float], less: Mapping[int, float]) -> list[float]:
    """Seed by seed."""
    return [of[seed] - less[seed] for seed in of if seed in less]


def _mean_of(of_tasks: Sequence[Sequence[float]]) -> str:
    """The mean of the tasks' means, and its standard error by those of the tasks, if each has one."""
    error = ""
    if all(len(values) > 1 for values in of_tasks):
        squares = (statistics.variance(values) / len(values) for values in of_tasks)
        error = f" ± {sum(squares) ** 0.5 / len(of_tasks):.1f}"
    return f"**{statistics.mean(map(statistics.mean, of_tasks)):+.1f}{error}**"


def mean_error(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error, with its sign."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.{digits}f}{error}"


def marked(losses: Sequence[float]) -> str:
    """Mean ± standard error of differences in loss; † where it is clear: four errors or more, of three seeds."""
    text, mean = mean_error(losses, 3), abs(statistics.mean(losses))
    if len(losses) > 2 and mean and mean >= 4 * statistics.stdev(losses) / len(losses) ** 0.5:
        text += " †"
    return text


def longer(found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """Score, loss and rates of each method on the tasks that it was trained longer on."""
    rows = []
    for (name, task), of in found.items():
        rates = (f"**{rate:.0e}**" if rate == of["lr"] else f"{rate:.0e}" for rate in of["rates"])
        rows.append([f"{task}: {name}", _trained(name, found), metric(of), loss(of), ", ".join(rates)])
    return table(["", "trained", "score", "loss on valid rows", "rates tried"], rows)


def costs(found: Mapping[tuple[str, str], dict[str, Any]], best: Mapping[Identity, Best]) -> str:
    sizes = methods_table(found, lambda of: f"{of['trainable'] / 1e6:.2f} M, {of['adapter_bytes'] / 1e6:.2f} MB")
    runs = methods_table(found, lambda of: f"{of['steps']} steps, {of['seconds']:.0f} s" if of["steps"] else "")
    trained = [of for of in best.values() if of.lines[0]["steps"]]
    seconds = [[line["seconds"] for line in (*of.lines, *of.first.values())] for of in trained]
    spread = max(max(of_cell) / min(of_cell) for of_cell in seconds)
    rates = methods_table(found, lambda of: f"{of['lr']:.0e}" + " *" * (not of["closed"]) if of["steps"] else "")
    return (
        "## Quality: what it takes\n\nParameters that are trained, and their bytes in fp32. A basis of a task's own "
        "lies in its adapter besides: of SmolLM2-135M B and A take 78 MB at r = 64 on all linear layers, and 32 MB at "
        f"r = 128 on `down_proj`.\n\n{sizes}\n\n"
        "Steps, and seconds of training (of one core, where the device is a CPU). They compare no methods: the runs "
        "are of many sittings on several machines, all called `cpu` in the first lines, and within one cell, where "
        f"only the rate and the seed differ, they differ by up to {spread:.1f} times. [The benchmark of a training "
        f"step](../speed.md#a-training-step) compares methods.\n\n{runs}\n\n"
        f"Best learning rate of a grid in steps of three (* at an end of those tried, the search not ended):\n\n{rates}"
    )
