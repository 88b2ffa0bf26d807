"""The progress bars."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """tqdm's, shown on a terminal alone, and not where TQDM_DISABLE is set."""
    # None: on a terminal alone. tqdm reads that variable itself only where it is not told `disable`.
    disable = bool(os.environ.get("TQDM_DISABLE")) or None
    return tqdm(*arguments, disable=disable, **options)
