"""What an adapter folder tells of its training: a summary in its config; the log, the curve and the provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from ..calibration.subspace import spread
from ..files.kind import RECORD
from ..files.storage import write_json
from ..provenance import CURVE, command, versions

if TYPE_CHECKING:
    from .task_run import TaskRun

Entries = Sequence[Mapping[str, Any]]  # as `history.History` gives them


def summary(run: TaskRun, entries: Entries, steps: int, best: int | None) -> dict[str, Any]:
    """What the adapter's config and card say.

    Args:
        best: the step whose R was kept, None for the last.
    """
    basis = run.adapter.load_basis()
    last = next((entry["loss"] for entry in reversed(entries) if "loss" in entry), None)
    valid = [entry for entry in entries if "eval_loss" in entry]
    kept = next((entry for entry in valid if entry["step"] == best), valid[-1] if valid else {})
    metrics = {key.removeprefix("eval_"): value for key, value in kept.items() if key.startswith("eval_")}
    return {
        "task": run.task.name,
        "data": run.task.source,
        "data_read": dict(run.task.read_as) or None,
        "data_sha256": run.task.sha256,
        "splits_sha256": {split: run.task.split_sha256(split) for split in run.task.splits},
        "rows": len(run.rows),
        "rows_left_out": len(run.task.splits["train"]) - len(run.rows),
        "rows_cut": sum(row["cut"] for row in run.rows),
        "labels": run.task.labels,
        "regression": run.task.regression,
        "steps": steps,
        "best_step": best,
        "train_loss": None if last is None else round(last, 6),
        "valid_loss": round(metrics["loss"], 6) if metrics else None,
        "valid_metrics": {name: round(value, 6) for name, value in metrics.items() if name != "loss"},
        "trainable_parameters": _count(run.adapter.tensors()),
        "lora_parameters": sum(basis.rank * sum(shape) for shape in basis.shapes.values()) + _count(run.adapter.head),
        "energy": spread(basis.calibration.get("energy", {}).values()),
        "plot": CURVE,
    }


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    """Of parameters. A classifier's head is trained whatever it is beside."""
    return sum(tensor.numel() for tensor in tensors.values())


def write_training_record(folder: Path, run: TaskRun, entries: Entries, made: Mapping[str, Any]) -> None:
    """Write `training_log.jsonl`, the curve and `lorasb.json` into an adapter's folder.

    Args:
        made: what the run knows of itself: its identity, its capture ratios by module, its seconds.
    """
    lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in entries]
    (folder / "training_log.jsonl").write_text("".join(lines))
    plot_losses(entries, folder / CURVE, title=f"{run.task.name}: loss")
    provenance = {
        "kind": "adapter",
        **made,
        "data_sha256": run.task.sha256,
        "base": asdict(run.adapter.base),
        "versions": versions(),
        "command": command(),
    }
    write_json(folder / RECORD, provenance)


def plot_losses(entries: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw training and validation loss against the step, from the entries of one task's log, as a PNG."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_axes((0.16, 0.14, 0.81, 0.77))  # a layout engine draws all twice, of ten thousand tasks too
    for key, label, style in (("loss", "train", "-"), ("eval_loss", "valid", "o-")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss per label", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
