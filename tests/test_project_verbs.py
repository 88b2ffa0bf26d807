"""Verbs in a project folder: which rows, which figures, which base they take."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lorasb_export import Adapter, Basis, calibrate, evaluate, load_task
from lorasb_export.base.model import BaseModel
from lorasb_export.data.source import TaskSource
from lorasb_export.data.task import TaskData
from lorasb_export.errors import DataError, LoraSBError
from lorasb_export.exporting import onnx
from lorasb_export.project import evaluate as module
from lorasb_export.project.evaluate import evaluate_adapters
from lorasb_export.project.project import Project
from lorasb_export.settings import CalibrationSettings
from tests import project_of_a
from tests.artifacts import forbid
from tests.conftest import lorasb

project = project_of_a.project


def test_adapters_are_scored_on_one_base_and_share_their_basis(
    project: Path, llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lorasb_export")
    Adapter.load("adapters/a").load_basis().save("basis")
    other = calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random", targets="q_proj"))
    for name, basis in (("a", Basis.load("basis")), ("b", Basis.load("basis")), ("c", other)):
        adapter = Adapter.fresh(basis)
        adapter.training = {"task": name, "data": str(sums)}
        adapter.save(f"adapters/{name}", overwrite=True)
    base, read = Mock(wraps=BaseModel.load), Mock(wraps=Basis.load)
    monkeypatch.setattr(BaseModel, "load", lambda *words, **named: base(*words, **named))
    monkeypatch.setattr(Basis, "load", read)
    done = lorasb("evaluate", "--metric", "loss", "--limit", "1", "--data", str(sums), "--json")
    assert list(json.loads(done.stdout)["evaluation"]) == ["a", "b", "c"]
    assert (base.call_count, read.call_count) == (1, 2)
    turns = [message.partition(",")[0] for message in caplog.messages if " of 3: " in message]
    assert turns == ["1 of 3: a", "2 of 3: b", "3 of 3: c"]


def test_a_renamed_task_has_the_rows_of_its_table(project: Path, sums: Path) -> None:
    row = (sums / "test.jsonl").read_text().splitlines()[0]
    (project / "few").mkdir()
    for split in ("train", "test"):
        (project / "few" / f"{split}.jsonl").write_text(row)
    file = project / "lorasb.toml"
    file.write_text(file.read_text().replace(f'[tasks.a]\ndata = "{sums}"', '[tasks.b]\ndata = "few"'))
    Path("adapters/a").rename("adapters/b")
    for word in ("b", "adapters/b"):
        done = lorasb("evaluate", word, "--metric", "loss", "--json")
        result = json.loads(done.stdout)["evaluation"][word]
        assert (result["task"], result["rows"]) == ("b", 1)
    shutil.copytree("adapters/b", "elsewhere/b")  # not the project's: it is of the task that it says
    done = lorasb("evaluate", "elsewhere/b", "--metric", "loss", "--json")
    assert json.loads(done.stdout)["evaluation"]["elsewhere/b"]["rows"] == 24


def test_files_of_tensorboard_beside_candidates_are_none_of_them(project: Path, sums: Path) -> None:
    """A shell writes out `candidates/*`, all of it."""
    shutil.copytree("adapters/a", "candidates/a")
    Path("candidates/runs/a").mkdir(parents=True)
    done = lorasb("evaluate", "candidates/a", "candidates/runs", "--metric", "loss", "--json")
    assert list(json.loads(done.stdout)["evaluation"]) == ["candidates/a"]


def test_a_task_without_a_name_is_called_as_its_adapter(project: Path, sums: Path) -> None:
    adapter = Adapter.load("adapters/a")
    adapter.training = {"task": None, "data": str(sums)}
    adapter.save("mine")
    result = json.loads(lorasb("evaluate", "./mine", "--metric", "loss", "--json").stdout)["evaluation"]["./mine"]
    assert (result["task"], result["rows"]) == ("mine", 24)


def test_what_a_push_leaves_of_a_path_is_not_taken_for_data(project: Path, sums: Path) -> None:
    """Outside of a project: neither a folder of that name that happens to lie here, nor the Hub's dataset."""
    (project / "lorasb.toml").unlink()
    adapter = Adapter.load("adapters/a")
    adapter.training = {"task": "a", "data": sums.name}
    adapter.save("adapters/a", overwrite=True)
    shutil.copytree(sums, sums.name)
    done = lorasb("evaluate", "adapters/a", "--metric", "loss")
    assert (done.exit_code, "does not say what it was trained on (adapters/a). Pass --data" in done.stderr) == (1, True)
    assert lorasb("evaluate", "adapters/a", "--metric", "loss", "--data", sums.name).exit_code == 0


