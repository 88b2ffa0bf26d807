"""Warns before training of held-out rows that are trained on, and where a chat template teaches answers that do not
end, asks otherwise than it teaches, or opens thoughts in which a completion would be learnt."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ..data.encoding import IGNORE, Encoded, opened_by, prompt_ids
from ..data.hold_out import warn_of_twins
from ..data.rows import CHAT, COMPLETION, has_answer, question_and_answer
from ..data.task import TaskData
from ..errors import DataError
from ..evaluation.answer_end import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_COMPARED = 256  # chats: to write their questions takes half as long as to encode them, or more
_SHOWN = 8  # tokens of an ending


def warn_of_rows(
    task: TaskData, encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel
) -> None:
    """All that is warned of the rows of a task; `encoded` are those that are trained on."""
    warn_of_twins(task)
    if task.kind == CHAT:
        warn_of_chats(task, encoded, tokenizer, end_ids(tokenizer, network.generation_config.eos_token_id))
    elif task.kind == COMPLETION:
        warn_of_thoughts(task, encoded, tokenizer)


def warn_of_chats(
    task: TaskData,
    encoded: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
) -> None:
    """Warn where answers to a task's chats would not end, or are asked for after something else than they are learnt.

    Args:
        encoded: of the training rows; those that were cut are passed over.
        ends: the tokens that end an answer.
    """
    whole = [row for row in encoded if not row["cut"]]
    if whole:
        _warn_of_endless(task.name, whole[0]["labels"], tokenizer, ends)
        _warn_of_other_contexts(task, whole[:_COMPARED], tokenizer)


def warn_of_thoughts(task: TaskData, encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where the chat template opens thoughts when it asks, and completions do not close them.

    Args:
        encoded: of the training rows, each a prompt and its completion.
    """
    start, _ = _last_run(encoded[0]["labels"])
    if (tag := opened_by(tokenizer, encoded[0]["input_ids"][:start])) is None:
        return
    rows, closed = task.rows("train"), tag.replace("<", "</")
    if unclosed := sum(closed not in rows[row["row"] - 1]["completion"] for row in encoded):
        logger.warning(
            "%s: the base's chat template ends a question with %s, and %d of %d completions do not close it: they are "
            "learnt as thoughts. Begin them with the thoughts, if any, and %s; or use rows of messages",
            *(task.name, tag, unclosed, len(encoded), closed),
        )


def _warn_of_endless(name: str, labels: list[int], tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Which token ends an answer is the chat template's choice, so one row tells it of all."""
    start, stop = _last_run(labels)
    answer = labels[start:stop]
    if any(token in ends for token in answer):
        return
    logger.warning(
        "%s: answers will not end: the last that they are taught is %s, and they end with %s alone. Let "
        "{%% generation %%} enclose the end of the turn, and name its token in eos_token_id of the base's "
        "generation_config.json",
        *(name, _shown(answer, tokenizer), _shown(sorted(ends), tokenizer)),
    )


def _warn_of_other_contexts(task: TaskData, encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> None:
    rows, endings = task.rows("train"), []
    for row in encoded:
        chat = rows[row["row"] - 1]
        if not has_answer(chat):
            continue
        try:
            asked = prompt_ids(tokenizer, question_and_answer(chat)[0], of_row=True)
        except DataError:  # as it stands nobody can ask it
            continue
        ids, (start, stop) = row["input_ids"], _last_run(row["labels"])
        if ids[: len(asked)] != asked or not start <= len(asked) < stop:
            endings.append((ids[:start], asked))
    if endings:
        learnt, question = (_shown(ending, tokenizer) for ending in endings[0])
        logger.warning(
            "%s: the last answer of %d of %d chats is learnt after %s and asked for after %s. Let the chat template "
            "write the same in both, or {%% generation %%} enclose all that it writes after the question",
            *(task.name, len(endings), len(encoded), learnt, question),
        )


def _shown(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode([[i] for i in ids[-_SHOWN:]])  # one by one: the same text may be other tokens


def _last_run(labels: Sequence[int]) -> tuple[int, int]:
    """Where what is learnt last begins and ends."""
    stop = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    start = stop - 1
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return start, stop
