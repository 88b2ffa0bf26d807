"""Rows → token ids with labels.

With a chat template a prompt is one user message. The loss is on the completion, on what the assistant says, or on
every token of a plain text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..choices import SEQ_CLS
from ..errors import BaseModelError, DataError, some
from .chat import chat_of
from .chat_template import OPENED_THOUGHTS, chat_ids, chat_tokens
from .rows import CHAT, TEXT, Prompt, Row, kind_of, question_and_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..base.model import BaseModel
    from .task import TaskData

logger = logging.getLogger(__name__)
IGNORE = -100
_LONG, _BARE = "their prompt alone has {} tokens or more", "no token of theirs is to be learnt"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece writes it in tokens
_END_OF_QUESTION = 16  # tokens: a tag may be one, or a few
_INPUTS = ("input_ids", "token_type_ids")

Encoded = dict[str, Any]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: object = None, *, of_row: bool = False
) -> list[int]:
    """Token ids of a prompt as the model is asked it.

    Args:
        prompt: a text, which is one user message where there is a chat template; or a chat.
        of_row: whether it is a row's question, with the date that rows have (`chat_template.fixed_date`).

    Raises:
        DataError: the chat template refuses it or leaves out its tools, or there is none for its turns.
    """
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return _text_ids(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    return chat_ids(tokenizer, chat_of(prompt, where), where, asked=True, of_row=of_row)


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text with what the tokenizer puts around one, less a beginning that the text has already."""
    ids: list[int] = tokenizer(text).input_ids
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, row: Row, where: str) -> list[int] | None:
    """What a row's own tokens, uncut, say after its question: the answer, its end, and what a template writes besides.

    None where they do not begin with the question's: a chat template may open thoughts in the question alone.

    Raises:
        DataError: messages that do not end with the assistant's turn after another, or that the template refuses.
    """
    question, _ = question_and_answer(row, where)
    asked = prompt_ids(tokenizer, question, where, of_row=True)
    if kind_of(row) == CHAT:
        ids = chat_ids(tokenizer, chat_of(row, where), where, asked=False, of_row=True)
    else:
        ids, _ = _tokens(row, tokenizer, where)
    return ids[len(asked) :] if ids[: len(asked)] == asked else None


def encode(
    rows: Iterable[Row] | Mapping[int, Row],
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
    labels: Sequence[Any],
    max_length: int,
    unit: str = "row",
    *,
    embeddings: float,
) -> list[Encoded]:
    """Rows as `input_ids` (t,), `labels`, and `row`, the row's number: in `rows` from 1, or its key there.

    For SEQ_CLS also `token_type_ids` (t,), which tell a text from its pair, where the tokenizer makes them.
    `labels` is (t,) with IGNORE where there is no loss for CAUSAL_LM; for SEQ_CLS an index into the argument
    `labels`, or the number to predict where that is empty (regression). Rows are cut at `max_length`: `length` is how
    many tokens a row had before, `cut` whether that is more. A causal row whose prompt alone fills it has nothing to
    learn and is left out, as is one whose chat template marks nothing as the assistant's. One warning counts and names
    them all.

    Args:
        unit: what errors and the warning call a row; its number follows.
        embeddings: how many tokens of the vocabulary, the first ones, the base has an embedding for.

    Raises:
        DataError: a label is not in `labels`, the chat template does not do for messages, a token has no embedding, or
            no row is left.
        BaseModelError: the tokenizer has no token to end an answer or a text with, or it has no embedding.
    """
    encoded = encode_all(rows, tokenizer, task_type, labels, max_length, unit, embeddings=embeddings)
    return without_left_out(encoded, max_length, unit)


def encode_split(
    base: BaseModel, task: TaskData, split: str, labels: Sequence[Any], max_length: int, *, limit: int | None = None
) -> list[Encoded]:
    """A task's rows of a split, or the first `limit` of them, as `encode` has them for the base."""
    rows, unit = task.rows(split)[:limit], task.unit(split)
    return encode(rows, base.tokenizer, task.task_type, labels, max_length, unit, embeddings=base.embeddings)


def encode_all(
    rows: Iterable[Row] | Mapping[int, Row],
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
    labels: Sequence[Any],
    max_length: int,
    unit: str = "row",
    *,
    embeddings: float,
) -> list[Encoded]:
    """As `encode`, without a warning and with the rows that it leaves out: `left_out` says why, or is None."""
    encoded: list[Encoded] = []
    for number, row in (rows if isinstance(rows, Mapping) else dict(enumerate(rows, 1))).items():
        where = f"{unit} {number}"
        if task_type == SEQ_CLS:
            found = _labelled(row, tokenizer, labels, max_length, where)
        else:
            found = _causal(row, tokenizer, max_length, where)
        if found["left_out"] is None:
            require_embeddings(found["input_ids"], tokenizer, embeddings, where)
        encoded.append({**found, "row": number, "cut": found["length"] > max_length})
    return encoded


def require_embeddings(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, embeddings: float, where: str) -> None:
    """Raise DataError for a token beyond the first so many, or BaseModelError where it is the end of sequence: torch
    would say that an index is out of range, and a GPU nothing of use."""
    token = max(ids, default=0)
    if token < embeddings:
        return
    what = f"{tokenizer.convert_ids_to_tokens(token)!r}, token {token}, has no embedding: the base has {embeddings}"
    resize = "or give it one: resize_token_embeddings, then save_pretrained"
    if token == tokenizer.eos_token_id:
        fix = f"Name another as eos_token in tokenizer_config.json, {resize}"
        raise BaseModelError(f"the end of sequence, {what}", where=tokenizer.name_or_path, fix=fix)
    raise DataError(what, where=where, fix=f"Leave it out of rows and chat template, {resize}")