def test_a_task_without_held_out_rows_leaves_the_others_their_figures(
    project: Path, sums: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree("adapters/a", "adapters/b")
    with (project / "lorasb.toml").open("a") as file:
        file.write(f'[tasks.b]\ndata = "{sums}/train.jsonl"\n')
    done = lorasb("evaluate", "--metric", "loss", "--json")
    assert list(json.loads(done.stdout)["evaluation"]) == ["a"]
    assert f"b is passed over: its task has no held-out rows ({sums}/train.jsonl)" in caplog.text
    shutil.rmtree("adapters/a")
    assert "no adapter has rows to be scored on. Add valid.jsonl" in lorasb("evaluate").stderr


def test_a_task_that_cannot_be_scored_is_named_before_any_is(
    project: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasb_export.project.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    shutil.copytree("adapters/a", "adapters/b")
    (project / "only-train").mkdir()
    shutil.copyfile(sums / "train.jsonl", "only-train/train.jsonl")
    (project / "text").mkdir()
    for split in ("train", "valid"):
        (project / "text" / f"{split}.jsonl").write_text('{"text": "2+2=4"}\n')
    with (project / "lorasb.toml").open("a") as file:
        file.write('[tasks.b]\ndata = "text"\n')
    for words, error in (
        (("a", "b", "--split", "test"), "task b has no test rows"),
        (("--metric", "exact_match"), "metric 'exact_match' does not fit text rows"),
        (("--data", "only-train"), "has no valid rows"),
    ):
        done = lorasb("evaluate", *words)
        assert (done.exit_code, error in done.stderr) == (1, True), done.stderr


def test_all_that_cannot_be_scored_is_told_at_once(project: Path) -> None:
    for name in ("b", "c"):
        shutil.copytree("adapters/a", f"adapters/{name}")
    Path("adapters/b/adapter.safetensors").write_bytes(b"")
    Path("bad.jsonl").write_text("{")
    with (project / "lorasb.toml").open("a") as file:
        file.write('[tasks.c]\ndata = "bad.jsonl"\n')
    done = lorasb("evaluate", "a", "b", "c", "--metric", "loss")
    assert done.exit_code == 1
    assert "2 problems, nothing was scored:" in done.stderr
    assert "adapters/b" in done.stderr
    assert "bad.jsonl:1" in done.stderr


def test_a_base_that_is_gone_is_named_before_any_adapter_is_scored(
    project: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasb_export.project.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    moved = replace(Adapter.load("adapters/a").base, name_or_path=str(project / "gone"))
    adapter = replace(Adapter.load("adapters/a"), base=moved)
    adapter.basis = replace(adapter.load_basis(), base=moved)
    adapter.save("adapters/b", embed=True)
    (project / "lorasb.toml").unlink()
    done = lorasb("evaluate", "a", "b", "--metric", "loss")
    assert (done.exit_code, "the base model that this was made for is not there" in done.stderr) == (1, True)


def test_a_score_that_is_not_finite_is_an_error(project: Path, sums: Path) -> None:
    adapter = Adapter.load("adapters/a")
    for R in adapter.R.values():
        R += 1e38
    with pytest.raises(DataError, match=r"the loss is not finite \(.*\)\. Score in another dtype"):
        evaluate(adapter, sums, metric="loss", limit=2)


def test_an_adapter_that_is_removed_before_its_turn_leaves_the_others_theirs(project: Path) -> None:
    for name in ("b", "c"):
        shutil.copytree("adapters/a", f"adapters/{name}")
    words = {name: f"adapters/{name}" for name in ("a", "b", "c")}
    found = evaluate_adapters(Project.load(), words, metric="loss", limit=1)
    first = next(found)
    shutil.rmtree("adapters/b")
    of = dict([first, *found])
    assert [isinstance(outcome, LoraSBError) for outcome in of.values()] == [False, True, False]


def test_an_adapter_that_cannot_be_scored_leaves_the_others_their_turn(project: Path) -> None:
    """Once it is its turn: its row is too long."""
    shutil.copytree("adapters/a", "adapters/b")
    Path("long.jsonl").write_text(json.dumps({"prompt": "1" * 600, "completion": "2"}))
    with (project / "lorasb.toml").open("a") as file:
        file.write('[tasks.b]\ndata = "long.jsonl"\n')
    done = lorasb("evaluate", "b", "a", "--split", "train", "--metric", "loss", "--json")
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed["evaluation"]), list(printed["failed"])) == (1, ["a"], ["b"])
    assert "1 failed:\n  1. b: " in done.stderr


@pytest.fixture
def among_others(project: Path) -> Path:
    """The adapter a beside two that are damaged, and a folder of PEFT's."""
    for name in ("broken", "torn"):
        shutil.copytree("adapters/a", f"adapters/{name}")
    Path("adapters/torn/adapter.safetensors").write_bytes(b"{")
    Path("adapters/broken/adapter_config.json").write_text("{")
    Path("adapters/peft").mkdir()
    Path("adapters/peft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    return project


@pytest.mark.parametrize("words", [("evaluate", "--metric", "loss", "--limit", "1"), ("generate", "1+1=")])
def test_where_all_are_taken_a_damaged_one_leaves_the_others_their_turn(
    words: tuple[str, ...], among_others: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = lorasb(*words, "--json")
    printed = json.loads(done.stdout)
    found = printed.get("evaluation") or printed["answers"]
    assert (done.exit_code, sorted(found.keys() - {"base"}), sorted(printed["failed"])) == (
        1,
        ["a"],
        ["broken", "torn"],
    )
    assert "peft is no LoRA-SB adapter" in caplog.text
    assert "2 failed:\n  1. broken: " in done.stderr
    shutil.rmtree("adapters/a")
    assert lorasb(*words).exit_code == 1
    shutil.rmtree("adapters/torn")
    alone = json.loads(lorasb(*words, "--json").stdout)
    assert (list(alone), alone["error"]["type"]) == (["error"], "ArtifactError")


def test_where_all_are_taken_the_data_of_one_leaves_the_others_their_turn(
    project: Path, sums: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """c has a row that was cut; b has left lorasb.toml, and its data the disk."""
    adapter = Adapter.load("adapters/a")
    adapter.training = {"task": "b", "data": str(project / "gone")}
    adapter.save("adapters/b")
    shutil.copytree("adapters/a", "adapters/c")
    Path("bad.jsonl").write_text((sums / "test.jsonl").read_text() + '{"prompt": "1+1=", "comple')
    with (project / "lorasb.toml").open("a") as file:
        file.write('[tasks.c]\ndata = "bad.jsonl"\n')
    words = ("evaluate", "--metric", "loss", "--limit", "1")
    done = lorasb(*words, "--json")
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed["evaluation"]), list(printed["failed"])) == (1, ["a"], ["b", "c"])
    assert {failed["type"] for failed in printed["failed"].values()} == {"DataError"}
    assert "b is left out: " in caplog.text
    assert "2. c: " in done.stderr
    named = lorasb(*words, "a", "c")
    assert (named.exit_code, named.stdout, "bad.jsonl:" in named.stderr) == (1, "", True)
    of_all = lorasb(*words, "--data", "bad.jsonl", "--json")  # whose fault is none of theirs
    assert list(json.loads(of_all.stdout)) == ["error"]


def test_where_all_are_taken_what_may_not_be_read_leaves_the_others_their_turn(
    project: Path, llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter b, the data of c and the basis of d are another user's."""
    calibrate(str(llama), {}, CalibrationSettings(rank=2, directions="random")).save("hidden/basis")
    adapter = Adapter.fresh(Basis.load("hidden/basis"))
    adapter.training = {"task": "a", "data": str(sums)}
    adapter.save("adapters/d")
    shutil.copytree(sums, "hidden/rows")
    for name in "bc":
        shutil.copytree("adapters/a", f"adapters/{name}")
    with (project / "lorasb.toml").open("a") as file:
        file.write('[tasks.c]\ndata = "hidden/rows"\n')
    for folder in ("adapters/b", "hidden"):
        forbid(project / folder, monkeypatch)
    printed = json.loads(lorasb("evaluate", "--metric", "loss", "--limit", "1", "--json").stdout)
    assert (list(printed["evaluation"]), sorted(printed["failed"])) == (["a"], ["b", "c", "d"]), printed
    assert all("cannot be read: Permission denied" in one["message"] for one in printed["failed"].values())


def test_data_that_all_lack_is_told_of_ten_and_not_looked_for_in_the_others(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a disk that is not mounted: the others would each be waited for."""
    looked_for: list[str] = []

    def watched(name: str, source: TaskSource) -> TaskData:
        looked_for.append(name)
        return load_task(name, source)

    monkeypatch.setattr(module, "load_task", watched)
    adapter = Adapter.load(Path("adapters/a").rename("elsewhere"))
    names = [f"t{number:02}" for number in range(14)]
    for name in names:
        adapter.training = {"task": name, "data": str(project / "gone" / name)}
        adapter.save(f"adapters/{name}")
    Path("adapters/t00/adapter.safetensors").write_bytes(b"{")  # is another matter
    tasks, file = "".join(f'[tasks.{name}]\ndata = "./gone/{name}"\n' for name in names), Path("lorasb.toml")
    before = file.read_text()
    file.write_text(before + tasks)
    done = lorasb("evaluate", "--metric", "loss")
    assert (done.exit_code, done.stdout, looked_for) == (1, "", names[1:11])
    assert "11 problems, nothing was scored:\n  1. " in done.stderr
    assert all(f"gone/{name}" in done.stderr for name in looked_for[:9])
    assert "and 1 more" in done.stderr
    assert "left out" not in caplog.text  # the others are not scored
    file.write_text(before)  # of tasks that are gone: the rows of those that stay may be there
    gone = json.loads(lorasb("evaluate", "--metric", "loss", "--json").stdout)
    assert (list(gone), list(gone["failed"])) == (["evaluation", "failed"], names)
    file.write_text(before + tasks)
    for name in names[9:]:
        shutil.rmtree(f"adapters/{name}")
    nine = json.loads(lorasb("evaluate", "--metric", "loss", "--json").stdout)
    assert (list(nine), list(nine["failed"])) == (["evaluation", "failed"], names[:9])


def test_who_is_named_has_to_be_good(among_others: Path) -> None:
    for name, what in (("peft", "peft_type is 'LORA'"), ("broken", "unreadable JSON")):
        for words in (("evaluate", "a", name, "--metric", "loss"), ("generate", "1+1=", "--adapters", f"a,{name}")):
            done = lorasb(*words)
            assert (done.exit_code, done.stdout, what in done.stderr) == (1, "", True), done.stderr


def test_a_merge_that_names_none_passes_over_the_adapter_of_another_tool(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it lies where that of the first task would."""
    Path("adapters/a").rename("adapters/b")
    Path("adapters/a").mkdir()
    Path("adapters/a/adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = lorasb("merge", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "a is no LoRA-SB adapter" in caplog.text
    shutil.rmtree("adapters/b")
    assert "no adapter in this project" in lorasb("merge", "--dry-run").stderr


def test_a_basis_is_replaced_beside_the_adapter_of_another_tool(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a damaged one it is not: that may need the basis."""
    shutil.rmtree("adapters/a")
    Path("adapters/peft").mkdir()
    Path("adapters/peft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for _ in range(2):
        done = lorasb("calibrate", "--rank", "4", "--directions", "random", "--overwrite")
        assert done.exit_code == 0, done.stderr
    assert "peft is no LoRA-SB adapter" in caplog.text
    Path("adapters/peft/adapter_config.json").write_text("{")
    assert lorasb("calibrate", "--rank", "4", "--directions", "random", "--overwrite").exit_code == 1


def test_a_base_that_has_moved_is_the_projects(
    project: Path, llama: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []
    monkeypatch.setattr(onnx, "export_onnx", lambda *_, base, **__: exported.append(base) or {"bytes": 0})
    adapter = Adapter.load("adapters/a")
    adapter.base = replace(adapter.base, name_or_path="/gone/llama")
    adapter.save("adapters/a", overwrite=True)
    for words in (
        ("merge", "a", "--out", "model"),
        ("export", "a", "--format", "onnx"),
        ("evaluate", "a", "--metric", "loss"),
        ("generate", "1+1=", "--max-tokens", "2"),
        ("serve", "--adapters", "a", "--dry-run"),
    ):
        done = lorasb(*words)
        assert done.exit_code == 0, done.stderr
    assert exported == [str(llama)]
    file = project / "lorasb.toml"
    file.write_text(file.read_text().replace(str(llama), str(bert)))  # not what it was trained on
    assert lorasb("merge", "a", "--out", "other").exit_code == 1
    for line in ("", 'model = "gone"', 'model = "models/gone"'):
        file.write_text(f"{line}\n")
        stderr = lorasb("merge", "a", "--out", "other").stderr
        assert "is not there (/gone/llama). Put it back, or say with --model where it is now" in stderr


def test_a_lora_is_exported_without_its_base(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasb_export.base.model.snapshot", None)  # that would fetch it
    adapter = Adapter.load("adapters/a")
    adapter.base = replace(adapter.base, name_or_path="owner/model")
    adapter.save("adapters/a", overwrite=True)
    assert lorasb("export", "a", "--out", "peft").exit_code == 0


def test_what_needs_no_base_is_made_without_one(project: Path, llama: Path) -> None:
    adapter = Adapter.load("adapters/a")
    gone = project.resolve() / "gone"
    adapter.base = replace(adapter.base, name_or_path=str(gone))
    adapter.save("adapters/a", overwrite=True)
    file = project / "lorasb.toml"
    file.write_text(file.read_text().replace(str(llama), "gone"))
    assert lorasb("export", "a", "--out", "peft").exit_code == 0
    assert f"is not there ({gone}). Put it back, or say with --model" in lorasb("merge", "a").stderr


def test_figures_of_rows_that_were_trained_on_do_not_go_into_the_card(
    project: Path, sums: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not of rows that are divided anew; but of rows that are added as a split of their own, and of the same ones."""
    shutil.copytree(sums, "data")
    (project / "data/test.jsonl").unlink()
    file = project / "lorasb.toml"
    file.write_text(file.read_text().replace(str(sums), "data"))
    adapter, task = Adapter.load("adapters/a"), load_task("a", project / "data")
    splits = {split: task.split_sha256(split) for split in task.splits}
    adapter.training = {"task": "a", "splits_sha256": splits}
    adapter.save("adapters/a", overwrite=True)

    def in_card() -> dict[str, Any]:
        done = lorasb("evaluate", "--metric", "loss", "--json")
        found = dict(Adapter.load("adapters/a").training.get("evaluation", {}))
        assert json.loads(done.stdout)["evaluation"]["a"]["recorded"] == bool(found)
        return found

    rows = (project / "data/valid.jsonl").read_text()
    (project / "data/valid.jsonl").write_text(rows + (project / "data/train.jsonl").read_text().splitlines()[0] + "\n")
    (project / "data/train.jsonl").write_text(rows)
    assert in_card() == {}
    assert "a: `fit` did not have these rows, and some valid rows may have been trained on" in caplog.text
    (project / "data/valid.jsonl").write_text(rows)
    assert list(in_card()) == ["valid"]
    shutil.copy(sums / "train.jsonl", "data/train.jsonl")
    shutil.copy(sums / "test.jsonl", "data/test.jsonl")
    assert list(in_card()) == ["test", "valid"]
