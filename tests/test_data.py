"""Bad data is named by file and line; good data becomes the batches the loss expects."""

from __future__ import annotations

import codecs
import json
import logging
import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers.normalizers import NFC

from lorasb_export import calibrate
from lorasb_export.base import CAUSAL_LM, SEQ_CLS, BaseModel
from lorasb_export.batches import IGNORE, collate, encode, prompt_ids, row_losses
from lorasb_export.calibration.gradients import draw
from lorasb_export.data import CHAT, COMPLETION, LABELLED, TEXT, load_task, question_and_answer
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.project import Project
from lorasb_export.settings import CalibrationSettings
from tests.rows import CHAT_LINE, CLASS, GOOD, MARKED
from tests.tiny import make_llama, save_tokenizer

BAD = {
    "broken line": (GOOD + '{"prompt": "1+', "broken JSON", "train.jsonl:2"),
    "not an object": (GOOD + "[1, 2]\n", "expected a JSON object", "train.jsonl:2"),
    "lacks a field": (GOOD + '\n{"prompt": "1+1="}\n', "lacks field 'completion'", "train.jsonl:3"),
    "empty completion": (GOOD + '{"prompt": "1+1=", "completion": " "}\n', "completion is empty", "train.jsonl:2"),
    "not a string": ('{"prompt": 1, "completion": "2"}\n', "'prompt' is not a string", "train.jsonl:1"),
    "text not a string": ('{"text": ["a"], "label": 1}\n', "'text' is not a string", "train.jsonl:1"),
    "label of yes or no": ('{"text": "a", "label": true}\n', "label True is neither a name nor", "train.jsonl:1"),
    "yes or no among numbers": (
        '{"text": "a", "label": 0.5}\n{"text": "a", "label": false}\n',
        "label False is neither a name nor",
        "train.jsonl:2",
    ),
    "no label given": ('{"text": "a", "label": null}\n', "label None is neither a name nor", "train.jsonl:1"),
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
    "no kind, later": (GOOD + '{"question": "?"}\n', "neither 'prompt' nor 'text' nor 'messages'", "train.jsonl:2"),
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
    "no assistant": (
        '{"messages": [{"role": "user", "content": "?"}]}\n',
        "the assistant says nothing",
        "train.jsonl:1",
    ),
    "tools": (CHAT_LINE[:-2] + ', "tools": [{"type": "function"}]}\n', "'tools' are not given to", "train.jsonl:1"),
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


def test_csv_is_not_read_and_how_to_convert_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text('question,answer\n"1+1=",2\n')
    with pytest.raises(DataError, match=r"CSV is not read \(mine\.csv\)\. Make JSON lines"):
        load_task("t", "mine.csv")
    with pytest.raises(DataError, match="CSV is not read"):
        load_task("t", "MINE.CSV")
    page = (Path(__file__).parents[1] / "docs/how-to/train.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(import csv.*?)```", page, re.DOTALL)
    exec(script)
    assert load_task("t", "data/mine").rows("train") == [{"prompt": "1+1=", "completion": "2"}]


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


def test_other_names_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "validation", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD)
    assert sorted(load_task("t", tmp_path).splits) == ["train", "valid"]
    assert "dev.jsonl in" in caplog.text
    assert "are train.jsonl, valid.jsonl, test.jsonl, validation.jsonl" in caplog.text
    (tmp_path / "valid.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"both valid\.jsonl and validation\.jsonl"):
        load_task("t", tmp_path)


@pytest.mark.parametrize(
    "source", ["data/missing", "./data", "~/data", "../x/y", "data/", "a/b.jsonl", "b.json", "/x/y"]
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("asked the Hub"))
    (tmp_path / "lorasb.toml").write_text(f'[tasks.a]\ndata = "{source}"\n')
    project = Project.load(tmp_path / "lorasb.toml")
    with pytest.raises(DataError, match=r"no such file, folder or Hub dataset|no train\.jsonl"):
        load_task("a", project.task_source("a"))


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{"text": "a", "when": datetime(2026, 1, 1)}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict({"train": rows, "validation": rows}))
    assert sorted(load_task("t", "owner/name").splits) == ["train", "valid"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict({"train_sft": rows}))
    with pytest.raises(DataError, match=r"no split train \(it has train_sft\) \(owner/name\)"):
        load_task("t", "owner/name")


def test_a_hub_that_fails_without_a_word_is_told_by_the_kind_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (_ for _ in ()).throw(TimeoutError()))
    with pytest.raises(DataError, match=r"Hub dataset: TimeoutError \(owner/name\)"):
        load_task("t", "owner/name")


