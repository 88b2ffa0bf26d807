"""Processes and calls timed in alternation, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path


def alternate(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each command, as `alternate_calls` measures them."""
    return alternate_calls(
        {name: partial(subprocess.run, command, check=True, capture_output=True) for name, command in commands.items()},
        rounds,
    )


def alternate_calls(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each call, `rounds` times after one warm-up that is not counted: name → times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False] + [True] * rounds:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if counted:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios pair by pair."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def print_table(times: Mapping[str, Sequence[float]]) -> None:
    print(f"{'command':24} {'median s':>9} {'min':>7} {'max':>7}")
    for name, values in times.items():
        print(f"{name:24} {statistics.median(values):9.3f} {min(values):7.3f} {max(values):7.3f}")


def forget_peak() -> None:
    """Begin `VmHWM` anew, from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(key: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
