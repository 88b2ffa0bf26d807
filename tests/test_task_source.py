"""Data that is not called or split as a task's is: other columns, the Hub's subsets and splits, rows held out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pytest

from lorasb_export import Adapter, TaskSource, evaluate, load_task, merge
from lorasb_export.cards.sections import training_table
from lorasb_export.errors import ArtifactError, DataError, SettingsError
from lorasb_export.project.project import Project
from tests.conftest import lorasb
from tests.rows import CHAT, PAIR, in_csv, in_json, rows_of, tool_row

DOCS = (Path(__file__).parents[1] / "docs/how-to/data.md").read_text(encoding="utf-8")


def test_the_lines_of_the_docs_on_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = [block for block in DOCS.split("```python\n") if "sharegpt.json" in block]
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]
    Path("sharegpt.json").write_text(json.dumps([{"id": "x", "conversations": turns}]))
    exec(lines.partition("```")[0], {})
    assert rows_of(Path("data/chats")) == [CHAT]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`datasets` with a folder in place of the dataset owner/name on the Hub; what it was asked for."""
    folder = tmp_path / "dataset"
    described = "configs:\n"
    for subset, splits in {"main": ("train_sft", "test_sft"), "plain": ("train",)}.items():
        described += f"- config_name: {subset}\n  data_files:\n"
        for split in splits:
            described += f"  - split: {split}\n    path: {subset}/{split}.jsonl\n"
            (folder / subset).mkdir(parents=True, exist_ok=True)
            rows = [{"question": f"{subset} {split} {i}", "answer": str(i)} for i in range(20)]
            (folder / subset / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(f"---\n{described}---\n")
    asked: list[dict[str, Any]] = []
    load = partial(datasets.load_dataset, str(folder), cache_dir=str(tmp_path / "cache"))

    def load_dataset(path: str, revision: str | None = None, **options: Any) -> Any:
        asked.append({"name": path, "revision": revision})
        return load(**options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


def test_subset_splits_and_revision_of_a_hub_dataset(hub: list[dict[str, Any]]) -> None:
    splits = {"train": "train_sft[:75%]", "valid": "train_sft[75%:]", "test": "test_sft[:2]"}
    task = load_task("t", TaskSource("owner/name@v1.0", PAIR, subset="main", splits=splits))
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 15, "valid": 5, "test": 2}
    assert task.rows("valid")[0] == {"prompt": "main train_sft 15", "completion": "15"}
    assert task.source == "owner/name@v1.0"
    assert hub == [{"name": "owner/name", "revision": "v1.0"}]
    plain = load_task("t", TaskSource("owner/name", PAIR, subset="plain", hold_out=0.25))
    assert (len(plain.rows("train")), len(plain.rows("valid"))) == (14, 6)
    of_two = load_task("t", TaskSource("owner/name", {"text": "{question} {answer}"}, subset="plain"))
    assert of_two.rows("train")[1] == {"text": "plain train 1 1"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, r"several parts: \['main', 'plain'\] \(owner/name\)\. Name the one to read as subset"),
        ({"subset": "socratic"}, r"BuilderConfig 'socratic' not found.*\. Correct subset or splits"),
        ({"subset": "main"}, r"no split train \(it has train_sft, test_sft\) .*Name those to read in splits"),
        ({"subset": "main", "splits": {"train": "train"}}, r"Unknown split \"train\".*\. Correct subset or splits"),
        ({"subset": "main", "splits": {"train": "train_sft[:x]"}}, r"Unrecognized instruction.*\. Correct subset"),
    ],
)
def test_a_part_that_the_dataset_has_not(source: dict[str, Any], message: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=message):
        load_task("t", TaskSource("owner/name", PAIR, **source))


def test_a_gated_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub. Visit …")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(DataError, match=r"the dataset is gated \(owner/name\)\. Ask for access"):
        load_task("t", "owner/name")


