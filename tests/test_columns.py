"""The fields of rows from columns of other names, and texts made of several; columns that are no fields."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.data.rows import prompt_of, warn_once
from lorasb_export.data.source import TaskSource
from lorasb_export.data.task import load_task, task_of
from lorasb_export.errors import DataError
from tests.rows import CHAT_LINE, CLASS, GOOD, PAIR, in_csv, in_json, rows_of, tool_row


def test_a_class_that_columns_leave_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = in_csv(tmp_path, "body,label\na,yes\nb,no\n")
    assert rows_of(path, columns={"text": "body"}) == [{"text": "a"}, {"text": "b"}]
    assert f"columns leave out the labels of {path}" in caplog.text


def test_of_named_columns_nothing_else_is_read(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b", "text": "c", "label": 3, "messages": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    assert rows_of(path, columns=PAIR) == [{"prompt": "a", "completion": "b"}]
    assert rows_of(path, columns={"text": "question", "label": "label"}) == [{"text": "a", "label": 3}]
    expected = r"no column 'q' \(there are: question, answer, text, label, messages\) \(.*rows\.jsonl:1\)\. Correct"
    with pytest.raises(DataError, match=expected):
        rows_of(path, columns={"prompt": "q"})


def test_a_chat_need_not_have_tools(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    path = in_json(tmp_path, {"chat": messages, "functions": tools}, {"chat": messages})
    columns = {"messages": "chat", "tools": "functions"}
    assert rows_of(path, columns=columns) == [{"messages": messages, "tools": tools}, {"messages": messages}]
    with pytest.raises(DataError, match="no column 'talk'"):
        rows_of(path, columns={"messages": "talk"})


def test_a_text_is_made_of_several_columns(tmp_path: Path) -> None:
    """Those that a row lacks or that are empty make nothing of it; all else is written as it is."""
    rows: list[dict[str, Any]] = [
        {"instruction": "Add {x}", "input": "1 and 2", "output": "3", "more": []},
        {"instruction": "Say", "input": None, "output": "a", "n 1": 0.5},
        {"instruction": "", "output": "b", "n 1": 7},
        {"instruction": "nan", "input": math.nan, "output": "c", "n 1": math.nan},
    ]
    columns = {"prompt": "{{{n 1}}} {instruction}\n{input}\n", "completion": "output"}
    assert rows_of(in_json(tmp_path, *rows), columns=columns) == [
        {"prompt": "{} Add {x}\n1 and 2\n", "completion": "3"},
        {"prompt": "{0.5} Say\n\n", "completion": "a"},
        {"prompt": "{7} \n\n", "completion": "b"},
        {"prompt": "{} nan\n\n", "completion": "c"},
    ]
    table = in_csv(tmp_path, "title,body,label\na,b,1\n,c,0\n")
    read = rows_of(table, columns={"text": "{title}: {body}", "label": "label"})
    assert read == [{"text": "a: b", "label": 1}, {"text": ": c", "label": 0}]


def test_a_column_of_a_template_that_there_is_not(tmp_path: Path) -> None:
    path = in_json(tmp_path, {"instruction": "a", "output": "b"}, {"input": "c", "output": "d", "tags": ["x"]})
    with pytest.raises(DataError, match=r"no row has a column 'inptu' \(there are: instruction, output, input, tags\)"):
        rows_of(path, columns={"prompt": "{instruction}{inptu}", "completion": "output"})
    (tmp_path / "in parts").mkdir()
    for split, row in {"train": {"q": "a", "output": "b"}, "test": {"Q": "a", "output": "b"}}.items():
        in_json(tmp_path / "in parts", row).rename(tmp_path / "in parts" / f"{split}.jsonl")
    with pytest.raises(DataError, match=r"no row has a column 'q' \(there are: Q, output\) \(.*: test\)"):
        rows_of(tmp_path / "in parts", columns={"prompt": "{q}?", "completion": "output"})
    with pytest.raises(DataError, match=r"column 'tags' is of type list, and a template takes .*rows\.jsonl:2\)"):
        rows_of(path, columns={"prompt": "{input}{tags}", "completion": "output"})
    flags = in_json(tmp_path, {"input": True, "output": "b"})
    with pytest.raises(DataError, match=r"column 'input' is of type bool, and a template takes text and numbers"):
        rows_of(flags, columns={"prompt": "{input}?", "completion": "output"})
    with pytest.raises(DataError, match="no training rows"):
        rows_of(in_json(tmp_path), columns={"prompt": "{input}", "completion": "output"})


def test_labels_within_a_text_are_not_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = in_csv(tmp_path, "body,label\na,yes\n")
    assert rows_of(path, columns={"text": "{body}: {label}"}) == [{"text": "a: yes"}]
    assert not caplog.text


@pytest.mark.parametrize(
    ("line", "more", "told"),
    [
        *(
            (line, {column: value}, column)
            for line in (CHAT_LINE, GOOD)
            for column, value in {
                "system": "Be brief.",
                "system_prompt": "Be brief.",
                "functions": [{"name": "w"}],
                "chat_template_kwargs": {"enable_thinking": False},
                "documents": [{"text": "a"}],
            }.items()
        ),
        (GOOD, {"tools": [{"type": "function"}]}, "tools"),
        (GOOD, {"label": True, "system": None, "documents": [], "tools": "", "functions": {}, "when": 1}, None),
        (GOOD, {"tools": "[]", "functions": "null", "chat_template_kwargs": {"a": None}, "system": " "}, None),
        (GOOD, {"label": 0}, None),
        (CHAT_LINE, {"label": False}, None),
        ('{"text": "a"}', {"system": "b"}, None),
    ],
)
def test_columns_that_would_change_what_is_asked(
    line: str, more: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    row = json.loads(line) | more
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    if told is None:
        assert load_task("t", tmp_path)
        return
    with pytest.raises(
        DataError, match=rf"the row has '{told}': .*which would not be read .*train.jsonl:1\)\. .*columns"
    ):
        load_task("t", tmp_path)
    columns = {field: field for field in json.loads(line)}
    assert load_task("t", TaskSource(str(tmp_path), columns)).rows("train") == [json.loads(line)]
    with pytest.raises(DataError, match=f"'{told}'"):
        prompt_of(row, "here")


def test_answers_that_are_called_bad_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """As KTO's rows are, which are learnt otherwise."""
    warn_once.cache_clear()
    for label, told in ((True, 0), (0, 0), (False, 1)):
        task_of("t", {"train": [{**json.loads(GOOD), "label": label}] * 2})
        assert caplog.text.count("with a label of false are learnt like the others") == told


@pytest.mark.parametrize(
    "line", [GOOD, CHAT_LINE, CLASS, '{"text": "a"}\n', json.dumps(tool_row("weather", city="Oslo"))]
)
def test_columns_that_nobody_reads_do_not_make_other_data(line: str) -> None:
    row = json.loads(line)
    bare, first, second = (task_of("t", {"train": [row | more]}) for more in ({}, {"at": 1}, {"at": 2}))
    assert bare.sha256 == first.sha256 == second.sha256
    assert bare.split_sha256("train") == second.split_sha256("train")
    for field in row:
        changed = task_of("t", {"train": [{**row, field: row[field] * 2}]})
        assert changed.sha256 != bare.sha256
        assert changed.split_sha256("train") != bare.split_sha256("train")
