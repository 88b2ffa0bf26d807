"""The picture of the quality tables: what every method trains, against the loss it comes to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from integration.evidence.cells import LEARNT

from .quality import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_FEW = 6  # methods: with less a task's picture says nothing
# In the order of the legend: what a method's fields are, its marker and colour.
_FAMILIES = {
    "LoRA, rsLoRA, PiSSA, DoRA (PEFT)": ("o", "tab:gray"),
    "LoRA-XS, and mirrored": ("s", "black"),
    "LoRA-SB as published (AdamW)": ("v", "tab:red"),
    "LoRA-SB (Muon), all linear layers": ("^", "tab:blue"),
    "LoRA-SB (Muon), MLP output": ("D", "tab:green"),
}


def family(method: str) -> str:
    """Under which heading of the legend a row of the tables belongs."""
    fields = METHODS[method]
    peft, xs, published, everywhere, output = _FAMILIES
    if fields["method"] in ("lora-xs", "lora-xs-mirrored"):
        return xs
    if fields["method"] != "lora-sb":
        return peft
    if fields.get("optimizer") != "muon":
        return published
    return output if "targets" in fields else everywhere


def plot(found: Mapping[tuple[str, str], Mapping[str, Any]], path: Path) -> None:
    """One picture a task: LoRA's loss and what others lose more, with the same seeds.

    Hollow: fewer than three seeds, or the search for a rate has not ended.
    """
    of_tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    for (method, task), of in found.items():
        if of["steps"] and task in LEARNT and ("LoRA r=8", task) in found:
            of_tasks.setdefault(task, {})[method] = of
    of_tasks = {task: methods for task, methods in of_tasks.items() if len(methods) >= _FEW}
    size = (4 * len(of_tasks), 4)
    figure, all_axes = plt.subplots(1, len(of_tasks), figsize=size, layout="constrained", squeeze=False)
    for axes, (task, methods) in zip(all_axes[0], of_tasks.items(), strict=True):
        of_lora = methods["LoRA r=8"]
        axes.axhline(of_lora["loss"], color="tab:gray", linewidth=0.7, linestyle=":")
        for method, of in methods.items():
            marker, colour = _FAMILIES[family(method)]
            more = statistics.mean(of["less_lora"] or [math.nan])
            place = of["trainable"] / of_lora["trainable"], of_lora["loss"] + more
            sure = of["seeds"] >= 3 and of["closed"]
            axes.scatter(*place, marker=marker, edgecolors=colour, facecolors=colour if sure else "none")
            axes.annotate(METHODS[method]["rank"], place, xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set(title=task, xscale="log", xlabel="trained parameters, of LoRA r = 8", ylabel="loss on valid rows")
        axes.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"], minor=False)
        axes.tick_params(which="minor", labelbottom=False)
    for label, (marker, colour) in _FAMILIES.items():
        all_axes[0][0].scatter([], [], marker=marker, color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
