"""`lorasb inspect --data`: the rows of a task as `fit` would train on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import fit
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.batches import collate
from lorasb_export.data.encoding import IGNORE
from lorasb_export.data.hold_out import warn_of_twins
from lorasb_export.data.task import load_task, task_of
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training import mixed
from lorasb_export.training.inspect import inspect_data
from tests import project_of_a
from tests.conftest import lorasb
from tests.rows import CHAT, CHAT_LINE, MARKED, encode
from tests.tiny import make_gpt2, save_tokenizer

project = project_of_a.project
LONG = {"prompt": "1" * 30, "completion": "2"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt/completion": [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1", "completion": "2" * 40}, LONG],
    "messages": [CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"], {"role": "user", "content": "3" * 40}]}],
    "text": [{"text": "abc"}, {"text": "d" * 50}],
}


def chat(*turns: str) -> dict[str, Any]:
    """Of a user and the assistant in turn."""
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


def spelled(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """The segments of a row; the tests' tokenizer puts a space between any two tokens."""
    return [(part["text"].replace(" ", ""), part["learnt"]) for part in row["segments"]]


@pytest.mark.parametrize("kind", ROWS)
def test_it_counts_what_training_holds(
    kind: str, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of("t", {"train": ROWS[kind], "valid": ROWS[kind][:1]})
    settings = FitSettings(epochs=1, batch_size=2, max_length=30)
    found = inspect_data(task, chatty, settings)
    said, held = caplog.messages.copy(), []

    def seen(*arguments: Any) -> dict[str, Any]:
        held.append(collate(*arguments))
        return held[-1]

    monkeypatch.setattr(mixed, "collate", seen)
    adapter = fit(chatty, CalibrationSettings(rank=4, directions="random"), task, tmp_path / "a", settings)
    train, trained = found["splits"]["train"], adapter.training
    assert train["tokens_learnt"] == sum(int((batch["labels"] != IGNORE).sum()) for batch in held) > 0
    assert {key: trained[key] for key in ("rows", "rows_left_out", "rows_cut")}.items() <= train.items()
    assert (train["rows_cut"], train["rows_left_out"]) == (1, kind == "prompt/completion")
    assert (found["row_kind"], found["task_type"], found["max_length"]) == (kind, CAUSAL_LM, 30)
    assert "cut at 30 tokens (row 2)" in said[0]
    assert said[0] in caplog.messages[len(said) :]  # in the words of fit


def test_tokens_are_counted_before_the_cut(chatty: Path) -> None:
    rows = [{"text": "a" * length} for length in range(1, 101)]
    task = task_of("t", {"train": rows, "valid": [*rows[:1], *rows[-1:]]})
    found = inspect_data(task, chatty, FitSettings(max_length=11))
    whole = [row["length"] for row in encode(rows, BaseModel.resolve(chatty).tokenizer, CAUSAL_LM, [], 999)]
    more = whole[0] - 1  # tokens than letters
    assert whole == [n + more for n in range(1, 101)]
    of_train = found["splits"]["train"]
    assert of_train["tokens"] == {"min": 1 + more, "median": 50 + more, "p95": 95 + more, "max": 100 + more}
    assert (of_train["rows"], of_train["rows_cut"]) == (100, 100 - (11 - more))
    assert found["splits"]["valid"]["tokens"]["max"] == 100 + more


def test_held_out_rows_that_are_training_rows_too_are_named(chatty: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(30)]
    task = task_of("t", {"train": rows[:20], "valid": rows[20:], "test": [*rows[24:], {**rows[3], "id": 7}, rows[0]]})
    warn_of_twins(task)
    told = "t: 2 of 8 test rows are training rows too (rows 7, 8): they say little of new ones (memory)"
    assert caplog.messages == [told]
    caplog.clear()
    numbers = [{"text": "a", "label": 1.5}, {"text": "b", "label": 2}]
    warn_of_twins(task_of("n", {"train": numbers, "valid": [{"text": "b", "label": 2.0}, {"text": "c", "label": 2.0}]}))
    assert "n: 1 of 2 valid rows are training rows too (rows 1)" in caplog.text
    caplog.clear()
    inspect_data(task, chatty)  # as `fit`
    assert told in caplog.messages


def test_test_rows_are_counted_and_need_not_fit(chatty: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As `fit` does not encode them, and `evaluate` may ask them whole."""
    task = task_of("t", {"train": [CHAT], "test": [{"messages": chat("1" * 40, "2")["messages"]}]})
    of_test = inspect_data(task, chatty, FitSettings(max_length=20))["splits"]["test"]
    assert (of_test["rows"], of_test["rows_left_out"], of_test["tokens_learnt"]) == (0, 1, 0)
    assert of_test["tokens"]["min"] > 40
    assert not caplog.text


def test_the_first_row_is_shown_as_it_is_read(chatty: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = chat("1+1=", "2", "2+2=", "4")
    row = inspect_data(task_of("t", {"train": [turns]}), chatty)["first_row"]
    assert (row["row"], row["cut"]) == (1, False)
    expected = [("<s>1+1=</s><s>", False), ("2</s>", True), ("<s>2+2=</s><s>", False), ("4</s>", True)]
    assert spelled(row) == expected
    row = inspect_data(task_of("t", {"train": [LONG, {"prompt": "1", "completion": "23"}]}), chatty, FitSettings())
    row = row["first_row"]
    assert spelled(row) == [("<s>" + "1" * 30 + "</s><s>", False), ("2</s>", True)]
    caplog.clear()
    rows = [LONG, {"prompt": "1", "completion": "2" * 40}]
    row = inspect_data(task_of("t", {"train": rows}), chatty, FitSettings(max_length=10))["first_row"]
    assert (row["row"], row["tokens"], row["cut"]) == (2, 45, True)
    assert spelled(row) == [("<s>1</s><s>", False), ("2" * 6, True)]
    tokenizer = BaseModel.resolve(chatty).tokenizer
    (encoded,) = encode(rows[1:], tokenizer, CAUSAL_LM, [], 10)
    assert "".join(part["text"] for part in row["segments"]) == tokenizer.decode(encoded["input_ids"])


def test_of_a_plain_text_the_first_token_is_not_learnt(llama: Path) -> None:
    row = inspect_data(task_of("t", {"train": [{"text": "abc"}]}), llama)["first_row"]
    assert spelled(row) == [("a", False), ("bc</s>", True)]


def test_classes_and_numbers(bert: Path) -> None:
    labelled = [("a", "yes"), ("bb", "no"), ("c" * 9, "yes")]
    rows = [{"text": text, "label": label} for text, label in labelled]
    rows[0]["text_pair"] = "d"
    found = inspect_data(task_of("t", {"train": rows, "valid": rows[:1]}), bert, FitSettings(max_length=6))
    assert found["splits"]["train"] | {"tokens": None} == {
        "rows": 3,
        "rows_left_out": 0,
        "rows_cut": 1,
        "tokens": None,
        "classes": {"no": 1, "yes": 2},
    }
    assert found["splits"]["train"]["tokens"]["max"] == 9
    assert found["splits"]["valid"]["classes"] == {"no": 0, "yes": 1}
    assert (spelled(found["first_row"]), found["first_row"]["label"]) == ([("ad", False)], "yes")
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": 3}, {"text": "c", "label": 1}]
    found = inspect_data(task_of("t", {"train": rows}), bert)
    assert found["splits"]["train"]["numbers"] == {"min": 0.5, "median": 1, "max": 3}
    assert found["first_row"]["label"] == 0.5


def test_what_fit_would_refuse_is_told_of_all_splits_at_once(chatty: Path, tmp_path: Path) -> None:
    base = shutil.copytree(chatty, tmp_path / "base")
    system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (base / "chat_template.jinja").write_text(system + MARKED)
    bad = {"messages": [{"role": "system", "content": "add"}, *CHAT["messages"]]}
    task = task_of("t", {"train": [CHAT, bad], "valid": [bad]})
    with pytest.raises(DataError, match="nothing can be trained") as error:
        inspect_data(task, base)
    assert "no system (t: train row 2)" in str(error.value)
    assert "no system (t: valid row 1)" in str(error.value)
    with pytest.raises(DataError) as of_fit:
        fit(base, CalibrationSettings(rank=4, directions="random"), task, tmp_path / "a")
    assert str(of_fit.value) in str(error.value)


def test_it_refuses_what_fit_would_for_its_settings(llama: Path, bert: Path, tmp_path: Path) -> None:
    asked = task_of("t", {"train": [CHAT], "valid": [chat("1", "2", "3")]})
    with pytest.raises(DataError, match=r"do not end with the assistant's answer \(t: valid row 1\)"):
        inspect_data(asked, llama, FitSettings(metric="exact_match"))
    assert inspect_data(asked, llama)["splits"]["valid"]["rows"] == 1
    with pytest.raises(DataError, match="no valid rows, so patience"):
        inspect_data(task_of("t", {"train": [CHAT]}), llama, FitSettings(patience=3))
    with pytest.raises(DataError, match="every training row has the label 'a'"):
        inspect_data(task_of("t", {"train": [{"text": "x", "label": "a"}]}), bert)
    labelled = {"text": "x", "label": "a"}, {"text": "y", "label": "b"}
    with pytest.raises(SettingsError, match="exact_match"):
        inspect_data(task_of("t", {"train": labelled, "valid": labelled}), bert, FitSettings(metric="exact_match"))
    with pytest.raises(BaseModelError, match="BertModel does not generate text"):
        inspect_data(task_of("t", {"train": [LONG]}), bert)
    base = make_gpt2(tmp_path / "gpt2")
    save_tokenizer(base)
    with pytest.raises(SettingsError, match="max_length is 1025, the base's positions end at 1024"):
        inspect_data(task_of("t", {"train": [LONG]}), base, FitSettings(max_length=1025))


def test_answers_that_will_not_end_are_warned_of(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the file that says what ends them, as the loaded network does."""
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(MARKED.replace("</s>{% end", "~{% end"))
    inspect_data(task_of("t", {"train": [CHAT]}), base)
    assert "answers will not end" in caplog.text
    caplog.clear()
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 97]}))
    inspect_data(task_of("t", {"train": [CHAT]}), base)
    assert not caplog.text


