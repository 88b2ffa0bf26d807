"""Which figures of an evaluation go into an adapter's card."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import Adapter
from lorasb_export.data.task import load_task
from lorasb_export.errors import ArtifactError
from lorasb_export.evaluation.record import record_evaluation
from lorasb_export.files.lock import only_writer
from lorasb_export.format import sealed
from lorasb_export.project import evaluate as project_evaluate
from tests import project_of_a
from tests.conftest import lorasb

project = project_of_a.project


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
        figures = {"split": "test", "metric": "loss", **in_card, "data_sha256": data_sha256, "dtype": "auto"}
        record_evaluation(Adapter.load("adapters/a"), figures)
        done = lorasb("evaluate", "--metric", "loss", "--resume", "--json")
        found: dict[str, Any] = json.loads(done.stdout)["evaluation"]
        return found

    found = resumed(load_task("a", sums).sha256)
    assert found["a"] == {"task": "a", "split": "test", "metric": "loss", "recorded": True, **in_card}
    assert found["b"]["adapter"] == pytest.approx(found["b"]["base"])  # it is as training starts
    assert resumed("of other data")["a"]["base"] == found["b"]["base"]
    assert lorasb("evaluate", "--metric", "loss", "--resume").exit_code == 0  # nothing is left

    how = {"data_sha256": load_task("b", sums).sha256, "dtype": "bfloat16"}
    record_evaluation(Adapter.load("adapters/b"), {"split": "test", "metric": "loss", **in_card, **how})
    for dtype, base in (("bfloat16", 1.5), ("float64", found["b"]["base"])):  # figures in another dtype are others
        done = lorasb("evaluate", "b", "--metric", "loss", "--dtype", dtype, "--resume", "--json")
        assert json.loads(done.stdout)["evaluation"]["b"]["base"] == pytest.approx(base, rel=1e-2)
    assert Adapter.load("adapters/b").training["evaluation"]["test"]["loss"]["dtype"] == "float64"

    refused = lorasb("evaluate", "--resume", "--limit", "3")
    assert "--resume takes figures from the cards" in refused.output


def test_figures_of_other_rows_go_when_there_are_some_of_these(project: Path) -> None:
    def recorded(**figure: Any) -> set[str]:
        record_evaluation(Adapter.load("adapters/a"), {"base": 0.3, "adapter": 0.6, "rows": 24, **figure})
        return set(Adapter.load("adapters/a").training["evaluation"][figure["split"]])

    assert recorded(split="test", metric="loss") == {"loss"}  # of rows that nobody knows
    assert recorded(split="test", metric="accuracy", split_sha256="old") == {"loss", "accuracy"}
    assert recorded(split="valid", metric="accuracy", split_sha256="old") == {"accuracy"}
    assert recorded(split="test", metric="f1", split_sha256="old") == {"loss", "accuracy", "f1"}
    assert recorded(split="test", metric="mcc", split_sha256="new") == {"loss", "mcc"}
    assert set(Adapter.load("adapters/a").training["evaluation"]["valid"]) == {"accuracy"}
    assert recorded(split="test", metric="f1") == {"loss", "mcc", "f1"}


def test_losses_of_rows_cut_at_other_lengths_are_told_of(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree("adapters/a", "adapters/b")
    adapter = Adapter.load("adapters/b")
    adapter.training = {**adapter.training, "settings": {**adapter.training.get("settings", {}), "max_length": 64}}
    adapter.save("adapters/b", overwrite=True)
    for words, metric, told in ((["a", "b"], "loss", True), (["a"], "loss", False), (["a", "b"], "exact_match", False)):
        caplog.clear()
        assert lorasb("evaluate", *words, "--metric", metric).exit_code == 0
        assert ("longer than one of the cuts: b at 64 tokens; a at 512 tokens" in caplog.text) == told


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
