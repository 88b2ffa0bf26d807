"""One row of a task: its kind by its fields, read from JSON lines or CSV, checked.

For a causal language model a row is {"prompt", "completion"}, {"messages": [{"role", "content"}, …][, "tools"]} or
{"text"}; for a sequence classifier {"text"[, "text_pair"], "label"}.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import DataError, LoraSBError, Problems, some
from ..files.storage import MAX_JSON_BYTES, parse_json
from .tools import Turn, calls_tools, chat_of

logger = logging.getLogger(__name__)

COMPLETION, CHAT, TEXT, LABELLED = "prompt/completion", "messages", "text", "text/label"  # the kinds of rows
FIELDS_OF = {
    COMPLETION: ("prompt", "completion"),
    CHAT: ("messages",),
    TEXT: ("text",),
    LABELLED: ("text", "label"),
}

FIELDS = ("prompt", "completion", "messages", "tools", "text", "text_pair", "label")
_MISSING = ("nan", "na", "null", "none")  # what is written for an empty cell of CSV

Row = dict[str, Any]
Prompt = str | Sequence[Turn] | Row  # a text, the turns of a chat, or a chat with tools: its `messages` and `tools`


def read_rows(path: Path, label: str | None = "label", problems: Problems | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of a file of JSON lines, or of CSV, each with its place, `file:line`. Raises DataError naming it.

    Of CSV every cell is text; `number_labels` makes numbers of those of the column `label`, if there is one.

    Args:
        problems: takes the errors of single lines, which are then passed over, until it is full.
    """
    try:
        yield from _read_csv(path, label, problems) if is_csv(path) else _read_json_lines(path, problems)
    except OSError as error:
        if isinstance(error, LoraSBError):
            raise
        fix = f"Give a {'CSV' if is_csv(path) else 'JSONL'} file"
        raise DataError(f"cannot read the data: {error}", where=path, fix=fix) from None


def is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read_json_lines(path: Path, problems: Problems | None) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES + 1), b""), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors put it there
                _refuse_other_formats(line, path)
            if line.strip():
                with problems or nullcontext():
                    yield f"{path}:{number}", _parse_row(line, f"{path}:{number}")
            if problems and problems.is_full:
                return


def _refuse_other_formats(start: bytes, path: Path) -> None:
    """Raise DataError for a file of rows that are not one a line, with a command that makes lines of them."""
    if start.startswith(b"PAR1"):
        kind, modules, read = "Parquet", "json, pyarrow.parquet", "pyarrow.parquet.read_table({}).to_pylist()"
    elif start.lstrip().startswith(b"[") and not (_is_json(start) and path.stat().st_size > len(start) + 3):
        kind, modules, read = "one JSON array", "json", 'json.load(open({}, "rb"))'
    else:
        return
    new = path.with_suffix(".lines.jsonl" if path.suffix == ".jsonl" else ".jsonl")
    source, target = (json.dumps(str(file), ensure_ascii=False) for file in (path, new))
    lines = f'[json.dumps(row, default=str) + "\\n" for row in {read.format(source)}]'
    program = f'import {modules}; lines = {lines}; open({target}, "x").writelines(lines)'
    fix = f"Make JSON lines of it: python -c {shlex.quote(program)}"
    raise DataError(f"the file is {kind}, not JSON lines", where=path, fix=fix)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse_row(line: bytes, place: str) -> Row:
    if len(line) > MAX_JSON_BYTES:
        raise DataError(f"a line of more than {MAX_JSON_BYTES} bytes", where=place, fix="One JSON object a line")
    try:
        row = parse_json(line)
        if b"\\u" in line:  # half of a surrogate pair, as a text cut by JavaScript may end in, can only be escaped
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except ValueError as error:
        raise DataError(f"broken JSON: {error}", where=place, fix="One JSON object a line, in UTF-8") from None


