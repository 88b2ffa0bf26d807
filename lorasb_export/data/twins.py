"""Held-out rows that are training rows too: what is scored on them was learnt."""

from __future__ import annotations

import logging

from ..errors import some
from .hold_out import said
from .rows import as_json
from .task import TaskData

logger = logging.getLogger(__name__)


def warn_of_twins(task: TaskData) -> None:
    """Name the valid and test rows of `task` that say the same as one of its training rows."""
    kind, numbers = task.kind, task.regression

    def digests(split: str) -> list[int]:
        return [hash(as_json(said(row, kind, numbers=numbers))) for row in task.splits.get(split, ())]

    learnt = set(digests("train"))
    for split in ("valid", "test"):
        held_out = digests(split)
        if twins := [number for number, digest in enumerate(held_out, 1) if digest in learnt]:
            what = f"{task.name}: {len(twins)} of {len(held_out)} {split} rows are training rows too"
            logger.warning("%s (rows %s): they say little of new ones (%s)", what, some(twins), task.source)