def held_out(folder: Path, rows: list[dict[str, Any]], share: float) -> tuple[list[Any], list[Any]]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("t", TaskSource(str(folder / "rows.jsonl"), hold_out=share))
    return list(task.rows("train")), list(task.rows("valid"))


def test_rows_are_held_out_by_what_they_say(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "id": i} for i in range(1000)]
    train, valid = held_out(tmp_path, rows, 0.1)
    assert 70 < len(valid) < 130
    assert [row for row in rows if row in valid] == valid  # in the order of the file
    assert [row for row in rows if row not in valid] == train
    more = [{"prompt": f"new{i}", "completion": "a"} for i in range(1000)]
    grown = held_out(tmp_path, more + rows, 0.1)[1]
    assert [row for row in grown if "id" in row] == valid
    others = [row | {"id": row["id"] + 1000} for row in rows]
    twice = held_out(tmp_path, rows + others, 0.1)
    assert not {row["prompt"] for row in twice[0]} & {row["prompt"] for row in twice[1]}
    assert len(twice[1]) == 2 * len(valid)
    assert len(held_out(tmp_path, rows[:3], 1e-9)[1]) == 1


def test_rows_that_say_the_same_stay_together_whatever_else_they_have(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "label": good} for i in range(200) for good in (True, False)]
    train, valid = held_out(tmp_path, rows, 0.2)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    assert 50 < len(valid) < 110


def test_chats_that_say_the_same_stay_together(tmp_path: Path) -> None:
    """In whatever order their keys are, whatever ids and times they have, and however the same call is written."""

    def chat(i: int, *, copied: bool) -> dict[str, Any]:
        row = tool_row("add", a="1", b=str(i))
        user, asked, *_ = turns = row["messages"]
        user["content"] = f"q{i % 50}"  # two calls of each question
        if not copied:
            return row
        (call,) = asked["tool_calls"]
        arguments = json.dumps(dict(reversed(call["function"]["arguments"].items())))
        asked["tool_calls"] = [{"function": {"arguments": arguments, "name": "add"}, "id": f"call_{i}"}]
        asked["content"] = None
        return {"id": i, "messages": [{"id": i, "when": i / 3} | dict(reversed(turn.items())) for turn in turns]}

    def calls(rows: list[Any]) -> set[str]:
        functions = [row["messages"][1]["tool_calls"][0]["function"] for row in rows]
        arguments = [function["arguments"] for function in functions]
        return {json.loads(given)["b"] if isinstance(given, str) else given["b"] for given in arguments}

    train, valid = held_out(tmp_path, [chat(i, copied=copied) for i in range(100) for copied in (True, False)], 0.2)
    assert not calls(train) & calls(valid)
    assert 20 < len(valid) < 70
    assert {row["messages"][0]["content"] for row in train} & {row["messages"][0]["content"] for row in valid}


def test_numbers_that_are_written_otherwise_stay_together(tmp_path: Path) -> None:
    rows = [{"text": f"q{i}", "label": label} for i in range(100) for label in (4, 4.0, 4.5)]
    train, valid = held_out(tmp_path, rows, 0.2)
    of_valid = {row["text"] for row in valid if row["label"] == 4}
    assert of_valid
    assert not of_valid & {row["text"] for row in train if row["label"] == 4}


def test_broken_chats_are_told_before_any_are_held_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"message 1 has no 'role' \(.*rows\.jsonl:2\)"):
        held_out(tmp_path, [CHAT, {"messages": ["1+1="]}], 0.5)