def test_no_weights_are_read_or_fetched(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "model.safetensors").unlink()
    expected = inspect_data(load_task("sums", sums), llama)
    assert inspect_data(load_task("sums", sums), base) == expected | {"base_model": str(base)}
    asked: list[str] = []

    def fetched(source: str, patterns: list[str], *_: Any, **__: Any) -> tuple[str, str, Path]:
        asked.extend(patterns)
        return "me/base", "0" * 40, base

    monkeypatch.setattr("lorasb_export.base.model.snapshot", fetched)
    assert inspect_data(load_task("sums", sums), "me/base") == expected | {"base_model": "me/base"}
    assert asked
    assert not [pattern for pattern in asked if "safetensors" in pattern]


def shown(*words: str) -> dict[str, Any]:
    done = lorasb("inspect", *words, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_task_is_read_and_cut_as_its_project_says(project: Path, sums: Path) -> None:
    shutil.copy(sums / "train.jsonl", "renamed.jsonl")
    text = Path("renamed.jsonl").read_text().replace("prompt", "question")
    Path("renamed.jsonl").write_text(text)
    with Path("lorasb.toml").open("a") as file:
        file.write('[tasks.b]\ndata = "renamed.jsonl"\nhold_out = 0.25\nfit.max_length = 10\n')
        file.write('columns = { prompt = "question", completion = "completion" }\n[fit]\nmax_length = 20\n')
    of_b = shown("--data", "b")
    assert (of_b["max_length"], of_b["path"]) == (10, str(project / "renamed.jsonl"))
    assert of_b["splits"]["train"]["rows"] + of_b["splits"]["valid"]["rows"] == 64
    assert shown("--data", "a")["max_length"] == 20  # which has an adapter
    assert shown("--data", str(sums))["max_length"] == 20
    assert shown("--data", "b", "--max-length", "30")["max_length"] == 30
    assert [of_split["rows"] for of_split in shown("--data", "a")["splits"].values()] == [64, 12, 24]
    assert shown("a")["kind"] == "adapter"
    assert "b has no adapter yet" in (said := lorasb("inspect", "b").stderr)
    assert "Run: lorasb fit b; what it would be trained on: lorasb inspect --data b" in said


def test_what_people_read(chatty: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(CHAT_LINE)
    lines = lorasb("inspect", "--data", "rows.jsonl", "--model", str(chatty)).stdout.splitlines()
    assert lines[:3] == [
        f"data: {tmp_path}/rows.jsonl",
        f"base model: {chatty}",
        "rows: messages, cut after 512 tokens",
    ]
    assert lines[3].split() == "split rows left out cut tokens: min median 95 % max learnt".split()
    assert lines[4].split() == "train 1 0 0 9 9 9 9 2".split()
    assert lines[6] == "train row 1, 9 tokens; what is learnt stands between ⟦ and ⟧:"
    assert lines[7].replace(" ", "") == "<s>1+1=</s><s>⟦2</s>⟧"
    lines = lorasb("inspect", "--data", "rows.jsonl", "--model", str(chatty), "--max-length", "8").stdout.splitlines()
    assert lines[6].startswith("train row 1, the first 8 of 9 tokens; ")
    Path("rows.csv").write_text("text,label\nab,yes\ncd,no\n")
    lines = lorasb("inspect", "--data", "rows.csv", "--model", str(bert)).stdout.splitlines()
    assert (lines[5], lines[-1].replace(" ", "")) == ("classes of train: no 1, yes 1", "ab→⟦yes⟧")
    Path("rows.csv").write_text("text,label\nab,1.5\ncd,0.5\n")
    lines = lorasb("inspect", "--data", "rows.csv", "--model", str(bert)).stdout.splitlines()
    assert (lines[5], lines[-1].replace(" ", "")) == ("numbers of train: 0.5 to 1.5, median 1", "ab→⟦1.5⟧")


def test_data_that_is_not_asked_for_as_such(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sums, "data")
    assert "To see its rows: lorasb inspect --data " in lorasb("inspect", "data").stderr
    assert "To see rows: lorasb inspect --data data/train.jsonl" in lorasb("inspect", "data/train.jsonl").stderr
    assert "there is no lorasb.toml here" in (said := lorasb("inspect", "--data", "data").stderr)
    assert "Pass --model" in said
    for words in (["--max-length", "9"], ["data", "--data", "data", "--max-length", "9"]):
        done = lorasb("inspect", *words)
        assert (done.exit_code, "--max-length is for the rows of --data" in done.stderr) == (2, True)
    Path("data/train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    error = lorasb("inspect", "--data", "data", "--model", str(llama)).stderr
    assert "the row lacks field 'completion' (data/train.jsonl:2)" in error
