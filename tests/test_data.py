"""Bad rows and files are named by file and line; what kind of rows good ones are."""

from __future__ import annotations

import codecs
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lorasb_export import calibrate
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.rows import CHAT, COMPLETION, LABELLED, TEXT
from lorasb_export.data.task import load_task, task_of
from lorasb_export.errors import DataError
from tests.artifacts import forbid
from tests.rows import CHAT_LINE, CLASS, GOOD

BAD = {
    "broken line": (GOOD + '{"prompt": "1+', "broken JSON", "train.jsonl:2"),
    "lists without end": ("[" * 100_000 + "\n", "the file is one JSON array", "train.jsonl"),
    "not an object": (GOOD + "[1, 2]\n", "expected a JSON object", "train.jsonl:2"),
    "lacks a field": (GOOD + '\n{"prompt": "1+1="}\n', "lacks field 'completion'", "train.jsonl:3"),
    "empty completion": (GOOD + '{"prompt": "1+1=", "completion": " "}\n', "completion is empty", "train.jsonl:2"),
    "not a string": ('{"prompt": 1, "completion": "2"}\n', "'prompt' is not a string", "train.jsonl:1"),
    "of TRL's kind": (
        '{"prompt": [{"role": "user", "content": "1"}], "completion": "2"}\n',
        'Write the chat as {"messages"',
        "train.jsonl:1",
    ),
    "text not a string": ('{"text": ["a"], "label": 1}\n', "'text' is not a string", "train.jsonl:1"),
    "label of yes or no": ('{"text": "a", "label": true}\n', "label True is neither a name nor", "train.jsonl:1"),
    "yes or no among numbers": (
        '{"text": "a", "label": 0.5}\n{"text": "a", "label": false}\n',
        "label False is neither a name nor",
        "train.jsonl:2",
    ),
    "no label given": ('{"text": "a", "label": null}\n', "label None is neither a name nor", "train.jsonl:1"),
    "empty label": (CLASS + '{"text": "a", "label": " "}\n', "the label is empty", "train.jsonl:2"),
    "label with a space": (
        CLASS + CLASS.replace("yes", "yes "),
        "label 'yes ' has white space at an end",
        "train.jsonl:2",
    ),
    "label not finite": ('{"text": "a", "label": NaN}\n', "label nan is not finite", "train.jsonl:1"),
    "label too large": (
        f'{{"text": "a", "label": 1.5}}\n{{"text": "a", "label": 1{"0" * 400}}}\n',
        "too large",
        "train.jsonl:2",
    ),
    "labels of two kinds": (CLASS + '{"text": "a", "label": 1.5}\n', "some labels are names", "train.jsonl:2"),
    "half a surrogate": ('{"prompt": "cut \\ud83d", "completion": "2"}\n', "surrogates not allowed", "train.jsonl:1"),
    "no rows": ("\n\n", "no training rows", ""),
    "no kind": ('{"question": "?"}\n', "neither 'prompt' nor 'text' nor 'messages'", "train.jsonl:1"),
    "preferences": (
        '{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n',
        'learn what is chosen: columns = { prompt = "prompt", completion = "chosen" }',
        "train.jsonl:1",
    ),
    "preferences of chats": (
        '{"prompt": "1+1=", "chosen": [], "rejected": []}\n',
        "preferences, 'chosen' and 'rejected'",
        "columns = { messages = ",
    ),
    "preferences of texts": (
        '{"chosen": "1+1=2", "rejected": "1+1=3"}\n',
        "DPOTrainer",
        'columns = { text = "chosen" }',
    ),
    "no kind, later": (GOOD + '{"question": "?"}\n', "neither 'prompt' nor 'text' nor 'messages'", "train.jsonl:2"),
    "pair not a string": (
        '{"text": "a", "text_pair": 3, "label": "b"}\n',
        "'text_pair' is not a string",
        "train.jsonl:1",
    ),
    "empty text": ('{"text": "a"}\n{"text": ""}\n', "the text is empty", "train.jsonl:2"),
    "mixed: chat": (GOOD + CHAT_LINE, "a messages row among prompt/completion rows", "train.jsonl:2"),
    "mixed: no label": (CLASS + CLASS + '{"text": "a"}\n', "a text row among text/label rows", "train.jsonl:3"),
    "messages not a list": ('{"messages": "hello"}\n', "'messages' is not a list", "train.jsonl:1"),
    "message not an object": (CHAT_LINE + '{"messages": ["hello"]}\n', "message 1 has no 'role'", "train.jsonl:2"),
    "message without role": ('{"messages": [{"content": "2"}]}\n', "message 1 has no 'role'", "train.jsonl:1"),
    "message without content": ('{"messages": [{"role": "user"}]}\n', "message 1 has no 'content'", "train.jsonl:1"),
    "content not a string": (
        CHAT_LINE.replace('"2"', '[{"type": "text"}]'),
        "'content' of message 2 is not a string",
        "train.jsonl:1",
    ),
    "weight": (
        CHAT_LINE + CHAT_LINE.replace('"2"', '"2", "weight": 0'),
        "message 2 has weight 0, and every turn of the assistant is learnt alike",
        "train.jsonl:2",
    ),
    "weight that is no number": (CHAT_LINE.replace('"2"', '"2", "weight": "1"'), "has weight '1'", "train.jsonl:1"),
    "of ShareGPT's kind": (
        '{"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}\n',
        "a chat of ShareGPT's kind, with 'from' and 'value'",
        "train.jsonl:1",
    ),
    "of ShareGPT's kind, renamed": (
        CHAT_LINE + '{"messages": [{"from": "human", "value": "1+1="}]}\n',
        "a chat of ShareGPT's kind, with 'from' and 'value'",
        "train.jsonl:2",
    ),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "?"}]}\n',
        "the assistant says nothing",
        "train.jsonl:1",
    ),
    "empty answer": (
        CHAT_LINE
        + CHAT_LINE.replace('"2"}', '"2"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": " "}'),
        "message 4 is an empty answer of the assistant's",
        "train.jsonl:2",
    ),
    "call of the older kind": (
        CHAT_LINE + CHAT_LINE.replace('"2"', 'null, "function_call": {"name": "w", "arguments": "{}"}'),
        "message 2 has 'function_call'",
        "train.jsonl:2",
    ),
    "tools": (CHAT_LINE[:-2] + ', "tools": [{"type": "function"}]}\n', "tool 1 is no function", "train.jsonl:1"),
    "no messages": ('{"messages": []}\n', "the assistant says nothing", "train.jsonl:1"),
    "not text": (b"\xff\xfe\x00", "broken JSON: 'utf-8' codec can't decode", "train.jsonl:1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str, tmp_path: Path) -> None:
    content, message, place = BAD[case]
    (tmp_path / "train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        load_task("t", tmp_path)
    assert message in str(error.value)
    assert place in str(error.value)


def test_weights_that_change_nothing(tmp_path: Path) -> None:
    """OpenAI's 1, and what the Hub puts where others have a weight; of others than the assistant nothing is learnt."""
    weights = ('"2", "weight": 1', '"2", "weight": 1.0', '"2", "weight": null')
    lines = [CHAT_LINE.replace('"2"', answer) for answer in weights] + [CHAT_LINE.replace('="', '=", "weight": 0')]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    assert len(load_task("t", tmp_path).rows("train")) == 4


def test_a_label_that_training_lacks(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(CLASS + CLASS.replace("yes", "no"))
    (tmp_path / "valid.jsonl").write_text(CLASS)
    assert load_task("t", tmp_path).labels == ["no", "yes"]
    (tmp_path / "test.jsonl").write_text(CLASS + CLASS.replace("yes", "maybe"))
    with pytest.raises(DataError, match=r"label 'maybe' is not among the training labels .*test\.jsonl:2"):
        load_task("t", tmp_path)


def test_a_split_of_another_kind_or_of_no_rows(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "valid.jsonl").write_text(CLASS)
    with pytest.raises(DataError, match=r"a text/label row among prompt/completion rows .*valid\.jsonl:1"):
        load_task("t", tmp_path)
    (tmp_path / "valid.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"valid\.jsonl is empty .*Remove it or add rows"):
        load_task("t", tmp_path)


KINDS = {
    COMPLETION: (GOOD, CAUSAL_LM, [], None),
    CHAT: (CHAT_LINE, CAUSAL_LM, [], None),
    TEXT: ('{"text": "a"}\n', CAUSAL_LM, [], None),
    LABELLED: (CLASS + CLASS.replace("yes", "no"), SEQ_CLS, ["no", "yes"], 2),
    "numbers": ('{"text": "a", "label": 2}\n{"text": "b", "label": 1}\n', SEQ_CLS, [1, 2], 2),
    "regression": ('{"text": "a", "label": 2}\n{"text": "b", "label": 1.5}\n', SEQ_CLS, [], 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_rows(kind: str, tmp_path: Path) -> None:
    content, task_type, labels, num_labels = KINDS[kind]
    (tmp_path / "train.jsonl").write_text(content)
    task = load_task("t", tmp_path)
    assert task.kind == (kind if kind in (COMPLETION, CHAT, TEXT) else LABELLED)
    assert (task.task_type, task.labels, task.num_labels) == (task_type, labels, num_labels)
    assert task.regression == (kind == "regression")


def test_no_data(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        load_task("t", tmp_path)
    with pytest.raises(DataError, match="no such file, folder or Hub dataset"):
        load_task("t", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no data to calibrate on"):
        calibrate(str(llama), {})


def test_data_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(GOOD)
    forbid(tmp_path / "rows", monkeypatch)
    for path in (tmp_path / "rows", tmp_path / "rows" / "train.jsonl"):
        with pytest.raises(DataError, match=r"cannot be read: Permission denied \(.*rows"):
            load_task("t", path)


def test_other_names_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "validation", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD)
    assert sorted(load_task("t", tmp_path).splits) == ["train", "valid"]
    assert "dev.jsonl in" in caplog.text
    assert "are train.jsonl, valid.jsonl, test.jsonl, validation.jsonl" in caplog.text
    (tmp_path / "valid.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"both valid\.jsonl and validation\.jsonl"):
        load_task("t", tmp_path)


@pytest.mark.parametrize("name", ["ro'ws $1 ä.parquet", "rows.json", "rows.jsonl"])
def test_rows_that_are_no_lines_come_with_a_command_that_makes_them(name: str, tmp_path: Path) -> None:
    rows = [{"messages": json.loads(CHAT_LINE)["messages"], "n": 7, "tools": None}, json.loads(CHAT_LINE) | {"n": None}]
    path = tmp_path / name
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(codecs.BOM_UTF8 + json.dumps(rows, indent=1).encode())
    with pytest.raises(DataError) as error:
        load_task("t", path)
    kind, _, command = str(error.value).partition(f", not JSON lines ({path}). Make JSON lines of it: python ")
    assert kind == f"the file is {'Parquet' if path.suffix == '.parquet' else 'one JSON array'}"
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True)
    (made,) = set(tmp_path.iterdir()) - {path}
    read = load_task("t", made).rows("train")
    assert [(row["messages"], row["n"]) for row in read] == [(row["messages"], row["n"]) for row in rows]


def test_a_list_in_each_line_is_not_taken_for_one_array(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(json.loads(CHAT_LINE)['messages'])}\n" * 2)
    with pytest.raises(DataError, match=r"expected a JSON object .*chats.jsonl:1"):
        load_task("t", path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(codecs.BOM_UTF8 + GOOD.encode())
    assert load_task("t", tmp_path).rows("train") == [json.loads(GOOD)]


def test_a_single_file_is_the_training_split(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    task = load_task("t", tmp_path / "rows.jsonl")
    assert (task.task_type, len(task.splits["train"]), list(task.splits)) == (CAUSAL_LM, 1, ["train"])
    with pytest.raises(DataError, match="no valid rows"):
        task.rows("valid")


def test_rows_in_memory(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(CLASS + CLASS.replace("yes", "no"))
    (tmp_path / "valid.jsonl").write_text(CLASS)
    of_files = load_task("t", tmp_path)
    task = task_of("t", {"valid": of_files.rows("valid"), "train": iter(of_files.rows("train"))})
    assert (task.splits, task.sha256, task.task_type) == (of_files.splits, of_files.sha256, SEQ_CLS)
    assert repr(of_files) == f"<TaskData t: text/label rows, 2 train, 1 valid, of {tmp_path}>"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [json.loads(GOOD), {"prompt": "?"}]}, r"lacks field 'completion' \(task t, train row 2\)"),
        ({"train": [json.loads(GOOD)], "valid": ["1+1=2"]}, r"of type str \(task t, valid row 1\)\. Give a dict"),
        ({"train": [{"text": "cut \ud83d"}]}, r"cannot be written as JSON: .*surrogates.* \(task t, train row 1\)"),
        ({"train": [], "valid": [json.loads(GOOD)]}, "no training rows"),
        ({"training": [json.loads(GOOD)]}, r"unknown split 'training' \(task t\)\. Use train, valid, test"),
    ],
)
def test_bad_rows_in_memory_are_named(splits: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_of("t", splits)


@pytest.mark.parametrize(("labels", "warns"), [([0.0, 1.0], True), ([0.5, 1.0], False), ([0, 1], False)])
def test_classes_that_are_written_as_numbers_with_a_fraction_are_told_of(
    labels: list[float], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As pandas writes a column of whole numbers that had an empty cell."""
    task = task_of(f"of {labels}", {"train": [{"text": "a", "label": label} for label in labels]})
    assert ("learnt as numbers (regression). Write 1 for 1.0" in caplog.text) == warns
    assert task.regression == isinstance(labels[0], float)
