"""Verbs in a project folder: which rows, which figures, which base they take."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lorasb_export import Adapter, Basis, calibrate, evaluate, project_evaluate
from lorasb_export.base import BaseModel
from lorasb_export.data import load_task
from lorasb_export.errors import ArtifactError, DataError, LoraSBError
from lorasb_export.evaluation import record_evaluation
from lorasb_export.exporting import onnx
from lorasb_export.format import sealed
from lorasb_export.lock import only_writer
from lorasb_export.project import Project
from lorasb_export.project_evaluate import evaluate_adapters
from lorasb_export.settings import CalibrationSettings
from tests.conftest import lorasb


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a project of the task a with its adapter, which is as training starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasb.toml").write_text(f'model = "{llama}"\n[tasks.a]\ndata = "{sums}"\n')
    adapter = Adapter.start(calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random")))
    adapter.training = {"task": "a", "data": str(sums)}
    adapter.save("adapters/a")
    return tmp_path


def test_figures_of_a_few_or_other_rows_stay_out_of_the_card(project: Path, sums: Path) -> None:
    files = [Path("adapters/a", name) for name in ("adapter_config.json", "README.md")]
    before = [file.read_bytes() for file in files]
    for rows in (["--limit", "1"], ["--data", str(sums)], ["--split", "train"]):
        assert lorasb("evaluate", "a", "--metric", "loss", *rows).exit_code == 0
        assert [file.read_bytes() for file in files] == before
    assert lorasb("evaluate", "a", "--metric", "loss").exit_code == 0
    assert Adapter.load("adapters/a").training["evaluation"]["test"]["loss"]["rows"] == 24


def test_figures_beside_a_base_in_four_bits_stay_out_of_the_card(project: Path) -> None:
    assert lorasb("evaluate", "a", "--metric", "loss", "--dtype", "nf4").exit_code == 0
    assert "evaluation" not in Adapter.load("adapters/a").training


def test_an_interrupted_evaluation_goes_on_where_it_was(project: Path, sums: Path) -> None:
    shutil.copytree("adapters/a", "adapters/b")
    in_card = {"base": 1.5, "adapter": 0.25, "rows": 24}

    def resumed(data_sha256: str) -> dict[str, Any]:
        figures = {"split": "test", "metric": "loss", **in_card, "data_sha256": data_sha256}
        record_evaluation(Adapter.load("adapters/a"), figures)
        done = lorasb("evaluate", "--metric", "loss", "--resume", "--json")
        found: dict[str, Any] = json.loads(done.stdout)["evaluation"]
        return found

    found = resumed(load_task("a", sums).sha256)
    assert found["a"] == {"task": "a", "split": "test", "metric": "loss", **in_card}
    assert found["b"]["adapter"] == pytest.approx(found["b"]["base"])  # it is as training starts
    assert resumed("of other data")["a"]["base"] == found["b"]["base"]
    assert lorasb("evaluate", "--metric", "loss", "--resume").exit_code == 0  # nothing is left

    refused = lorasb("evaluate", "--resume", "--limit", "3")
    assert "--resume takes figures from the cards" in refused.output


def test_adapters_are_scored_on_one_base_and_share_their_basis(
    project: Path, llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    other = calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random", targets="q_proj"))
    for name, basis in (("a", Basis.load("basis")), ("b", Basis.load("basis")), ("c", other)):
        adapter = Adapter.start(basis)
        adapter.training = {"task": name, "data": str(sums)}
        adapter.save(f"adapters/{name}", overwrite=True)
    base, read = Mock(wraps=BaseModel.load), Mock(wraps=Basis.load)
    monkeypatch.setattr(BaseModel, "load", lambda *words, **named: base(*words, **named))
    monkeypatch.setattr(Basis, "load", read)
    done = lorasb("evaluate", "--metric", "loss", "--limit", "1", "--data", str(sums), "--json")
    assert list(json.loads(done.stdout)["evaluation"]) == ["a", "b", "c"]
    assert (base.call_count, read.call_count) == (1, 2)


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
    monkeypatch.setattr("lorasb_export.project_evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
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
    done = lorasb("evaluate", "--metric", "loss")
    assert done.exit_code == 1
    assert "2 problems, nothing was scored:" in done.stderr
    assert "adapters/b" in done.stderr
    assert "bad.jsonl:1" in done.stderr


def test_a_base_that_is_gone_is_named_before_any_adapter_is_scored(
    project: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasb_export.project_evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    moved = replace(Adapter.load("adapters/a").base, name_or_path=str(project / "gone"))
    adapter = replace(Adapter.load("adapters/a"), base=moved)
    adapter.basis = replace(adapter.load_basis(), base=moved)
    adapter.save("adapters/b", embed=True)
    (project / "lorasb.toml").unlink()
    done = lorasb("evaluate", "a", "b", "--metric", "loss")
    assert (done.exit_code, "the base model that this was made for is not there" in done.stderr) == (1, True)


def test_figures_of_a_replaced_adapter_are_not_those_of_the_new_one(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = project_evaluate.evaluate

    def slow(adapter: Adapter, *words: Any, **options: Any) -> dict[str, Any]:
        found = scored(adapter, *words, **options)
        for R in adapter.R.values():
            R += 1
        adapter.save("adapters/a", overwrite=True)  # as `fit --overwrite` does meanwhile
        for R in adapter.R.values():
            R -= 1
        return found

    monkeypatch.setattr(project_evaluate, "evaluate", slow)
    assert lorasb("evaluate", "a", "--metric", "loss").exit_code == 0
    assert "was replaced while it was scored" in caplog.text
    assert "evaluation" not in Adapter.load("adapters/a").training


def test_two_evaluations_at_once_keep_both_figures(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One ends while the other writes."""
    config = Path("adapters/a/adapter_config.json")
    adapter = Adapter.load("adapters/a")
    result = {"split": "test", "metric": "loss", "rows": 24, "base": 3.0, "adapter": 1.0}
    with ThreadPoolExecutor(1) as other:
        with only_writer(config):
            recorded = other.submit(record_evaluation, adapter, result)
            while "waiting for it" not in caplog.text:
                time.sleep(0.01)
            content = json.loads(config.read_text())
            content["training"]["evaluation"] = {"valid": {"loss": {"rows": 12, "base": 3.0, "adapter": 2.0}}}
            config.write_text(json.dumps(sealed(content)))
        recorded.result(timeout=30)
    assert sorted(Adapter.load("adapters/a").training["evaluation"]) == ["test", "valid"]
    assert sorted(path.name for path in config.parent.glob(".*")) == []


