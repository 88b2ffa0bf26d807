"""How much of an update survives the rounding to the stored dtype.

With Δ = s·B·R·A the exact update and Δ' what the stored weights hold of it (stored − W0): the cosine between the two,
and ‖Δ' − Δ‖ / ‖Δ‖. Rounding to nearest makes a small Δ vanish in some entries and grow in others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import atomic_file
from ..files.output import cannot_write
from ..files.storage import write_json

logger = logging.getLogger(__name__)

WARN_BELOW = 0.9  # cosine over all modules: bf16 reaches it where Δ is about 0.3 % of the weight


@dataclass(frozen=True)
class Retained:
    """Three sums over entries, with e = Δ' − Δ the error of rounding; they add up over blocks and modules."""

    delta: float = 0.0  # Σ Δ²
    error: float = 0.0  # Σ e²
    cross: float = 0.0  # Σ e·Δ

    def __add__(self, other: Retained) -> Retained:
        return Retained(self.delta + other.delta, self.error + other.error, self.cross + other.cross)

    def __mul__(self, factor: float) -> Retained:
        return Retained(self.delta * factor, self.error * factor, self.cross * factor)

    @property
    def cosine(self) -> float:
        """Between Δ' and Δ; 1 where Δ is zero, 0 where nothing of it survived."""
        if self.delta == 0:
            return 1.0
        kept = max(0.0, self.delta + 2 * self.cross + self.error)
        return max(-1.0, min(1.0, (self.delta + self.cross) / math.sqrt(self.delta * kept))) if kept > 0 else 0.0

    @property
    def relative_error(self) -> float:
        """‖Δ' − Δ‖ / ‖Δ‖; 0 where Δ is zero."""
        return math.sqrt(self.error / self.delta) if self.delta else 0.0

    def shown(self) -> dict[str, float]:
        return {"cosine": round(self.cosine, 6), "relative_error": round(self.relative_error, 6)}


def summary(modules: Mapping[str, Retained]) -> dict[str, Any]:
    """Over all modules together, and the module that kept least."""
    worst = min(modules, key=lambda name: modules[name].cosine)
    total = sum(modules.values(), Retained())
    return total.shown() | {"worst": {"module": worst, **modules[worst].shown()}}


def warn(found: Mapping[str, Any], dtype: str) -> None:
    """Log a warning when less than `WARN_BELOW` of the update's direction survived."""
    if found["cosine"] < WARN_BELOW:
        logger.warning(
            "the stored dtype (%s) keeps the update with a cosine of %.2f only (relative error %.2f). "
            "Merge with --dtype float16 or float32, or serve the adapter unmerged; "
            "export a graph with --precision fp16 or fp32",
            dtype,
            found["cosine"],
            found["relative_error"],
        )


def expected(sample: torch.Tensor, rms: float, stored: torch.dtype) -> Retained:
    """What to expect of a module, from a few of its weights and the size of its update's entries.

    Args:
        sample: (n,) weights as the base stores them.
        rms: root mean square of Δ's entries; they are drawn from a normal distribution of that size.
    """
    weights = sample.double()
    delta = rms * torch.randn(len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = weights + delta
    error = exact.to(stored).double() - exact
    return Retained(float(delta @ delta), float(error @ error), float(error @ delta))


def write_report(modules: Mapping[str, Retained], path: Path, fix: str) -> None:
    """Write every module's numbers to `path`, a .json file, and a plot of them beside it, a .png.

    Args:
        fix: what to do where they cannot be written.

    Raises:
        OutputError: they cannot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([found.cosine for found in modules.values()], ".", label="cosine")
    axes.plot([found.relative_error for found in modules.values()], ".", label="relative error")
    axes.set(title="What the stored dtype keeps of the update", xlabel="module, in file order", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    plot = path.with_suffix(".png")
    with cannot_write(path, fix), cannot_write(plot, fix):
        with atomic_file(path) as temporary:
            of_modules = {name: found.shown() for name, found in modules.items()}
            write_json(temporary, {**summary(modules), "modules": of_modules})
        with atomic_file(plot) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
