"""What `lorasb fit` made, or would do, as lines for people and for --json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .words import percentages

if TYPE_CHECKING:
    from lorasb_export.adapter import Adapter

_REPORTED = (
    "steps",
    "learning_rates",
    "best_step",
    "rows",
    "rows_left_out",
    "rows_cut",
    "train_loss",
    "valid_loss",
    "valid_metrics",
    "energy",
    "capture",
)


def summary(adapter: Adapter) -> dict[str, Any]:
    """What --json says of an adapter."""
    chosen = adapter.training.get("settings", {})
    of_fit = {key: chosen.get(key) for key in ("learning_rate", "metric")}
    return {"out": str(adapter.folder), **of_fit, **{key: adapter.training.get(key) for key in _REPORTED}}


def adapter_lines(name: str, adapter: Adapter) -> list[str]:
    from lorasb_export.calibration.capture import one_line

    training, folder = adapter.training, adapter.folder
    if not {"settings", "steps", "rows", "train_loss", "valid_loss"} <= training.keys():
        return [f"{name}: left as it is, for it does not say how it was trained, {folder}"]
    settings = training["settings"]
    split = "train" if training["valid_loss"] is None else "valid"
    rows, left_out = training["rows"], training["rows_left_out"]
    of_rows = f", {left_out} of {rows + left_out} rows left out" if left_out else ""
    of_rows += f", {cut} of {rows} cut at max_length" if (cut := training.get("rows_cut")) else ""
    lines = [
        f"{name}: {training['steps']} steps at learning rate {settings['learning_rate']:g}, "
        f"{split} loss {training[f'{split}_loss']:.4f}{of_rows}, {folder}"
    ]
    if training.get("learning_rates"):
        lines.append(f"  {_compared(training['learning_rates'], settings)}")
    if training.get("capture") and training.get("energy"):
        lines.append(f"  {one_line(training['capture'])}")
        lines.append(f"  and keeps {percentages(training['energy'])} of the energy of the step it was made from")
    return lines


def _compared(values: Mapping[str, float | None], settings: Mapping[str, Any]) -> str:
    """What came of each learning rate, and whether the best may lie beyond those that were tried."""
    kept, found = settings["learning_rate"], sorted((float(rate), value) for rate, value in values.items())
    told = ", ".join(f"{rate:g} " + ("not finite" if value is None else f"{value:.4f}") for rate, value in found)
    ends = {found[0][0]: "a lower", found[-1][0]: "a higher"}
    beyond = f"; {ends[kept]} one may do better" if kept in ends else ""
    return f"{settings['metric']} by learning rate: {told}. {kept:g} is kept{beyond}"


def plan_lines(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task of a dry run, and how many of each kind there are."""
    width = max(map(len, tasks))
    lines = []
    for name, found in tasks.items():
        words = [found["action"], f"from step {found['step']}" if found["action"] == "resume" else "", found["why"]]
        lines.append(f"{name:{width}}  {'  '.join(filter(None, words))}")
    counts = Counter(found["action"] for found in tasks.values())
    of_each = ", ".join(f"{count} to {action}" for action, count in counts.items())
    lines.append(f"{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}: {of_each}")
    if counts["refuse"] and not (counts["train"] or counts["resume"]):
        lines.append("Nothing would be trained.")
    return lines