def test_every_class_stays_in_training(tmp_path: Path) -> None:
    rows = [{"text": f"q{i}", "label": i // 2} for i in range(12)]
    train, valid = held_out(tmp_path, rows, 0.999)
    assert len(valid) == 6
    assert {row["label"] for row in train} == set(range(6))
    with pytest.raises(DataError, match="too few different rows to hold any out"):
        held_out(tmp_path, rows[:1] * 5, 0.2)


def test_numbers_are_held_out_though_each_is_the_only_one(tmp_path: Path) -> None:
    rows = [{"text": f"q{i}", "label": i + 0.5} for i in range(1000)]
    assert 70 < len(held_out(tmp_path, rows, 0.1)[1]) < 130


def test_rows_are_held_out_where_there_are_no_valid_ones(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    task = load_task("t", TaskSource(str(tmp_path), hold_out=0.5))
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 3, "valid": 3}
    with pytest.raises(SettingsError, match="subset and splits are of Hub datasets"):
        load_task("t", TaskSource(str(tmp_path), subset="main"))


BAD = {
    'columns = { question = "prompt" }': "columns has 'question': Use prompt, completion, messages",
    "columns = { prompt = 3 }": "'prompt' in columns is 3: Give a name in quotes",
    'columns = "prompt"': "columns = 'prompt' has the wrong type: it takes dict",
    'columns = { prompt = "{{a}}" }': "'prompt' in columns is '{{a}}', which is no template: Write {column} for",
    'columns = { prompt = "{a} {" }': "which is no template",
    'columns = { prompt = "{}{a}" }': "which is no template",
    'columns = { text = "a", label = "{b}" }': "'label' in columns is '{b}': Name one column",
    "hold_out = 1": "hold_out is 1: Give a share of the training rows, below 1",
    "hold_out = -0.1": "hold_out is -0.1",
    "hold_out = nan": "hold_out is nan",
    'splits = { valid = "v" }': "splits name no train",
    'splits = { train = "t", dev = "d" }': "splits has 'dev': Use",
    'splits = { train = "t", valid = "v" }\nhold_out = 0.1': "hold_out makes valid rows, and splits name some",
    "subset = 3": "subset = 3 has the wrong type",
}


@pytest.mark.parametrize("lines", BAD)
def test_what_a_table_may_say_of_its_data(lines: str, tmp_path: Path) -> None:
    (tmp_path / "lorasb.toml").write_text(f'[tasks.a]\ndata = "owner/name"\n{lines}\n')
    with pytest.raises(SettingsError) as error:
        Project.load(tmp_path / "lorasb.toml")
    assert "[tasks.a]" in str(error.value)
    assert BAD[lines] in str(error.value)


COMMON = ['columns = { question = "prompt" }', "hold_out = 1", 'columns = "prompt"']


@pytest.mark.parametrize("lines", COMMON)
def test_what_the_common_table_may_say_is_told_of_it_alone(lines: str, tmp_path: Path) -> None:
    (tmp_path / "lorasb.toml").write_text(f'[data]\n{lines}\n[tasks.a]\ndata = "owner/name"\n')
    with pytest.raises(SettingsError) as error:
        Project.load(tmp_path / "lorasb.toml")
    assert (f"[data] {BAD[lines]}" in str(error.value), "[tasks.a]" in str(error.value)) == (True, False)


WRONG: dict[str, dict[str, Any]] = {
    "columns": {"columns": None},
    "hold_out": {"hold_out": "0.1"},
    "subset": {"subset": 3},
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_a_wrong_type(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} is .*, which has the wrong type"):
        TaskSource("owner/name", **WRONG[name])


def test_the_tables_of_the_docs(tmp_path: Path) -> None:
    blocks = [block.partition("```")[0] for block in DOCS.split("```toml\n")[1:]]
    tables = [block for block in blocks if block.startswith(("[tasks.support]", "[tasks.alpaca]", "[data]"))]
    (tmp_path / "lorasb.toml").write_text("".join(tables))
    project = Project.load(tmp_path / "lorasb.toml")
    support, gsm8k, chat = (project.task_source(name) for name in ("support", "gsm8k", "chat"))
    assert support == TaskSource(str(tmp_path / "support.csv"), PAIR, hold_out=0.1)
    assert gsm8k == TaskSource("openai/gsm8k", PAIR, hold_out=0.1, subset="main")
    assert (str(chat), list(chat.splits)) == ("HuggingFaceH4/ultrachat_200k", ["train", "valid"])
    in_json(tmp_path, {"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"})
    alpaca = replace(project.task_source("alpaca"), path=str(tmp_path / "rows.jsonl"), hold_out=0)
    assert [row["prompt"] for row in load_task("alpaca", alpaca).rows("train")] == ["a\n", "c\nd"]


@pytest.fixture
def project(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a project of the task a, a CSV of 64 sums with columns of its own, a quarter held out."""
    monkeypatch.chdir(tmp_path)
    sums = "".join(f"{a}+{b}=,{a + b}\n" for a in range(8) for b in range(8))
    in_csv(tmp_path, f"question,answer\n{sums}")
    Path("lorasb.toml").write_text(
        f'model = "{llama}"\n[basis]\nrank = 2\n[fit]\nmax_steps = 2\n[tasks.a]\ndata = "rows.csv"\nhold_out = 0.25\n'
        'columns = { prompt = "question", completion = "answer" }\n'
    )
    return tmp_path


def test_the_verbs_read_a_csv_of_other_columns(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    fitted = json.loads(lorasb("fit", "--json").stdout)["adapters"]["a"]
    held = 64 - fitted["rows"]
    assert (6 < held < 26, fitted["valid_loss"] > 0) == (True, True)
    in_csv(project, "question,answer\n1+1=,2\n", "other.csv")
    Path("link.csv").symlink_to("rows.csv")
    for words, rows, split in (
        ([], held, "valid"),
        (["--data", "rows.csv"], held, "valid"),
        (["--data", "./rows.csv"], held, "valid"),
        (["--data", "link.csv"], held, "valid"),
        (["--data", "other.csv"], 1, "test"),
    ):
        scored = json.loads(lorasb("evaluate", "a", "--json", *words).stdout)["evaluation"]["a"]
        assert (scored["rows"], scored["split"]) == (rows, split)
    again = json.loads(lorasb("fit", "a", "--data", "rows.csv", "--overwrite", "--json").stdout)["adapters"]["a"]
    assert again["rows"] == 64 - held
    made = lorasb("calibrate", "--data", "a=rows.csv", "--out", "second", "--json")
    assert json.loads(made.stdout)["samples"] == 32
    measured = lorasb("inspect", "second", "--data", "a", "--json")
    assert json.loads(measured.stdout)["capture"]["basis"] > 0
    assert "--model is for --data" in lorasb("inspect", "second", "--model", "x").output
    assert "Wrote" in lorasb("init", "--config", "x.toml", "--task", "a=rows.csv").stdout


def test_an_adapter_says_how_its_data_was_read(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorasb("fit")
    of_task = evaluate("adapters/a", TaskSource("rows.csv", PAIR, hold_out=0.25))
    assert (of_task["split"], of_task["rows"]) == ("valid", 64 - Adapter.load("adapters/a").training["rows"])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    done = lorasb("evaluate", str(project / "adapters/a"), "--json")
    (scored,) = json.loads(done.stdout)["evaluation"].values()
    assert {key: scored[key] for key in ("split", "rows", "adapter")} == {
        key: of_task[key] for key in ("split", "rows", "adapter")
    }
    merged = merge(project / "adapters/a", "model", verify=True)
    assert merged["verify"]["rows"] == 4
    adapter = Adapter.load(project / "adapters/a")
    adapter.training = {**adapter.training, "data_read": {"columns": {"x": "y"}}}
    with pytest.raises(ArtifactError, match=r"training says data_read otherwise than fit does: columns has 'x'"):
        Project.load().task_of(adapter, None)
    assert "| data read, columns, prompt | question |" in (project / "adapters/a/README.md").read_text()
    switched = {"data_read": {"columns": {"prompt": "/no_think {title}/{question}"}}}
    assert "| data read, columns, prompt | /no_think {title}/{question} |" in training_table(switched)
