"""What `lorasb calibrate` made, for --json and as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .words import percentages

if TYPE_CHECKING:
    from pathlib import Path

    from lorasb_export.basis import Basis


def summary(basis: Basis, out: Path) -> dict[str, Any]:
    """What --json says of a basis that was written to `out`; `capture` is None where it was not measured."""
    from lorasb_export.calibration.capture import overview
    from lorasb_export.calibration.subspace import by_module, spread

    capture: dict[str, Any] | None = None
    if found := basis.calibration.get("capture"):
        capture = {
            "basis": found["basis"],
            "random": found["random"],
            "by_module": by_module(found["modules"]),
            "tasks": {name: overview(of_task) for name, of_task in found["tasks"].items()},
        }
    return {
        "out": str(out),
        "sha256": basis.sha256,
        "rank": basis.rank,
        "modules": len(basis.modules),
        "samples": basis.calibration["samples"],
        "energy": spread(basis.calibration["energy"].values()),
        "capture": capture,
    }


def basis_lines(found: Mapping[str, Any]) -> list[str]:
    """Of a `summary`."""
    made_from = f"{found['samples']} rows" if found["samples"] else "random numbers"
    lines = [f"Basis of rank {found['rank']} for {found['modules']} modules from {made_from}: {found['out']}"]
    if found["capture"]:
        lines += [
            f"It keeps {percentages(found['energy'])} of the first step's energy.",
            "How much of the gradient it captures, beside a task's own basis and a random one:",
            *_table(found["capture"], found["samples"]),
        ]
    return lines


def _table(capture: Mapping[str, Any], samples: int) -> list[str]:
    """One line for each task that was measured, and one for the gradient the basis was made from."""
    rows = {**capture["tasks"], "all": {"rows": samples, **capture}}
    width = max(map(len, ["task", *rows]))
    lines = [f"{'task':{width}}   rows  basis  by module    own  random"]
    for name, found in rows.items():
        of_module = found["by_module"]["basis"]
        span = f"{of_module['min']:.0%}-{of_module['max']:.0%}"
        own = f"{found['own']:.0%}" if "own" in found else "-"
        lines.append(
            f"{name:{width}} {found['rows']:6} {found['basis']:6.0%} {span:>10} {own:>6} {found['random']:7.0%}"
        )
    return lines