def _read_csv(path: Path, label: str | None, problems: Problems | None) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(MAX_JSON_BYTES)
    place = str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)  # a spreadsheet writes semicolons where numbers have commas
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = [name.strip() for name in next(reader, [])]
            if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
                raise DataError(f"two columns called {twice[0]!r}", where=f"{path}:1", fix="Rename or remove one")
            for cells in filter(None, reader):
                place = f"{path}:{reader.line_num}"
                with problems or nullcontext():
                    yield place, _named_cells(names, cells, place, label if separator == ";" else None)
                if problems and problems.is_full:
                    return
    except csv.Error as error:
        fix = "Save it as CSV in UTF-8"
        raise DataError(f"broken CSV: {error}", where=f"{path}:{reader.line_num}", fix=fix) from None
    except UnicodeDecodeError as error:
        raise DataError(f"broken CSV: {error}", where=place, fix="Save it as CSV in UTF-8") from None


def _named_cells(names: Sequence[str], cells: Sequence[str], place: str, label: str | None) -> Row:
    """A row of CSV; in the column `label` a decimal comma becomes a point."""
    if len(cells) != len(names):
        fix = "Put a cell with a separator or a line break in quotes"
        raise DataError("more or fewer cells than the first line names", where=place, fix=fix)
    row = dict(zip(names, cells, strict=True))
    if label is not None and label in row:
        row[label] = re.sub(r"^([+-]?\d*),(\d+)$", r"\1.\2", row[label].strip())
    return row


def refuse_empty(label: str, place: str) -> None:
    """Raise DataError for a label that says nothing."""
    if not label.strip():
        raise DataError("the label is empty", where=place, fix="Remove the row or fill it in")


def number_labels(placed: Sequence[tuple[str, Row]]) -> None:
    """Make numbers of the labels of CSV, where all of the task's are written as such; else they are names.

    A whole number that begins with 0, or has more than 18 digits, is a name.

    Raises:
        DataError: a label is empty; or one is no number, and another has a decimal point, or it is what other programs
            write for an empty cell among numbers alone: a column that is a number but for a few cells would make a
            class of each.
    """
    for place, row in placed:
        row["label"] = row["label"].strip()
        refuse_empty(row["label"], place)
    whole, fraction = r"[+-]?(0|[1-9]\d{0,17})", r"[+-]?(\d{0,30}\.\d{1,30}|\d{1,30}\.)"
    number = rf"{whole}|({whole}|{fraction})[eE][+-]?\d{{1,3}}|{fraction}"
    odd = [(place, row["label"]) for place, row in placed if not re.fullmatch(number, row["label"])]
    if not odd:
        for _, row in placed:
            row["label"] = int(row["label"]) if re.fullmatch(whole, row["label"]) else float(row["label"])
        return
    place, label = odd[0]
    if len(odd) < len(placed) and all(other.lower() in _MISSING for _, other in odd):
        fix = "Remove the row, fill it in, or give the class another name if it is one"
        raise DataError(f"the label {label!r} is that of an empty cell: the others are numbers", where=place, fix=fix)
    if any(re.fullmatch(fraction, row["label"]) for _, row in placed):
        fix = "Remove the row, or write all labels as names or all as numbers"
        raise DataError(f"the label {label!r} is no number, and others are", where=place, fix=fix)


def kind_of(row: Row, where: object = None) -> str:
    """COMPLETION, CHAT, TEXT or LABELLED, by the fields `row` has. Raises DataError when it is none of them."""
    if "messages" in row:
        return CHAT
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


def check_row(row: Row, kind: str, where: str) -> None:
    for field in FIELDS_OF[kind]:
        if field not in row:
            fix = "Every row needs it; where [tasks.NAME] or [data] has columns, they name every field"
            raise DataError(f"the row lacks field {field!r}", where=where, fix=fix)
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
    spoken = (turn for turn in messages if turn["role"] == "assistant")
    if not any(calls_tools(turn) or turn["content"].strip() for turn in spoken):
        raise DataError("the assistant says nothing: nothing to learn", where=where, fix="Remove the row")


def _refuse_sharegpt(turns: Any, where: object) -> None:
    """Raise DataError for a chat whose turns have other names than `role` and `content`."""
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and {"from", "value"} <= turns[0].keys():
        fix = "Make 'role' and 'content' of them (of human: user, of gpt: assistant) as docs/how-to/train.md does"
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