def test_a_split_of_the_hub_without_labels_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GLUE has -1 for every row of a test split."""
    splits = {"train": [0, 1], "validation": [0], "test": [-1, -1]}

    def load(name: str) -> DatasetDict:
        rows = {split: [{"text": "a", "label": label} for label in labels] for split, labels in splits.items()}
        return DatasetDict({split: Dataset.from_list(of_split) for split, of_split in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(load_task("t", "owner/name").splits) == ["train", "valid"]
    assert "the test split of owner/name is not read: its labels are all -1" in caplog.text
    splits["test"][0] = 0
    with pytest.raises(DataError, match=r"label -1 is not among the training labels \(owner/name test row 1\)"):
        load_task("t", "owner/name")


def test_rows_that_are_drawn_keep_their_numbers(llama: Path, sums: Path) -> None:
    task, tokenizer = load_task("sums", sums), BaseModel.resolve(llama).load_tokenizer()
    every = encode(task.rows("train"), tokenizer, CAUSAL_LM, [], 64)
    drawn = draw(task, tokenizer, [], CalibrationSettings(samples=5))
    assert len(drawn) == 5
    assert all(row == every[row["row"] - 1] for row in drawn)


def test_a_text_without_tokens_is_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    with pytest.raises(DataError, match=r"the text has no tokens \(row 1\)"):
        encode([{"text": "", "label": "a"}], tokenizer, SEQ_CLS, ["a", "b"], 64)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(codecs.BOM_UTF8 + GOOD.encode())
    assert load_task("t", tmp_path).rows("train") == [json.loads(GOOD)]


def test_a_single_file_is_the_training_split(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    task = load_task("t", tmp_path / "rows.jsonl")
    assert (task.task_type, len(task.splits["train"]), list(task.splits)) == (CAUSAL_LM, 1, ["train"])
    with pytest.raises(DataError, match="no valid rows"):
        task.rows("valid")


def test_loss_is_on_the_completion_alone(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    (row,) = encode([{"prompt": "1+1=", "completion": "2"}], tokenizer, CAUSAL_LM, [], 64)
    assert "".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == "<s>1+1=</s><s>2</s>"
    completion = [label for label in row["labels"] if label != IGNORE]
    assert "".join(tokenizer.convert_ids_to_tokens(completion)) == "2</s>"


def test_loss_of_a_chat_is_on_what_the_assistant_says(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    tokenizer.chat_template = MARKED

    def spelled(ids: list[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    turns = [("system", "add"), ("user", "1+1="), ("assistant", "2"), ("user", "2+2="), ("assistant", "4")]
    row: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
    assert spelled(encoded["input_ids"]) == "<s>add</s><s>1+1=</s><s>2</s><s>2+2=</s><s>4</s>"
    assert spelled([label for label in encoded["labels"] if label != IGNORE]) == "2</s>4</s>"
    question, answer = question_and_answer(row)
    assert spelled(prompt_ids(tokenizer, question)) == "<s>add</s><s>1+1=</s><s>2</s><s>2+2=</s><s>"
    assert answer == "4"
    row["messages"].append({"role": "user", "content": "thanks"})
    with pytest.raises(DataError, match="do not end with the assistant's answer"):
        question_and_answer(row)


def test_rows_have_the_same_tokens_whatever_the_day(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + MARKED
    chat = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    for row in (chat, {"prompt": "1", "completion": "2"}):
        (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
        assert "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"])) == "2024<s>1</s><s>2</s>"
    asked = "".join(tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "1")))
    assert asked == f"{date.today().year}<s>1</s><s>"


def test_a_turn_ends_where_it_ends_whatever_the_tokenizer_makes_of_its_last_letter(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    tokenizer.backend_tokenizer.normalizer = NFC()  # as Qwen's
    tokenizer.add_tokens(["é"])
    tokenizer.chat_template = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>", 1)
    turns = [("user", "1"), ("assistant", "cafe\N{COMBINING ACUTE ACCENT}"), ("user", "2"), ("assistant", "3")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
    learnt = [label for label in encoded["labels"] if label != IGNORE]
    assert tokenizer.convert_ids_to_tokens(learnt) == list("café3")


def test_chat_templates_that_do_not_do(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    rows = [json.loads(CHAT_LINE)]
    with pytest.raises(DataError, match=r"does not mark what the assistant says.*user's words.*\{% generation %\}"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    tokenizer.chat_template = MARKED + "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(DataError, match=r"the chat template refuses the messages: turns must alternate \(row 1\)"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)


def test_loss_of_plain_text_is_on_all_but_the_first_token(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    (row,) = encode([{"text": "abc"}], tokenizer, CAUSAL_LM, [], 64)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["a", "b", "c", "</s>"]
    assert row["labels"] == [IGNORE, *row["input_ids"][1:]]
    assert collate([row], 2)["logits_to_keep"].tolist() == [0, 1, 2]


def some_rows(kind: str) -> list[dict[str, Any]]:
    words = ["7", "a longer one, of many tokens", "some"]
    if kind == TEXT:
        return [{"text": word} for word in words]
    if kind == COMPLETION:
        return [{"prompt": word, "completion": word[::-1]} for word in words]
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}] for word in words]
    return [{"messages": turns[0]}, {"messages": turns[1] + turns[0]}, {"messages": turns[2][1:] + turns[2]}]


@pytest.mark.parametrize("kind", [COMPLETION, CHAT, TEXT])
def test_padding_changes_no_loss(kind: str, llama: Path) -> None:
    base = BaseModel.resolve(llama)
    tokenizer, network = base.load_tokenizer(), base.load(dtype="float64")
    tokenizer.chat_template = MARKED

    def losses(rows: list[dict[str, Any]]) -> list[float]:
        batch = collate(rows, tokenizer.pad_token_id)
        labels = batch.pop("labels")
        sums, counts = row_losses(network(**batch).logits, labels)
        assert counts.tolist() == [sum(label != IGNORE for label in row["labels"]) for row in rows]
        return (sums / counts).tolist()

    rows = encode(some_rows(kind), tokenizer, CAUSAL_LM, [], 64)
    assert len({len(row["input_ids"]) for row in rows}) == 3
    alone = [losses([row])[0] for row in rows]
    assert losses(rows) == pytest.approx(alone, abs=1e-6)
    full = [float(network(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss) for r in rows]
    assert alone == pytest.approx(full, abs=1e-6)


def test_regression_rows_and_their_loss(bert: Path) -> None:
    tokenizer = BaseModel.resolve(bert).load_tokenizer()
    rows = [{"text": "a", "label": 2}, {"text": "a b", "text_pair": "c", "label": -0.5}]
    batch = collate(encode(rows, tokenizer, SEQ_CLS, [], 64), tokenizer.pad_token_id)
    assert batch["labels"].tolist() == [2.0, -0.5]
    losses, counts = row_losses(torch.tensor([[1.0], [-1.0]]), batch["labels"])
    assert (losses.tolist(), counts.tolist()) == ([1.0, 0.25], [1, 1])


def test_prompt_without_a_chat_template_is_taken_as_it_is(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "1+1=")) == list("1+1=")


def test_rows_cut_to_nothing_are_left_out_or_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1" * 50, "completion": "2"}]
    assert len(encode(rows, tokenizer, CAUSAL_LM, [], 20)) == 1
    with pytest.raises(DataError, match=r"alone has 20 tokens or more \(all a: valid rows\). Raise max_length"):
        encode(rows[1:], tokenizer, CAUSAL_LM, [], 20, unit="a: valid row")


def test_a_row_in_which_nothing_is_marked_is_not_called_too_long(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    tokenizer.chat_template = MARKED.replace("'assistant'", "'model'", 1)
    rows = [json.loads(CHAT_LINE)]
    with pytest.raises(DataError, match=r"no token of theirs is to be learnt \(all rows\). .*{% generation %}"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    encode([*rows, {"messages": [{"role": "model", "content": "2"}]}], tokenizer, CAUSAL_LM, [], 64)
    assert caplog.messages == ["1 of 2 rows left out: no token of theirs is to be learnt (row 1)"]


def test_one_warning_counts_and_names_the_rows_left_out_and_cut(
    llama: Path, bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    good, long = {"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": "2" * 20}
    prompts = [{"prompt": "1" * 20, "completion": "2"}] * 11
    with caplog.at_level(logging.WARNING):
        assert [row["row"] for row in encode([good, long, good], tokenizer, CAUSAL_LM, [], 20)] == [1, 2, 3]
        assert [row["row"] for row in encode([good, *prompts, long], tokenizer, CAUSAL_LM, [], 20)] == [1, 13]
        assert encode([good], tokenizer, CAUSAL_LM, [], 20)
        tokenizer = BaseModel.resolve(bert).load_tokenizer()
        texts = [{"text": "a" * count, "label": 1} for count in (20, 21)]
        assert [len(row["input_ids"]) for row in encode(texts, tokenizer, SEQ_CLS, [1], 20)] == [20, 20]
    assert caplog.messages == [
        "1 of 3 rows cut at 20 tokens (row 2)",
        "11 of 13 rows left out: their prompt alone has 20 tokens or more (rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …); "
        "1 of 13 rows cut at 20 tokens (row 13)",
        "1 of 2 rows cut at 20 tokens (row 2)",
    ]
    assert all(record.name == "lorasb_export.batches" for record in caplog.records)


def test_batches_are_padded_right_and_know_which_logits_they_need(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    rows = encode(
        [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1", "completion": "200"}], tokenizer, CAUSAL_LM, [], 64
    )
    batch = collate(rows, 2)
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 8 + [0]]
    # prompts of 7 and 4 tokens; after them "2</s>" and "200</s>"
    assert batch["logits_to_keep"].tolist() == [3, 4, 5, 6, 7]
    wanted = [[IGNORE, IGNORE, IGNORE, "2", "</s>"], ["2", "0", "0", "</s>", IGNORE]]
    found = [
        [IGNORE if label == IGNORE else tokenizer.convert_ids_to_tokens(label) for label in row]
        for row in batch["labels"].tolist()
    ]
    assert found == wanted


def test_prompts_of_all_lengths_need_few_logits(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    rows = encode([{"prompt": "1" * n, "completion": "2"} for n in (1, 20, 50)], tokenizer, CAUSAL_LM, [], 64)
    assert len(collate(rows, 2)["logits_to_keep"]) == 6  # two tokens a row


def test_a_tokenizer_without_a_pad_token(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert BaseModel.resolve(base).load_tokenizer().pad_token == "</s>"
    del config["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="neither a pad token nor an end-of-sequence token"):
        BaseModel.resolve(base).load_tokenizer()
    config["pad_token"] = "<unk>"
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = BaseModel.resolve(base).load_tokenizer()
    assert encode([{"text": "x", "label": "a"}], tokenizer, SEQ_CLS, ["a", "b"], 64)
    for line in (GOOD, '{"text": "x"}'):
        with pytest.raises(BaseModelError, match=r"no end-of-sequence token .*eos_token"):
            encode([json.loads(line)], tokenizer, CAUSAL_LM, [], 64)


def test_labels_outside_the_training_labels(bert: Path) -> None:
    tokenizer = BaseModel.resolve(bert).load_tokenizer()
    with pytest.raises(DataError, match="label 'maybe' is not among the training labels"):
        encode([{"text": "x", "label": "maybe"}], tokenizer, SEQ_CLS, ["no", "yes"], 64)


def test_mixed_kinds_are_refused(llama: Path, sums: Path, parity: Path) -> None:
    with pytest.raises(DataError, match="the tasks mix text generation"):
        calibrate(str(llama), {"sums": sums, "parity": parity})


def test_rank_larger_than_a_module(llama: Path, sums: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"rank 17 exceeds module model\.layers\.0\.self_attn\.k_proj of shape \(16, 32\)"
    ):
        calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=17))


def test_target_that_matches_nothing(llama: Path, sums: Path) -> None:
    with pytest.raises(SettingsError, match=r"target 'q_prj' matches no module.*q_proj"):
        calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="v_proj,q_prj"))


def test_targets_by_ending(llama: Path, sums: Path) -> None:
    basis = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="q_proj,mlp.down_proj"))
    assert {name.rpartition(".")[2] for name in basis.modules} == {"q_proj", "down_proj"}
    assert len(basis.modules) == 4


def test_module_without_gradient_is_reported(llama: Path, sums: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(make_llama(tmp_path / "dead"))
    network = base.load()
    network.model.layers[0].mlp.up_proj.weight.data.zero_()
    network.model.layers[0].mlp.gate_proj.weight.data.zero_()
    with pytest.raises(BaseModelError, match=r"received no gradient.*layers\.0\.mlp"):
        calibrate(base, {"sums": sums}, CalibrationSettings(rank=4), network=network)


def test_non_finite_gradient_is_reported(llama: Path, sums: Path) -> None:
    base = BaseModel.resolve(llama)
    network = base.load()
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(BaseModelError, match="not finite"):
        calibrate(base, {"sums": sums}, CalibrationSettings(rank=4), network=network)
    assert not any(torch.isnan(p).any() for p in network.model.layers[1].parameters())


BAD_BASES = {
    "a file": (lambda f: f.write_text("hello"), "the base model is a file"),
    "missing": (lambda f: None, "the base model was not found"),
    "empty folder": (lambda f: f.mkdir(), "no config.json"),
    "no weights": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "llama"}')),
        "no model.safetensors",
    ),
    "encoder-decoder": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')),
        "neither a causal language model nor a sequence classifier",
    ),
    "vision": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "vit"}')),
        "neither a causal language model nor a sequence classifier",
    ),
    "quantized": (
        lambda f: (
            f.mkdir(),
            (f / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'),
        ),
        "quantized (gptq)",
    ),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_bad_base_is_refused(case: str, tmp_path: Path) -> None:
    make, message = BAD_BASES[case]
    make(tmp_path / "base")
    with pytest.raises(BaseModelError) as error:
        BaseModel.resolve(tmp_path / "base").tensors  # noqa: B018
    assert message in str(error.value)


def test_a_config_that_says_that_it_is_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": null}')
    assert BaseModel.resolve(tmp_path).config["model_type"] == "llama"


def test_an_encoder_is_not_asked_to_generate(bert: Path, sums: Path) -> None:
    with pytest.raises(BaseModelError, match="BertModel does not generate text"):
        calibrate(str(bert), {"sums": sums})
