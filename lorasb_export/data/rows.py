"""One row of a task: its kind by its fields, what it asks and answers, checked.

For a causal language model a row is {"prompt", "completion"}, {"messages": [{"role", "content"}, …][, "tools"]} or
{"text"}; for a sequence classifier {"text"[, "text_pair"], "label"}.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..errors import DataError, some
from .chat import Turn, calls_tools, chat_of, says_something

logger = logging.getLogger(__name__)

COMPLETION, CHAT, TEXT, LABELLED = "prompt/completion", "messages", "text", "text/label"  # the kinds of rows
FIELDS_OF = {
    COMPLETION: ("prompt", "completion"),
    CHAT: ("messages",),
    TEXT: ("text",),
    LABELLED: ("text", "label"),
}

FIELDS = ("prompt", "completion", "messages", "tools", "text", "text_pair", "label")

_UNREAD = ("system", "system_prompt", "functions", "chat_template_kwargs", "documents")  # they change what is asked

Row = dict[str, Any]
Placed = tuple[str, Row]  # a row with its place, which errors name
Prompt = str | Sequence[Turn] | Row  # a text, the turns of a chat, or a chat with tools: its `messages` and `tools`


def refuse_empty(label: str, place: str) -> None:
    """Raise DataError for a label that says nothing."""
    if not label.strip():
        raise DataError("the label is empty", where=place, fix="Remove the row or fill it in")


def kind_of(row: Row, where: object = None) -> str:
    """COMPLETION, CHAT, TEXT or LABELLED, by the fields `row` has. Raises DataError when it is none of them."""
    if "messages" in row:
        return CHAT
    if {"chosen", "rejected"} <= row.keys() and not {"completion", "text"} & row.keys():
        chat, asked = isinstance(row["chosen"], list), 'prompt = "prompt", completion' if "prompt" in row else "text"
        learn = f'columns = {{ {"messages" if chat else asked} = "chosen" }}'
        fix = f"Train on such rows by TRL's DPOTrainer (docs/how-to/own-loop.md), or learn what is chosen: {learn}"
        raise DataError("the row has preferences, 'chosen' and 'rejected'", where=where, fix=fix)
    if "prompt" in row:
        return COMPLETION
    if "text" in row:
        return LABELLED if "label" in row else TEXT
    _refuse_sharegpt(row.get("conversations"), where)
    has = some(row)
    kinds = 'Use {"prompt": …, "completion": …}, {"messages": […]}, {"text": …} or {"text": …, "label": …}'
    raise DataError(
        f"the row has neither 'prompt' nor 'text' nor 'messages' (it has {has})",
        where=where,
        fix=f"{kinds}, or say in columns of its [tasks.NAME], or of [data], what they are called",
    )


def fields_read(row: Row, kind: str) -> Row:
    """What is read of a row: nothing else of it matters."""
    optional = {CHAT: ("tools",), LABELLED: ("text_pair",)}
    return {field: row[field] for field in (*FIELDS_OF[kind], *optional.get(kind, ())) if field in row}


def has_answer(row: Row) -> bool:
    """Whether it asks something and answers it: other chats can be learnt, but not asked."""
    if kind_of(row) == COMPLETION:
        return True
    turns = row["messages"]
    return len(turns) > 1 and turns[-1]["role"] == "assistant"


def question_and_answer(row: Row, where: object = None) -> tuple[Prompt, str]:
    """What a row asks the model, and the answer it gives: its completion, or the last turn of its messages.

    Raises:
        DataError: messages that do not end with the assistant's turn after another.
    """
    if kind_of(row) == COMPLETION:
        return row["prompt"], row["completion"]
    *before, last = row["messages"]
    if not has_answer(row):
        raise DataError("the messages do not end with the assistant's answer", where=where, fix="Use the metric loss")
    return _with_tools(row, before), last.get("content") or ""


def _with_tools(row: Row, turns: Sequence[Turn]) -> Prompt:
    return {"messages": turns, "tools": row["tools"]} if row.get("tools") else turns


def prompt_of(row: Row, where: str) -> Prompt:
    """What a row asks, be it answered or not: its prompt, or its messages without a last turn of the assistant's.

    Raises:
        DataError: it has neither, or they are not what `check_row` takes; or nothing is left of the messages.
    """
    _refuse_unread(row, where)
    if "messages" in row:
        _check_messages(row, where)
        turns: list[Turn] = row["messages"]
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            raise DataError("the messages ask nothing", where=where, fix="Put what the user says before the answer")
        return _with_tools(row, turns)
    if "prompt" not in row:
        fix = 'Use {"prompt": …} or {"messages": [{"role": …, "content": …}, …]}'
        raise DataError(f"the row has neither 'prompt' nor 'messages' (it has {some(row)})", where=where, fix=fix)
    _check_text(row, "prompt", COMPLETION, where)
    prompt: str = row["prompt"]
    return prompt


def with_system(prompt: Prompt, system: str) -> Prompt:
    """A prompt with a system message before it, unless it has one of its own."""
    if isinstance(prompt, dict):
        return {**prompt, "messages": with_system(prompt["messages"], system)}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _refuse_unread(row: Row, where: str) -> None:
    """Raise DataError for what changes a question and lies where nothing reads it; warn of answers called bad."""
    columns = _UNREAD if "messages" in row else (*_UNREAD, "tools")
    found = [column for column in columns if not _is_empty(row.get(column))]
    if "messages" not in row and row.get("label") is False:  # KTO's
        warn_once("Completions with a label of false are learnt like the others: take out those that it calls bad")
    if found:
        what = f"the row has {found[0]!r}: {str(row[found[0]])!r:.40}, which would not be read"
        fix = "Write it into the messages, or name columns of its [tasks.NAME] to read no others"
        raise DataError(what, where=where, fix=fix)


def _is_empty(value: object) -> bool:
    """Whether it says nothing, in any of the spellings that tables and JSON columns have for that."""
    if isinstance(value, Mapping):
        return all(one is None for one in value.values())
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return not value or value != value  # NaN


def check_row(row: Row, kind: str, where: str) -> None:
    for field in FIELDS_OF[kind]:
        if field not in row:
            fix = "Every row needs it; where [tasks.NAME] or [data] has columns, they name every field"
            raise DataError(f"the row lacks field {field!r}", where=where, fix=fix)
    if kind in (COMPLETION, CHAT):
        _refuse_unread(row, where)
    if kind == CHAT:
        _check_messages(row, where)
        _check_learnt(row["messages"], where)
        return
    for field in (f for f in ("prompt", "completion", "text", "text_pair") if f in row):
        _check_text(row, field, kind, where)
    if kind in (COMPLETION, TEXT) and not row[FIELDS_OF[kind][-1]].strip():
        raise DataError(f"the {FIELDS_OF[kind][-1]} is empty", where=where, fix="Remove the row or fill it in")


def _check_text(row: Row, field: str, kind: str, where: str) -> None:
    if not isinstance(row[field], str):
        chat = 'Write the chat as {"messages": [{"role": …, "content": …}, …]}'
        fix = chat if kind == COMPLETION and isinstance(row[field], list) else "Put it in quotes, as text"
        raise DataError(f"{field!r} is not a string", where=where, fix=fix)


def _check_messages(row: Row, where: str) -> None:
    messages: Any = row["messages"]
    if not isinstance(messages, list):
        raise DataError("'messages' is not a list", where=where, fix='Use [{"role": …, "content": …}, …]')
    _refuse_sharegpt(messages, where)
    for number, turn in enumerate(messages, 1):
        if isinstance(turn, dict) and turn.get("function_call"):
            what = f"message {number} has 'function_call', which no server gives to a chat template"
            raise DataError(what, where=where, fix="Write it as one of 'tool_calls'")
        for field in ("role", "content"):
            if field == "content" and calls_tools(turn) and turn.get(field) is None:
                continue
            if not isinstance(turn, dict) or field not in turn:
                raise DataError(f"message {number} has no {field!r}", where=where, fix="Every message needs it")
            if not isinstance(turn[field], str):
                what = f"{field!r} of message {number} is not a string"
                raise DataError(what, where=where, fix="Put it in quotes: only text is learnt")
    chat_of(row, where)


def _check_learnt(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    for number, turn in enumerate(messages, 1):
        if turn["role"] == "assistant" and turn.get("weight") not in (None, 1):  # OpenAI's; the Hub fills up with None
            what = f"message {number} has weight {turn['weight']!r}, and every turn of the assistant is learnt alike"
            fix = "Leave the turn out, or write it into the user's message after it; to learn it, leave the key out"
            raise DataError(what, where=where, fix=fix)
    spoken = {number: turn for number, turn in enumerate(messages, 1) if turn["role"] == "assistant"}
    if not spoken:
        raise DataError("the assistant says nothing: nothing to learn", where=where, fix="Remove the row")
    for number, turn in spoken.items():
        if not says_something(turn):
            what = f"message {number} is an empty answer of the assistant's, which would be learnt"
            raise DataError(what, where=where, fix="Fill it in, or remove the turn or the row")


def _refuse_sharegpt(turns: Any, where: object) -> None:
    """Raise DataError for a chat whose turns have other names than `role` and `content`."""
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and {"from", "value"} <= turns[0].keys():
        fix = "Make 'role' and 'content' of them (of human: user, of gpt: assistant) as docs/how-to/data.md does"
        raise DataError("a chat of ShareGPT's kind, with 'from' and 'value'", where=where, fix=fix)


def refuse_unwritable(row: object, place: str) -> None:
    """Raise DataError for what no line of a file could be."""
    if not isinstance(row, dict):
        raise DataError(f"the row is of type {type(row).__name__}", where=place, fix="Give a dict")
    try:
        as_json(row)
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON: {error}", where=place, fix="Fix the row") from None


def as_json(rows: object) -> bytes:
    return json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str).encode()


@cache
def warn_once(message: str) -> None:
    """A task is read again when it is its turn."""
    logger.warning("%s", message)