def test_figures_of_a_removed_adapter_make_no_folder(project: Path) -> None:
    adapter = Adapter.load("adapters/a")
    shutil.rmtree("adapters/a")
    with pytest.raises(ArtifactError, match="was removed while it was scored"):
        record_evaluation(adapter, {"split": "test", "metric": "loss", "rows": 24, "base": 3.0, "adapter": 1.0})
    assert not Path("adapters/a").exists()


def test_an_adapter_called_blobs_is_none_of_the_hubs_cache(project: Path) -> None:
    shutil.move("adapters/a", "adapters/blobs")
    assert lorasb("evaluate", "blobs", "--metric", "loss").exit_code == 0
    assert "test" in Adapter.load("adapters/blobs").training["evaluation"]


def test_a_folder_of_the_hubs_cache_stays_as_it_is(project: Path) -> None:
    """There files are links to blobs."""
    snapshot, blobs = Path("cache/snapshots/1"), Path("cache/blobs")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in Path("adapters/a").iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert lorasb("evaluate", str(snapshot), "--metric", "loss").exit_code == 0
    assert (snapshot / "adapter_config.json").is_symlink()
    assert (blobs / "adapter_config.json").read_bytes() == Path("adapters/a/adapter_config.json").read_bytes()


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
    monkeypatch.setattr("lorasb_export.base.snapshot", None)  # that would fetch it
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
