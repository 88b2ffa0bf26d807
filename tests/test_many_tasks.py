"""What a project of thousands of tasks needs: nothing loaded, read or said once for each that can be so for all."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import Adapter, calibrate, fit
from lorasb_export.base.model import BaseModel, BaseRef
from lorasb_export.belonging import of_one_basis
from lorasb_export.errors import DataError, MissingPackageError, SettingsError, TrainingError, some
from lorasb_export.project import fit as module
from lorasb_export.project.evaluate import evaluate_adapters
from lorasb_export.project.init import write_project
from lorasb_export.project.project import Project
from lorasb_export.provenance import command
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.conftest import lorasb, write_splits
from tests.test_fit_tasks import fit_all

SETTINGS = FitSettings(max_steps=2)


def project(folder: Path, base: Path, data: Path, names: str, more: str = "") -> Project:
    tasks = "".join(f'[tasks.{name}]\ndata = "{data}"\n' for name in names)
    (folder / "lorasb.toml").write_text(f'model = "{base}"\n{more}{tasks}')
    return Project.load(folder / "lorasb.toml")


def test_classifiers_are_trained_and_scored_on_one_loaded_base(
    bert: Path, parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path, bert, parity, "abc", '[basis]\nrank = 4\ndirections = "random"\n')
    calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random")).save(tmp_path / "basis")
    alone = fit(str(bert), tmp_path / "basis", parity, tmp_path / "alone", SETTINGS)
    loads: list[str] = []
    load = BaseModel.load

    def watched(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        loads.append(arguments[0])
        return load(self, *arguments, **options)

    monkeypatch.setattr(BaseModel, "load", watched)
    adapters = fit_all(found, list("abc"), SETTINGS)
    assert loads == ["SEQ_CLS"]
    for adapter in adapters.values():
        assert isinstance(adapter, Adapter)
        assert adapter.sha256 == alone.sha256
    folders = {name: str(found.adapter_folder(name)) for name in "abc"}
    scores = [outcome for _, outcome in evaluate_adapters(found, folders)]
    assert len(loads) == 2
    assert all(isinstance(score, dict) and score["adapter"] == scores[0]["adapter"] for score in scores)


def test_adapters_of_one_network_are_scored_together_and_another_takes_its_place(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of a large base might not fit."""
    basis = calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random"))
    for name, labels in {"a": "xy", "b": "xyz", "c": "xy"}.items():
        rows = [{"text": label, "label": label} for label in labels]
        write_splits(tmp_path / name, {"train": rows, "test": rows})
        adapter = Adapter.attach(BaseModel.resolve(bert).load("SEQ_CLS", num_labels=len(labels)), basis)
        adapter.training = {"task": name, "data": str(tmp_path / name), "labels": list(labels)}
        adapter.save(tmp_path / "adapters" / name)
    alive: list[weakref.ref[Any]] = []
    load = BaseModel.load

    def watched(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(network() for network in alive)
        alive.append(weakref.ref(network := load(self, *arguments, **options)))
        return network

    monkeypatch.setattr(BaseModel, "load", watched)
    folders = {name: str(tmp_path / "adapters" / name) for name in "abc"}
    scored = [name for name, outcome in evaluate_adapters(Project(tmp_path), folders) if isinstance(outcome, dict)]
    assert (scored, len(alive)) == (["a", "c", "b"], 2)


@pytest.fixture
def of_two_counts(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: classifiers of two, three, and again two labels, and their basis."""
    monkeypatch.chdir(tmp_path)
    for name, labels in {"a": "xy", "b": "xyz", "c": "xy"}.items():
        rows = [{"text": label, "label": label} for label in labels]
        write_splits(tmp_path / "data" / name, {"train": rows, "valid": rows})
    tasks = "".join(f'[tasks.{name}]\ndata = "data/{name}"\n' for name in "abc")
    Path("lorasb.toml").write_text(f'model = "{bert}"\n[fit]\nmax_steps = 1\n{tasks}')
    calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random")).save("basis")
    return tmp_path


def test_classifiers_of_as_many_labels_are_trained_one_after_another(
    of_two_counts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is loaded once for each count; what is printed is in the order of the file all the same."""
    loads: list[int] = []
    load = BaseModel.load

    def watched(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        loads.append(options["num_labels"])
        return load(self, *arguments, **options)

    monkeypatch.setattr(BaseModel, "load", watched)
    found = Project.load()
    assert list(fit_all(found, list("abc"), SETTINGS)) == ["a", "c", "b"]
    assert list(fit_all(found, list("bac"), SETTINGS, overwrite=True)) == ["b", "a", "c"]
    assert loads == [2, 3, 3, 2]
    assert list(json.loads(lorasb("fit", "--resume", "--overwrite", "--json").stdout)["adapters"]) == ["a", "b", "c"]
    told = lorasb("fit", "b", "a", "c", "b", "--resume").stdout.splitlines()
    assert [line[:2] for line in told if not line.startswith(" ")] == ["b:", "a:", "c:"]


def test_of_many_tasks_none_is_measured(
    llama: Path, sums: Path, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take as long as to train them."""
    found = project(tmp_path, llama, products, "abc", '[basis]\npath = "basis"\n')
    calibrate(str(llama), {"of": sums}, CalibrationSettings(rank=4)).save(tmp_path / "basis")
    monkeypatch.setattr(module, "MAX_MEASURED", 2)
    few = fit_all(found, ["a", "b"], SETTINGS)
    assert all(isinstance(one, Adapter) and one.training["capture"] is not None for one in few.values())
    many = fit_all(found, list("abc"), SETTINGS, overwrite=True)
    assert all(isinstance(one, Adapter) and one.training["capture"] is None for one in many.values())


@pytest.mark.parametrize(("full", "trained"), [("b", ["a", "c"]), ("a", None)])
def test_memory_that_sufficed_for_others_is_a_fault_of_the_task(
    full: str, trained: list[str] | None, llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first task does not fit, the base may be what is too large."""
    found = project(tmp_path, llama, sums, "abc", '[basis]\nrank = 4\ndirections = "random"\n')

    def fit_or_not(base: Any, basis: Any, task: Any, out: Path, *arguments: Any, **options: Any) -> Adapter:
        if task.name == full:
            raise MemoryError
        return fit(base, basis, task, out, *arguments, **options)

    monkeypatch.setattr(module, "fit", fit_or_not)
    if trained is None:
        with pytest.raises(MemoryError):
            fit_all(found, list("abc"), SETTINGS)
        return
    outcomes = fit_all(found, list("abc"), SETTINGS)
    assert [name for name, outcome in outcomes.items() if isinstance(outcome, Adapter)] == trained
    assert isinstance(outcomes[full], TrainingError)


def test_an_adapter_that_is_kept_says_nothing_of_memory(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path, llama, sums, "ab", '[basis]\nrank = 4\ndirections = "random"\n')
    fit_all(found, ["a"], SETTINGS)

    def full(base: Any, basis: Any, task: Any, out: Path, *arguments: Any, **options: Any) -> Adapter:
        if task.name == "b":
            raise MemoryError
        return fit(base, basis, task, out, *arguments, **options)

    monkeypatch.setattr(module, "fit", full)
    with pytest.raises(MemoryError):
        fit_all(found, ["a", "b"], SETTINGS, resume=True)


def test_what_is_wrong_with_no_task_is_told_once(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path, llama, sums, "abc")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"^the package wandb is not installed"):
        fit_all(found, list("abc"), replace(SETTINGS, report_to="wandb"))


def test_tasks_with_bad_rows_are_named_together(llama: Path, sums: Path, tmp_path: Path) -> None:
    found = project(tmp_path, llama, sums, "a", '[tasks.x]\ndata = "x.jsonl"\n[tasks.y]\ndata = "y.jsonl"\n')
    for name in "xy":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": 1, "completion": "2"}))
    with pytest.raises(DataError) as error:
        fit_all(found, ["a", "x", "y"], SETTINGS)
    assert all(f"{name}.jsonl" in str(error.value) for name in "xy")


def test_the_base_is_looked_for_once_for_all_adapters(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a request to the Hub for each."""
    found = project(tmp_path, llama, sums, "abc")
    basis = calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random"))
    for name in "abc":
        adapter = Adapter.fresh(basis)
        adapter.training = {"task": name, "data": str(sums)}
        adapter.save(found.adapter_folder(name))
    resolved: list[str] = []
    resolve = BaseRef.resolve

    def watched(self: BaseRef, *arguments: Any) -> BaseModel:
        resolved.append(self.name_or_path)
        return resolve(self, *arguments)

    monkeypatch.setattr(BaseRef, "resolve", watched)
    score = {"split": "test", "metric": "loss", "base": 2.0, "adapter": 1.0, "rows": 24}
    monkeypatch.setattr("lorasb_export.project.evaluate.evaluate", lambda *_, **__: score)
    folders = {name: str(found.adapter_folder(name)) for name in "abc"}
    assert len(list(evaluate_adapters(found, folders))) == 3
    assert resolved == [str(llama)]


def test_the_weights_are_looked_at_once_for_all_adapters_that_are_kept(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path, llama, sums, "abc", '[basis]\nrank = 4\ndirections = "random"\n')
    fit_all(found, list("abc"), SETTINGS)
    opened: list[Path] = []
    opening = Path.open

    def watched(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.extend([self] if self.parent == llama and self.suffix == ".safetensors" else [])
        return opening(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    kept = fit_all(found, ["a"], SETTINGS, resume=True)
    once = len(opened)
    kept |= fit_all(found, list("abc"), SETTINGS, resume=True)
    assert all(isinstance(adapter, Adapter) for adapter in kept.values())
    assert (once > 0, len(opened)) == (True, 2 * once)


def test_a_command_of_thousands_of_names_is_cut_where_each_adapter_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lorasb", "fit", *(f"task-{k}" for k in range(10_000))])
    kept = command()
    assert kept is not None
    assert kept.startswith("lorasb fit task-0 task-1 ")
    assert kept.endswith(" … (10,001 words)")
    assert len(kept) < 4100


def test_of_thousands_of_names_an_error_has_ten() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some([str(k) for k in range(10_000)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 9,990 more"


def test_a_project_file_of_ten_thousand_tasks_is_read_as_it_is_written(tmp_path: Path) -> None:
    tasks = {f"{k:030}": f"data/{k:060}" for k in range(10_000)}
    assert Project.load(write_project(tmp_path / "lorasb.toml", "base", tasks)).tasks.keys() == tasks.keys()
    longer = {name: data * 6 for name, data in tasks.items()}
    with pytest.raises(SettingsError, match=r"10,000 tasks make a file of 4,.* bytes, and 4,000,000 are read"):
        write_project(tmp_path / "longer.toml", "base", longer)
    assert not (tmp_path / "longer.toml").exists()


def test_a_folder_given_twice_to_a_merge_is_refused_by_whatever_name(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    project(tmp_path, llama, sums, "a")
    basis = calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random"))
    Adapter.fresh(basis).save("adapters/a")
    done = lorasb("merge", "a", "./adapters/a=0.5", "--out", "model")
    assert done.exit_code == 2
    assert "is given twice" in done.stderr


@pytest.mark.parametrize("basis", [None, "own"])
def test_where_all_is_done_no_weights_are_loaded(
    basis: str | None, llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every night that brings no new rows: nor is an empty model made for each task of the shared basis."""
    found = project(tmp_path, llama, sums, "abc", "[basis]\nrank = 4\n")
    asked: dict[str, Any] = {"resume": True, "basis": basis}
    made = fit_all(found, list("abc"), SETTINGS, **asked)
    load, load_empty, empty = BaseModel.load, BaseModel.load_empty, list[str]()

    def counted(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        empty.append(arguments[0])
        return load_empty(self, *arguments, **options)

    monkeypatch.setattr(BaseModel, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(BaseModel, "load_empty", counted)
    for more in ({}, {"overwrite": True}):
        again = fit_all(found, list("abc"), SETTINGS, **asked, **more)
        assert [getattr(one, "sha256", one) for one in again.values()] == [
            one.sha256 for one in made.values() if isinstance(one, Adapter)
        ]
    assert basis == "own" or empty == ["CAUSAL_LM"] * 2
    others = fit_all(found, ["a", "b"], replace(SETTINGS, seed=1), **asked)
    assert all(isinstance(one, TrainingError) and "trained otherwise" in one.what for one in others.values())
    loads: list[str] = []
    monkeypatch.setattr(BaseModel, "load", lambda *words, **named: loads.append(words[1]) or load(*words, **named))
    last = fit_all(found, list("abc"), replace(SETTINGS, max_steps=1), **asked, overwrite=True)
    assert all(isinstance(one, Adapter) and one.training["steps"] == 1 for one in last.values())
    assert loads == ["CAUSAL_LM"]


@pytest.mark.parametrize(("strangers", "taken"), [(2, 18), (3, 20)])
def test_no_more_than_a_tenth_is_passed_over_for_its_basis(strangers: int, taken: int) -> None:
    ref = BaseRef("base", None, "")
    adapters = {f"a{k}": Adapter(ref, "new" if k < strangers else "old", None, {}) for k in range(20)}
    assert len(of_one_basis(adapters)) == taken
