"""How long until `lorasb --help` answers? Peers: the Hub's own `hf --help`, and a Python that does nothing."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from .measure import alternate, print_table, ratio


def run(*, quick: bool) -> dict[str, Any]:
    bin_folder = Path(sys.executable).parent
    commands = {
        "lorasb --help": [str(bin_folder / "lorasb"), "--help"],
        "hf --help": [str(bin_folder / "hf"), "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    times = alternate(commands, 5 if quick else 20)
    print_table(times)
    ours, hf, bare = times.values()
    return {
        "seconds": round(statistics.median(ours), 3),
        "ratio_hf": ratio(ours, hf),
        "ratio_python": ratio(ours, bare),
    }
