"""How far it is: the progress bars, and the time that is left."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """tqdm's, shown on a terminal alone, and not where TQDM_DISABLE is set."""
    # None: on a terminal alone. tqdm reads that variable itself only where it is not told `disable`.
    disable = bool(os.environ.get("TQDM_DISABLE")) or None
    return tqdm(*arguments, disable=disable, **options)


def time_left(seconds: float) -> str:
    """In words, in the unit that suits: `about 40 s left`."""
    if seconds < 120:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 7200 else f"about {seconds / 3600:.0f} h left"
