"""Which training rows of a task are held out, to be its valid rows; and which held-out rows were learnt too."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, some
from .chat import Turn, chat_of
from .rows import CHAT, FIELDS_OF, LABELLED, Placed, Row, as_json

if TYPE_CHECKING:
    from .task import TaskData

logger = logging.getLogger(__name__)


def divided(placed: Sequence[Placed], kind: str, share: float, where: str) -> tuple[list[Placed], list[Placed]]:
    """Rows to train on, and about `share` of all to hold out, in their order. Of each class one stays at least.

    A row is held out by a digest of what it says alone, so that no other rows decide over it.
    """
    numbers = kind == LABELLED and any(isinstance(row["label"], float) for _, row in placed)
    digests = [hashlib.sha256(as_json(_said(row, kind, numbers=numbers))).digest() for _, row in placed]
    classes = [str(row["label"]) if kind == LABELLED and not numbers else "" for _, row in placed]
    twins, left, chosen = Counter(digests), Counter(classes), set[bytes]()
    for digest, of_class in sorted(dict(zip(digests, classes, strict=True)).items()):
        beyond = int.from_bytes(digest[:8]) >= share * 2**64
        if beyond and chosen:
            break
        if twins[digest] < left[of_class]:
            chosen.add(digest)
            left[of_class] -= twins[digest]
    if not chosen:
        fix = "Add rows, or set hold_out = 0 in its [tasks.NAME]"
        raise DataError("too few different rows to hold any out", where=where, fix=fix)
    pairs = list(zip(digests, placed, strict=True))
    return [row for digest, row in pairs if digest not in chosen], [row for digest, row in pairs if digest in chosen]


def warn_of_twins(task: TaskData) -> None:
    """Name the valid and test rows of `task` that say the same as one of its training rows."""
    kind, numbers = task.kind, task.regression

    def digests(split: str) -> list[int]:
        return [hash(as_json(_said(row, kind, numbers=numbers))) for row in task.splits.get(split, ())]

    learnt = set(digests("train"))
    for split in ("valid", "test"):
        held_out = digests(split)
        if twins := [number for number, digest in enumerate(held_out, 1) if digest in learnt]:
            what = f"{task.name}: {len(twins)} of {len(held_out)} {split} rows are training rows too"
            logger.warning("%s (rows %s): they say little of new ones (%s)", what, some(twins), task.source)


def _said(row: Row, kind: str, *, numbers: bool) -> list[Any]:
    """What a row says: the same for equal rows, whatever else they have.

    Of a chat the turns as a template takes them, and of these the words and the calls: ids and times differ in copies.
    """
    if kind == CHAT:
        return [(turn["role"], turn["content"], _called(turn)) for turn in chat_of(row).turns]
    fields = row | {"label": float(row["label"])} if numbers else row
    return [str(fields.get(field)) for field in (*FIELDS_OF[kind], "text_pair")]


def _called(turn: Turn) -> list[Any]:
    functions = [call["function"] for call in turn.get("tool_calls", [])]
    return [(function["name"], function["arguments"]) for function in functions]
