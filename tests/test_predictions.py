"""What is predicted of each row: from `evaluate`, and in the file of `lorasb evaluate --predictions`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lorasb_export import Adapter, evaluate
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.task import load_task
from lorasb_export.errors import LoraSBError, SettingsError
from lorasb_export.evaluation.inference import answers, answers_of_ids
from lorasb_export.project.evaluate import evaluate_adapters
from lorasb_export.project.project import Project
from tests.conftest import lorasb
from tests.random_adapter import adapter_on
from tests.rows import CLASS, GOOD, task_of


@pytest.fixture
def adapter(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """Of a project in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasb.toml").write_text(f'model = "{llama}"\n[tasks.a]\ndata = "{sums}"\n')
    return adapter_on(llama, tmp_path / "adapters/a", CAUSAL_LM)


def lines_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_answers_of_base_and_adapter_stand_beside_what_is_expected(adapter: Adapter, sums: Path, llama: Path) -> None:
    rows = load_task("a", sums).rows("test")[:5]
    found = evaluate(adapter, sums, limit=5, predictions=True)
    predicted = found.pop("predictions")
    assert found == evaluate(adapter, sums, limit=5)
    assert [(line["number"], line["row"]) for line in predicted] == list(enumerate(rows, 1))
    # The tiny tokenizer puts a space between digits.
    assert [line["expected"].replace(" ", "") for line in predicted] == [row["completion"] for row in rows]
    base = BaseModel.resolve(llama)
    network = base.load()

    def said_to_each() -> list[str]:
        """In as many tokens as the answer has, and 8 more."""
        rooms = [len(row["completion"]) + 8 for row in rows]
        asked = [(row["prompt"], room) for row, room in zip(rows, rooms, strict=True)]
        return [answers(network, base.tokenizer, [prompt], max_tokens=room)[0] for prompt, room in asked]

    assert [line["base"] for line in predicted] == said_to_each()
    adapter.inject(network)
    said = said_to_each()
    assert [line["adapter"] for line in predicted] == said
    assert said != [line["base"] for line in predicted]


def test_classes_are_given_by_name_and_make_up_the_accuracy(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    task = task_of(CLASS + CLASS.replace("yes", "no"), tmp_path / "data")
    found = evaluate(adapter, task, split="train", predictions=True)
    predicted = found["predictions"]
    assert [line["expected"] for line in predicted] == ["yes", "no"]
    assert {line["adapter"] for line in predicted} in ({"yes"}, {"no"})  # both rows are one text
    assert {line["base"] for line in predicted} == {None}
    assert sum(line["adapter"] == line["expected"] for line in predicted) / 2 == found["adapter"]


def test_numbers_are_given_as_predicted(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=[], regression=True)
    task = task_of('{"text": "a", "label": 0.5}\n{"text": "b, longer", "label": 2}\n', tmp_path / "data")
    predicted = evaluate(adapter, task, split="train", predictions=True)["predictions"]
    assert [line["expected"] for line in predicted] == [0.5, 2]
    assert len({line["adapter"] for line in predicted}) == 2


def test_the_file_has_a_line_for_each_row_of_each_adapter(adapter: Adapter, sums: Path) -> None:
    adapter.save("adapters/b")
    done = lorasb("evaluate", "--limit", "3", "--data", str(sums), "--predictions", "out/said.jsonl", "--json")
    assert done.exit_code == 0
    assert "predictions" not in json.loads(done.stdout)["evaluation"]["a"]
    lines = lines_of("out/said.jsonl")
    assert [(line["name"], line["split"], line["number"]) for line in lines] == [
        (name, "test", number) for name in "ab" for number in (1, 2, 3)
    ]
    of_rows = evaluate(adapter, sums, limit=3, predictions=True)["predictions"]
    assert [{key: line[key] for key in of_rows[0]} for line in lines] == 2 * of_rows


def test_what_is_predicted_outlasts_what_comes_after(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save("adapters/b")
    words = {name: f"adapters/{name}" for name in "ab"}
    found = evaluate_adapters(Project.load(), words, data="rows.jsonl", predictions="said.jsonl")
    Path("rows.jsonl").write_text(GOOD)
    next(found)
    assert [line["name"] for line in lines_of("said.jsonl")] == ["a"]
    shutil.rmtree("adapters/b")
    ((word, outcome),) = found
    assert (word, isinstance(outcome, LoraSBError)) == ("b", True)
    assert [line["name"] for line in lines_of("said.jsonl")] == ["a"]


def test_a_file_that_is_there_is_kept(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasb_export.project.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    Path("said.jsonl").write_text("mine")
    done = lorasb("evaluate", "--predictions", "said.jsonl")
    assert "the file exists (said.jsonl). Choose another path, or pass --overwrite" in done.stderr
    assert Path("said.jsonl").read_text() == "mine"
    Path("folder").mkdir()
    for words in ([], ["--overwrite"]):
        told = lorasb("evaluate", "--predictions", "folder", *words).stderr
        assert "the file exists (folder). Choose another path\n" in told
    Path("folder/test.jsonl").write_text(GOOD)
    Path("folder/train.jsonl").write_text(GOOD)
    for data in ("folder", "folder/test.jsonl"):
        words = ["--data", data, "--predictions", "folder/test.jsonl", "--overwrite"]
        assert "these are the rows to be scored (folder/test.jsonl)" in lorasb("evaluate", "a", *words).stderr
    assert Path("folder/test.jsonl").read_text() == GOOD
    assert "--overwrite is for the file of --predictions" in lorasb("evaluate", "--overwrite").output


def test_a_file_without_a_line_is_not_left_behind(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lorasb_export.project.evaluate.evaluate", Mock(side_effect=MemoryError))
        assert "Try a smaller --batch-size" in lorasb("evaluate", "--predictions", "said.jsonl").stderr
    assert not Path("said.jsonl").exists()
    for words in (["--limit", "1"], ["--limit", "2", "--overwrite"]):
        assert lorasb("evaluate", "--predictions", "said.jsonl", *words).exit_code == 0
    assert len(lines_of("said.jsonl")) == 2
    with monkeypatch.context() as patch:
        patch.setattr("lorasb_export.project.evaluate.evaluate", Mock(side_effect=MemoryError))
        assert lorasb("evaluate", "--predictions", "said.jsonl", "--overwrite").exit_code == 1
    assert len(lines_of("said.jsonl")) == 2


def test_where_nothing_would_be_predicted(adapter: Adapter, sums: Path) -> None:
    done = lorasb("evaluate", "a", "--metric", "loss", "--predictions", "said.jsonl")
    assert "the metric loss predicts nothing" in done.stderr
    assert (
        "the metric loss predicts nothing" in lorasb(*"evaluate --metric loss --predictions said.jsonl".split()).stderr
    )
    with Path("lorasb.toml").open("a") as file:
        file.write("[tasks.b]\ndata = 'text.jsonl'\nhold_out = 0.5\n")
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"{i}+1"}) + "\n" for i in range(9)))
    adapter.training = {}
    adapter.save("adapters/b")
    done = lorasb("evaluate", "--limit", "1", "--predictions", "all.jsonl")
    assert (done.exit_code, [line["name"] for line in lines_of("all.jsonl")]) == (0, ["a"])
    done = lorasb("evaluate", "--resume", "--predictions", "said.jsonl")
    assert "--resume takes figures from the cards, where no predictions are" in done.stderr
    assert not Path("said.jsonl").exists()


