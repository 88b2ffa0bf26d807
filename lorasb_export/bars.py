"""How far it is: the progress bars, and the time that is left."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

logger = logging.getLogger(__name__)


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


def in_turn(jobs: Collection[T], desc: str, name: Callable[[T], str]) -> Iterator[T]:
    """Each of several long jobs: on a terminal a bar counts them, a log tells whose turn it is and how long the rest
    may take. Of a single one nothing is told."""
    if len(jobs) == 1:
        yield from jobs
        return
    began = time.monotonic()
    for done, job in enumerate(progress_bar(jobs, desc=desc, leave=False)):
        left = f", {time_left((time.monotonic() - began) / done * (len(jobs) - done))}" if done else ""
        logger.info("%d of %d: %s%s", done + 1, len(jobs), name(job), left)
        yield job
