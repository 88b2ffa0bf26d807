"""Training that goes on from an adapter (`fit --start-from`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_export import Adapter, Basis, calibrate, fit, fit_together
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.errors import ArtifactError, DataError, SettingsError, TrainingError
from lorasb_export.settings import CalibrationSettings
from lorasb_export.training.trainer import RTrainer
from tests.conftest import lorasb
from tests.rows import CLASS, task_of
from tests.training import SETTINGS, basis, equal

__all__ = ["basis"]  # a fixture
STILL = replace(SETTINGS, learning_rate=1e-30, head_learning_rate=1e-30, epochs=1)  # R and head end as they start


@pytest.fixture(scope="module")
def first(llama: Path, sums: Path, basis: Path) -> Adapter:
    return fit(str(llama), basis, sums, basis.parent / "first", SETTINGS)


def tensors_equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(tensor.float(), two[name].float()) for name, tensor in one.items()
    )


def test_r_starts_as_that_of_the_adapter(
    first: Adapter, llama: Path, products: Path, basis: Path, tmp_path: Path
) -> None:
    unmoved = fit(str(llama), basis, products, tmp_path / "b", STILL, start=first)
    assert tensors_equal(unmoved.R, first.R)
    assert unmoved.training["start"] == f"first, sha256 {first.sha256[:12]}"
    assert not equal(fit(str(llama), basis, products, tmp_path / "c", STILL), first, 1e-3)
    trained = fit(str(llama), basis, products, tmp_path / "d", SETTINGS, start=first)
    assert not equal(trained, first, 1e-3)


def test_several_tasks_at_once_all_start_there(
    first: Adapter, llama: Path, sums: Path, products: Path, basis: Path, tmp_path: Path
) -> None:
    tasks = {"b": sums, "c": products}
    for adapter in fit_together(str(llama), basis, tasks, tmp_path, STILL, start=first):
        assert tensors_equal(adapter.R, first.R)


def test_the_start_is_kept_where_no_step_is_better(
    first: Adapter, llama: Path, sums: Path, products: Path, basis: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    wild = replace(SETTINGS, learning_rate=10.0, epochs=1)
    same = fit(str(llama), basis, sums, tmp_path / "a", wild, start=first)
    assert same.training["best_step"] == 0
    assert tensors_equal(same.R, first.R)
    assert "a: no step was better than the adapter to start from, whose R it keeps" in log.text
    for adapter in fit_together(str(llama), basis, {"b": sums, "c": sums}, tmp_path, wild, start=first):
        assert tensors_equal(adapter.R, first.R)
    last = fit(str(llama), basis, sums, tmp_path / "d", replace(wild, keep="last"), start=first)
    assert not equal(last, first, 1e-3)
    log.clear()
    rows = load_task("products", products).rows("train")
    task = TaskData("e", "memory", CAUSAL_LM, {"train": rows[8:], "valid": rows[:8]}, "")
    better = fit(str(llama), basis, task, tmp_path / "e", SETTINGS, start=first)
    curve = [json.loads(line) for line in (tmp_path / "e" / "training_log.jsonl").read_text().splitlines()]
    assert curve[0]["step"] == 0
    assert curve[0]["eval_loss"] > better.training["valid_loss"]
    assert better.training["best_step"] > 0
    assert "no step was better" not in log.text


def test_each_learning_rate_starts_there_and_a_head_too(bert: Path, parity: Path, tmp_path: Path) -> None:
    own = CalibrationSettings(rank=2)
    start = fit(str(bert), own, parity, tmp_path / "a", replace(SETTINGS, learning_rate=1e-2))
    settings = replace(STILL, learning_rate=(1e-30, 2e-30))
    found = fit(str(bert), start.load_basis(), parity, tmp_path / "b", settings, start=start)
    assert tensors_equal(found.R, start.R)
    assert tensors_equal(found.head, start.head)


def test_a_basis_that_lies_in_the_adapter_goes_on_into_the_next(llama: Path, sums: Path, tmp_path: Path) -> None:
    start = fit(str(llama), CalibrationSettings(rank=2), sums, tmp_path / "a", SETTINGS)
    fit(str(llama), start.load_basis(), sums, tmp_path / "b", STILL, start=Adapter.load(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    after = Adapter.load(tmp_path / "b")
    assert after.basis_source is None
    assert after.load_basis().sha256 == start.basis_sha256


def test_a_basis_that_lies_elsewhere_too_is_named_where_it_was_given(llama: Path, sums: Path, tmp_path: Path) -> None:
    start = fit(str(llama), CalibrationSettings(rank=2), sums, tmp_path / "a", STILL)
    start.load_basis().save(tmp_path / "basis")
    fit(str(llama), tmp_path / "basis", sums, tmp_path / "b", STILL, start=Adapter.load(tmp_path / "a"))
    assert Adapter.load(tmp_path / "b").basis_source == str(tmp_path / "basis")


def test_an_interrupted_run_goes_on_and_a_finished_one_is_kept_of_the_same_start(
    first: Adapter, llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: tuple[Any, ...] = (str(llama), basis, sums, tmp_path / "b", SETTINGS)
    whole = fit(*place[:3], tmp_path / "whole", SETTINGS, start=first)
    steps = iter(range(20))

    def stopped(trainer: RTrainer, *words: Any, **options: Any) -> Any:
        if next(steps) == 19:
            raise KeyboardInterrupt
        return step(trainer, *words, **options)

    step = RTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(*place, start=first)
    assert list(tmp_path.glob(".b.run/checkpoint-*"))
    with pytest.raises(TrainingError, match="the interrupted run had other start_sha256"):
        fit(*place, resume=True)
    assert tensors_equal(fit(*place, resume=True, start=first).R, whole.R)
    assert tensors_equal(fit(*place, resume=True, start=first).R, whole.R)
    for other in (None, whole):
        with pytest.raises(TrainingError, match="trained otherwise: another start"):
            fit(*place, resume=True, start=other)


def test_what_a_task_cannot_start_from(
    first: Adapter, llama: Path, bert: Path, sums: Path, parity: Path, basis: Path, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], message: str, of_basis: Any, data: Any, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            fit(*(str(llama), of_basis, data, tmp_path / "x", options.pop("settings", STILL)), **options)
        assert not (tmp_path / "x").exists()

    other = calibrate(str(llama), {}, CalibrationSettings(rank=8, directions="random"))
    refused(ArtifactError, "do not belong together: trained in basis", other, sums, start=first)
    refused(DataError, "the data is SEQ_CLS, the adapter CAUSAL_LM", basis, parity, start=first)
    own = CalibrationSettings(rank=8)
    refused(SettingsError, "R of another basis to start from", own, sums, start=first)
    scaled = replace(STILL, scaling=2.0)
    refused(
        SettingsError,
        r"scaling is 2, and 1 in the adapter to start from .*Set scaling = 1",
        basis,
        sums,
        start=first,
        settings=scaled,
    )
    start = fit(str(bert), CalibrationSettings(rank=2), parity, tmp_path / "a", STILL)
    task = task_of(CLASS + CLASS.replace("yes", "maybe"), tmp_path / "data")
    with pytest.raises(DataError, match=r"the data has labels maybe, yes, the adapter to start from no, yes"):
        fit(str(bert), start.load_basis(), task, tmp_path / "x", STILL, start=start)


def test_the_command(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = f'model = "{llama}"\n[basis]\nrank = 2\n[fit]\nmax_steps = 2\n'
    Path("lorasb.toml").write_text(f'{head}[tasks.a]\ndata = "{sums}"\n[tasks.own]\ndata = "{sums}"\nbasis = "own"\n')
    assert lorasb("fit").exit_code == 0
    before = Adapter.load("adapters/own")
    done = lorasb("fit", "own", "--start-from", "own", "--overwrite", "--lr", "1e-30", "--json")
    assert done.exit_code == 0
    after = Adapter.load("adapters/own")
    assert tensors_equal(after.R, before.R)
    assert after.basis_sha256 == before.basis_sha256
    assert after.training["start"].startswith("own, sha256 ")
    kept = lorasb("fit", "own", "--start-from", "own", "--overwrite", "--resume", "--lr", "1e-30")
    assert kept.exit_code == 0
    assert Adapter.load("adapters/own").training == after.training  # it has replaced what it began as
    done = lorasb("fit", "own", "--start-from", "a", "--overwrite", "--lr", "1e-30")
    assert tensors_equal(Adapter.load("adapters/own").R, Adapter.load("adapters/a").R)
    assert Adapter.load("adapters/own").basis_sha256 == Basis.load("basis").sha256
    several = lorasb("fit", "--start-from", "own", "--overwrite")
    assert "own is to be replaced, and the others are to start from it" in several.stderr
    refused = lorasb("fit", "a", "--start-from", "missing", "--overwrite")
    assert "no adapter 'missing'" in refused.stderr


def test_each_task_of_many_starts_from_its_own(
    llama: Path,
    sums: Path,
    products: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    """As in a project some weeks later: `a` as it was, of `b` (in the shared basis) and `own` other rows, `new`."""
    monkeypatch.chdir(tmp_path)
    head = f'model = "{llama}"\n[basis]\nrank = 2\n[fit]\nmax_steps = 2\nlearning_rate = 1e-30\n'
    file = Path("lorasb.toml")

    def write(**data: Path) -> None:
        own = {name: 'basis = "own"\n' if name == "own" else "" for name in data}
        file.write_text(head + "".join(f'[tasks.{name}]\ndata = "{data[name]}"\n{own[name]}' for name in data))

    write(a=sums, b=sums, own=products)
    assert lorasb("fit", "--init", "svd", "--lr", "0.01").exit_code == 0
    shutil.copytree("adapters", "before")  # beside it: an adapter finds its basis by a relative path
    before = {name: Adapter.load(f"before/{name}") for name in ("a", "b", "own")}
    write(a=sums, b=products, own=sums, new=products)
    pattern = ("--start-from", "{name}", "--resume", "--overwrite")

    planned = lorasb("fit", *pattern, "--lr", "0.01", "--dry-run", "--json")
    assert {name: task["action"] for name, task in json.loads(planned.stdout)["tasks"].items()} == {
        "a": "keep",
        "b": "train",
        "own": "train",
        "new": "train",
    }
    for refused, message in (
        (("--start-from", "./missing/{name}", "--overwrite"), "no task has an adapter to start from"),
        ((*pattern, "--together"), "together all start from one adapter"),
        (("--start-from", "a", "--overwrite"), "or each from its own: --start-from '{name}'"),
    ):
        assert message in lorasb("fit", *refused).stderr

    done = lorasb("fit", *pattern, "--lr", "0.01")
    assert done.exit_code == 0
    assert "new: trained from the beginning, for there is no {name}" in log.text
    after = {name: Adapter.load(f"adapters/{name}") for name in ("a", "b", "own", "new")}
    assert after["a"].training == before["a"].training
    for name in ("b", "own"):
        assert after[name].training["start"].startswith(f"{name}, sha256 {before[name].sha256[:12]}")
        assert after[name].basis_sha256 == before[name].basis_sha256
        assert not tensors_equal(after[name].R, before[name].R)
    assert after["own"].basis_source is None
    assert after["new"].training["start"] is None
    again = lorasb("fit", *pattern, "--lr", "0.01")
    assert again.exit_code == 0
    assert {name: Adapter.load(f"adapters/{name}").sha256 for name in after} == {
        name: adapter.sha256 for name, adapter in after.items()
    }

    shutil.rmtree("adapters/b")
    assert lorasb("fit", "b", "--start-from", "before/{name}").exit_code == 0
    assert tensors_equal(Adapter.load("adapters/b").R, before["b"].R)  # at the rate of the file


def test_what_tasks_of_many_cannot_start_from(
    llama: Path,
    sums: Path,
    products: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    head = f'model = "{llama}"\n[basis]\nrank = 2\n[fit]\nmax_steps = 1\n'
    tasks = "".join(f'[tasks.{name}]\ndata = "{sums}"\n' for name in ("a", "b", "v2-a"))
    Path("lorasb.toml").write_text(head + tasks)
    assert lorasb("fit", "a", "v2-a").exit_code == 0
    assert lorasb("fit", "b", "--scaling", "2").exit_code == 0
    sums_before = {name: Adapter.load(f"adapters/{name}").sha256 for name in ("a", "b", "v2-a")}

    def refused(*words: str, told: str) -> None:
        done = lorasb("fit", *words, "--overwrite")
        assert (done.exit_code, told in done.stderr) == (1, True), done.stderr
        assert {name: Adapter.load(f"adapters/{name}").sha256 for name in sums_before} == sums_before

    # Told before the first is trained, where it shows in its turn otherwise.
    refused("--start-from", "{name}", told="scaling is 1, and 2 in the adapter to start from")
    refused("a", "v2-a", "--start-from", "v2-{name}", told="v2-a is to be replaced, and a is to start from it")
    refused("a", "--start-from", "{name}", "--basis", "own", told="Leave out either")

    shutil.copytree("adapters", "other/adapters")
    shutil.copytree("basis", "other/basis")
    done = lorasb("fit", "a", "--start-from", "other/adapters/{name}", "--overwrite", "--lr", "1e-30")
    assert done.exit_code == 0
    assert Adapter.load("adapters/a").basis_source == str(tmp_path / "basis")  # the same, where the project has it
    assert "not the project's" not in log.text

    Path("basis").rename("gone")
    refused("a", "--start-from", "{name}", told="the basis that a start from is gone")
    assert not Path("basis").exists()
    assert lorasb("calibrate", "--data", f"x={products}", "--rank", "2", "--out", "basis").exit_code == 0
    assert lorasb("fit", "a", "--start-from", "other/adapters/{name}", "--overwrite").exit_code == 0
    assert Adapter.load("adapters/a").basis_source == str(tmp_path / "other/basis")
    assert "a: in the basis of what they start from, which is not the project's" in log.text

    new = lorasb("fit", "v2-a", "--start-from", "missing-{name}", "--overwrite")
    assert "no task has an adapter to start from" in new.stderr
    shutil.rmtree("adapters/v2-a")
    assert lorasb("fit", "v2-a", "--start-from", "{name}").exit_code == 0  # an element of a job array
    assert "v2-a: trained from the beginning" in log.text
