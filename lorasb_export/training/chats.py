"""Chats as they are learnt beside chats as they are asked: what parts them is told before training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ..batches import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def warn_of_endless(
    encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, ends: Collection[int], max_length: int, name: str
) -> None:
    """Warn where the last answer of a chat teaches none of the tokens that end one.

    The chat template decides on that, so one row tells it of all: the first that was not cut at `max_length`.

    Args:
        name: what the warning calls the task.
    """
    labels = next((row["labels"] for row in encoded if len(row["input_ids"]) < max_length), None)
    if labels is None:
        return
    start, stop = last_run(labels)
    answer = labels[start:stop]
    if any(token in ends for token in answer):
        return
    ending, known = tokenizer.convert_ids_to_tokens(answer[-2:]), tokenizer.convert_ids_to_tokens(sorted(ends))
    logger.warning(
        "%s: answers will not end: the last that they are taught is %s, and they end with %s alone. Let "
        "{%% generation %%} enclose the end of the turn, and name its token in eos_token_id of the base's "
        "generation_config.json",
        *(name, ending, known),
    )


def last_run(labels: Sequence[int]) -> tuple[int, int]:
    """Where what is learnt last begins and ends."""
    stop = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    start = stop - 1
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return start, stop
