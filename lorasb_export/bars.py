"""When a progress bar is shown."""

from __future__ import annotations

import os


def no_bar() -> bool | None:
    """What tqdm takes as `disable`: None, which shows a bar on a terminal alone; true where TQDM_DISABLE is set.

    tqdm reads that itself, but what it is given wins.
    """
    return bool(os.environ.get("TQDM_DISABLE")) or None