def without_left_out(encoded: Sequence[Encoded], max_length: int, unit: str = "row") -> list[Encoded]:
    """Of what `encode_all` gave the rows to learn from; warns and raises as `encode` does."""
    kept = [row for row in encoded if row["left_out"] is None]
    by_reason = {why: [row["row"] for row in encoded if row["left_out"] == why] for why in (_LONG, _BARE)}
    left_out = {why.format(max_length): numbers for why, numbers in by_reason.items() if numbers}
    if not kept:
        enclose = "They need a turn of the assistant's, which the template may have to enclose in {% generation %}"
        longer = "Raise max_length or shorten them (evaluate cuts rows where training did)"
        what = f"there is no row to learn from: {', or '.join(left_out)}"
        raise DataError(what, where=f"all {unit}s", fix=longer if by_reason[_LONG] else enclose)
    told = {f"left out: {reason}": numbers for reason, numbers in left_out.items()}
    told[f"cut at {max_length} tokens"] = [row["row"] for row in kept if row["cut"]]
    parts = [
        f"{len(numbers)} of {len(encoded)} {unit}s {words} ({_named(numbers)})"
        for words, numbers in told.items()
        if numbers
    ]
    if parts:
        logger.warning("; ".join(parts))
    return kept


def _causal(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str) -> Encoded:
    ids, labels = _tokens(row, tokenizer, where)
    labels = [IGNORE, *labels[1:]]  # nothing predicts the first token
    left_out = None if _teaches(labels[:max_length]) else _LONG if _teaches(labels) else _BARE
    cut = {"input_ids": ids[:max_length], "labels": labels[:max_length]}
    return {**cut, "length": len(ids), "left_out": left_out}


def _teaches(labels: Sequence[int]) -> bool:
    return any(label != IGNORE for label in labels)


def _labelled(
    row: Row, tokenizer: PreTrainedTokenizerBase, labels: Sequence[Any], max_length: int, where: str
) -> Encoded:
    """A classifier's row."""
    text = (row["text"], row["text_pair"]) if "text_pair" in row else (row["text"],)
    tokens = tokenizer(*text, truncation=True, max_length=max_length)
    if not tokens.input_ids:
        raise DataError("the text has no tokens", where=where, fix="Remove the row or fill it in")
    length = len(tokens.input_ids)
    if length == max_length:  # it may have been cut
        length = len(tokenizer(*text).input_ids)
    inputs = {key: tokens[key] for key in _INPUTS if key in tokens}
    return {**inputs, "labels": _target(row, labels, where), "length": length, "left_out": None}


def _target(row: Row, labels: Sequence[Any], where: str) -> int | float:
    if not labels:
        return float(row["label"])
    if row["label"] not in labels:
        what = f"label {row['label']!r} is not among the training labels {some(list(map(repr, labels)))}"
        raise DataError(what, where=where, fix="Train on rows with it, or remove the row")
    return labels.index(row["label"])


def _tokens(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """The token ids of a causal row and their labels, uncut."""
    kind = kind_of(row)
    if kind == CHAT:
        ids, said = chat_tokens(chat_of(row, where), tokenizer, where)
        labels = [IGNORE] * len(ids)
        for part in said:
            labels[part] = ids[part]
        return ids, labels
    if tokenizer.eos_token_id is None:
        fix = "Name one in tokenizer_config.json, as eos_token"
        raise BaseModelError("the tokenizer has no end-of-sequence token", where=tokenizer.name_or_path, fix=fix)
    if kind == TEXT:
        ids = _ended(_text_ids(tokenizer, row["text"]), tokenizer)
        return ids, ids
    prompt = prompt_ids(tokenizer, row["prompt"], where, of_row=True)
    _refuse_opened_twice(tokenizer, prompt, row["completion"], where)
    completion = _ended(_continuation(tokenizer, row["completion"]), tokenizer)
    return prompt + completion, [IGNORE] * len(prompt) + completion


def opened_by(tokenizer: PreTrainedTokenizerBase, asked: Sequence[int]) -> str | None:
    """The tag, as `<think>`, with which a chat template opens thoughts at the end of a question."""
    if tokenizer.chat_template is None:
        return None
    tag = OPENED_THOUGHTS.search(str(tokenizer.decode(list(asked[-_END_OF_QUESTION:]))))
    return tag[0] if tag else None


def _refuse_opened_twice(tokenizer: PreTrainedTokenizerBase, asked: Sequence[int], answer: str, where: str) -> None:
    """Raise DataError for a completion that begins with the tag that its question ends in."""
    if answer.lstrip().startswith("<") and (tag := opened_by(tokenizer, asked)) and answer.lstrip().startswith(tag):
        what = f"the completion begins with {tag}, which the base's chat template has written before it"
        raise DataError(what, where=where, fix="Leave it out of the completion")


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With the end of sequence, unless the row brings it, or the tokenizer adds it."""
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on after another.

    SentencePiece-like tokenizers put a space before a text of its own, so there it is read after a line break. With a
    chat template it keeps the space, with which models like Llama 2 begin their answers.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.chat_template is None and "".join(tokenizer.convert_ids_to_tokens(ids[:1])).startswith(_SPACE):
        line, both = (tokenizer(t, add_special_tokens=False).input_ids for t in ("\n", "\n" + text))
        if both[: len(line)] == line:
            return both[len(line) :]
    return ids


def _named(numbers: Sequence[int]) -> str:
    return f"row{'s' if len(numbers) > 1 else ''} {some(numbers)}"