def test_the_size_of_a_batch_takes_memory_alone(
    adapter: Adapter, sums: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(adapter, sums, limit=5, predictions=True)
    seen: list[int] = []
    generate = type(BaseModel.resolve(adapter.base.resolve(None).folder).load()).generate

    def counted(self: Any, ids: Any, **options: Any) -> Any:
        seen.append(len(ids))
        return generate(self, ids, **options)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", counted)
    assert evaluate(adapter, sums, limit=5, batch_size=2, predictions=True) == expected
    assert seen == 2 * [2, 2, 1]
    with pytest.raises(SettingsError, match=r"batch_size is 0\. Give at least 1"):
        evaluate(adapter, sums, batch_size=0)


def test_the_base_is_asked_once_what_several_adapters_are_asked(
    adapter: Adapter, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.R = {name: -R for name, R in adapter.R.items()}
    adapter.save("adapters/b")
    single = {name: evaluate(f"adapters/{name}", sums, limit=3, predictions=True) for name in "ab"}
    asked: list[int] = []

    def counted(network: Any, tokenizer: Any, ids: list[Any], *arguments: Any, **options: Any) -> list[str]:
        asked.append(len(ids))
        return answers_of_ids(network, tokenizer, ids, *arguments, **options)

    monkeypatch.setattr("lorasb_export.evaluation.evaluate.answers_of_ids", counted)
    done = lorasb("evaluate", "a", "b", "--data", str(sums), "--limit", "3", "--predictions", "said.jsonl")
    assert done.exit_code == 0, done.stderr
    assert asked == [3, 3, 3]
    for name, found in single.items():
        said = [line for line in lines_of("said.jsonl") if line["name"] == name]
        assert [(one["base"], one["adapter"]) for one in said] == [
            (one["base"], one["adapter"]) for one in found["predictions"]
        ]


def test_what_the_base_has_said_is_taken_for_the_same_question_alone(adapter: Adapter, sums: Path) -> None:
    said: dict[Any, Any] = {}
    for asked in (
        {"metric": "loss", "limit": 2},
        {"metric": "loss", "limit": 3},
        {"metric": "loss", "limit": 3, "split": "valid"},
        {"metric": "exact_match", "limit": 3, "split": "valid"},
    ):
        assert evaluate(adapter, sums, **asked, said_by_base=said) == evaluate(adapter, sums, **asked), asked


def test_what_the_base_has_said_of_other_rows_or_of_longer_ones_is_not_taken(
    adapter: Adapter, sums: Path, products: Path
) -> None:
    said: dict[Any, Any] = {}
    for data, max_length in ((sums, 512), (products, 512), (products, 8)):
        adapter.training = {"settings": {"max_length": max_length}}
        asked: dict[str, Any] = {"split": "train", "limit": 4, "metric": "loss"}
        expected = evaluate(adapter, data, **asked)
        assert evaluate(adapter, data, **asked, said_by_base=said) == expected, (data, max_length)


def test_the_rows_that_are_scored_are_not_written_over_by_whatever_name(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands `~` behind `--data=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(GOOD)
    done = lorasb("evaluate", "a", "--data=~/rows.jsonl", "--predictions=~/rows.jsonl", "--overwrite")
    assert "these are the rows to be scored" in done.stderr
    assert (tmp_path / "rows.jsonl").read_text() == GOOD
