"""Fitting the tasks of a project file: where bases lie, and in what they are calibrated."""

from __future__ import annotations

import errno
import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Basis, calibrate, fit
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.errors import BaseModelError, BusyError, DataError, OutputError, SettingsError, TrainingError
from lorasb_export.files.lock import only_writer
from lorasb_export.names import ours_in
from lorasb_export.project.fit import fit_tasks
from lorasb_export.project.fit_plan import plan_fit
from lorasb_export.project.project import Project
from lorasb_export.project.request import FitRequest
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.conftest import lorasb
from tests.tiny import TEMPLATE, make_gpt2, make_llama

SETTINGS = FitSettings(max_steps=1)


def project(folder: Path, base: Path, sums: Path, more: str) -> Project:
    """A project of the task `a`, which lies in its folder."""
    folder.mkdir()
    shutil.copytree(sums, folder / "data")
    (folder / "lorasb.toml").write_text(f'model = "{base}"\n{more}[tasks.a]\ndata = "data"\n')
    return Project.load(folder / "lorasb.toml")


def fit_all(*arguments: Any, together: bool = False, **options: Any) -> dict[str, Any]:
    return dict(fit_tasks(FitRequest(*arguments, **options), together=together))


def test_the_basis_of_a_task_lies_beside_the_file(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is run."""
    found = project(tmp_path / "p", llama, sums, "")
    with (tmp_path / "p" / "lorasb.toml").open("a") as file:
        file.write('basis = "mine"\n')
    calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4)).save(tmp_path / "p" / "mine")
    found = Project.load(tmp_path / "p" / "lorasb.toml")
    monkeypatch.chdir(tmp_path)
    adapter = fit_all(found, ["a"], SETTINGS)["a"]
    assert adapter.basis_source == str(tmp_path / "p" / "mine")


@pytest.mark.parametrize("source", [None, "own"])
def test_a_basis_is_calibrated_in_the_dtype_of_its_section(
    source: str | None, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a base in that dtype, before the one that is trained on is loaded: both at once might not fit."""
    load, dtypes = BaseModel.load, []

    def watched(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        dtypes.append(options["dtype"])
        return load(self, *arguments, **options)

    monkeypatch.setattr(BaseModel, "load", watched)
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    found = project(tmp_path / "p", base, sums, '[basis]\nrank = 4\ndtype = "float32"\n')
    adapter = fit_all(found, ["a"], SETTINGS, basis=source)["a"]
    assert {module.B.dtype for module in adapter.load_basis().modules.values()} == {torch.float32}
    assert dtypes == ["float32", "auto"]


def test_a_task_that_joins_others_is_named_before_any_is_trained(llama: Path, sums: Path, tmp_path: Path) -> None:
    found = project(tmp_path / "p", llama, sums, "[basis]\nrank = 4\n")
    kept = fit_all(found, ["a"], SETTINGS)["a"]
    with (tmp_path / "p" / "lorasb.toml").open("a") as file:
        file.write('[tasks.b]\ndata = "data"\n')
    found = Project.load(tmp_path / "p" / "lorasb.toml")
    with pytest.raises(OutputError, match=r"the target exists.*Name the tasks that are left, or pass --resume"):
        fit_all(found, ["b", "a"], SETTINGS)
    assert ours_in(found.adapters_folder) == ["a"]
    assert fit_all(found, ["b", "a"], SETTINGS, resume=True)["a"].sha256 == kept.sha256
    assert ours_in(found.adapters_folder) == ["a", "b"]


def test_a_task_that_the_settings_do_not_suit_is_named_before_any_is_trained(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    found = project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[tasks.b]\ndata = "data/train.jsonl"\n')
    for asked in ({"patience": 1}, {"learning_rate": (1e-3, 1e-2)}, {"metric": "exact_match"}):
        with pytest.raises(DataError, match="task b has no valid rows"):
            fit_all(found, ["a", "b"], FitSettings(**asked))
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["data", "lorasb.toml"]  # nor is there a basis


def test_a_task_whose_basis_is_of_another_base_is_named_before_any_is_trained(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    other = make_llama(tmp_path / "other", width=64)
    calibrate(str(other), {"sums": sums}, CalibrationSettings(rank=4)).save(tmp_path / "p_basis")
    tasks = f'[basis]\nrank = 4\n[tasks.b]\ndata = "data"\nbasis = "{tmp_path / "p_basis"}"\n'
    found = project(tmp_path / "p", llama, sums, tasks)
    with pytest.raises(BaseModelError, match=r"not those the artifact was made for"):
        fit_all(found, ["a", "b"], SETTINGS)
    assert not ours_in(found.adapters_folder)


def test_a_task_that_cannot_be_trained_leaves_the_others_their_turn(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is its turn: all its rows are too long. The same command with --resume goes on past what is done."""
    tasks = '[basis]\nrank = 4\ndirections = "random"\n[fit]\nmax_steps = 1\n[tasks.long]\ndata = "long.jsonl"\n'
    project(tmp_path / "p", llama, sums, tasks)
    monkeypatch.chdir(tmp_path / "p")
    Path("long.jsonl").write_text(json.dumps({"prompt": "1" * 600, "completion": "2"}))
    for words in (["fit", "--json"], ["fit", "--json", "--resume"]):
        done = CliRunner().invoke(app, words)
        printed = json.loads(done.stdout)
        assert (done.exit_code, list(printed["adapters"]), list(printed["failed"])) == (1, ["a"], ["long"])
        assert printed["failed"]["long"]["type"] == "DataError"
        assert "1 failed:\n  1. long: there is no row to learn from" in done.stderr
    alone = CliRunner().invoke(app, ["fit", "long", "--json"])
    assert (alone.exit_code, list(json.loads(alone.stdout))) == (1, ["error"])


def test_a_task_that_cannot_be_learnt_is_not_in_the_basis_of_the_others(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """All rows of one are too long, a row of another is refused by the chat template: the basis is of `a` alone."""
    base = make_llama(tmp_path / "base")
    refuses = "{% if 'refused' in messages[0].content %}{{ raise_exception('not this one') }}{% endif %}"
    (base / "chat_template.jinja").write_text(refuses + TEMPLATE)
    tasks = '[basis]\nrank = 4\n[fit]\nmax_steps = 1\n[tasks.long]\ndata = "long.jsonl"\n'
    project(tmp_path / "p", base, sums, f'{tasks}[tasks.odd]\ndata = "odd.jsonl"\n')
    monkeypatch.chdir(tmp_path / "p")
    Path("long.jsonl").write_text(json.dumps({"prompt": "1" * 600, "completion": "2"}))
    Path("odd.jsonl").write_text(json.dumps({"prompt": "refused", "completion": "2"}))
    alone = lorasb("calibrate", "--out", "other")
    assert (alone.exit_code, "there is no row to learn from" in alone.stderr) == (1, True)
    assert not Path("other").exists()
    log.clear()
    done = lorasb("fit", "--json")
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed["adapters"]), list(printed["failed"])) == (1, ["a"], ["long", "odd"])
    assert [source["name"] for source in Basis.load("basis").calibration["data"]] == ["a"]
    (told,) = [message for message in log.messages if "The basis is made without" in message]
    assert told.startswith("The basis is made without 2 of 3 tasks:\n  there is no row to learn from")
    assert "not this one" in told
    shutil.rmtree("basis")
    Path("lorasb.toml").write_text(Path("lorasb.toml").read_text().replace('data = "data"', 'data = "long.jsonl"'))
    nothing = lorasb("fit", "--overwrite")
    assert (nothing.exit_code, "3 problems, no basis was made" in nothing.stderr) == (1, True)


def test_rows_and_R_of_one_task_at_a_time_are_in_memory(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "".join(f'[tasks.{name}]\ndata = "data"\n' for name in "bcd")
    found = project(tmp_path / "p", llama, sums, f'[basis]\nrank = 4\ndirections = "random"\n{tasks}')
    read: list[weakref.ref[TaskData]] = []
    made: list[weakref.ref[Any]] = []

    def reading(name: str, source: str) -> TaskData:
        task = load_task(name, source)
        read.append(weakref.ref(task))
        return task

    monkeypatch.setattr("lorasb_export.project.request.load_task", reading)
    for _, adapter in fit_tasks(FitRequest(found, list("abcd"), SETTINGS)):
        made.append(weakref.ref(adapter))
        gc.collect()  # whatever lies in a cycle
        assert [sum(one() is not None for one in of) for of in (read, made)] == [0, 1]
    assert (len(made), len(read) >= 4) == (4, True)


def test_a_dry_run_keeps_no_rows_of_refused_tasks(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "".join(f'[tasks.{name}]\ndata = "data/train.jsonl"\n' for name in "bcd")
    found = project(tmp_path / "p", llama, sums, f'[basis]\nrank = 4\ndirections = "random"\n{tasks}')
    read: list[weakref.ref[TaskData]] = []
    alive: list[int] = []

    def reading(name: str, source: str) -> TaskData:
        gc.collect()  # whatever lies in a cycle
        alive.append(sum(task() is not None for task in read))
        task = load_task(name, source)
        read.append(weakref.ref(task))
        return task

    monkeypatch.setattr("lorasb_export.project.request.load_task", reading)
    foreseen = plan_fit(FitRequest(found, list("bcd"), FitSettings(patience=1)))  # there are no valid rows
    assert {task["action"] for task in foreseen.values()} == {"refuse"}
    assert alive == [0, 0, 0]


def test_a_renamed_task_is_still_trained(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its table and its folder; the card calls it as it was called then (docs/how-to/train.md)."""
    found = project(tmp_path / "p", llama, sums, "[basis]\nrank = 4\n")
    made = fit_all(found, ["a"], SETTINGS)["a"]
    file = tmp_path / "p" / "lorasb.toml"
    file.write_text(file.read_text().replace("[tasks.a]", "[tasks.b]"))
    found.adapter_folder("a").rename(found.adapter_folder("b"))
    monkeypatch.setattr(BaseModel, "load", lambda *_, **__: pytest.fail("trained again"))
    kept = fit_all(Project.load(file), ["b"], SETTINGS, resume=True)["b"]
    assert (kept.sha256, kept.training["task"]) == (made.sha256, "a")
    assert Project.load(file).task_of(kept, None)[0] == "b"
    assert (found.adapter_folder("b") / "README.md").read_text().count("# a: a LoRA-SB adapter") == 1


def test_a_full_disk_ends_the_tasks_that_are_left(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[tasks.b]\ndata = "data"\n')

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(found.adapter_folder("b")))

    monkeypatch.setattr("lorasb_export.training.job.write_training_record", full)
    with pytest.raises(OutputError, match="No space left"):
        fit_all(found, ["b", "a"], SETTINGS)


@pytest.mark.parametrize("resume", [False, True])
def test_a_task_that_another_process_writes_leaves_the_others_their_turn(
    resume: bool, llama: Path, sums: Path, tmp_path: Path
) -> None:
    """Whether it is to be trained, or an adapter that is there to be kept."""
    more = "".join(f'[tasks.{name}]\ndata = "data"\n' for name in "bc")
    found = project(tmp_path / "p", llama, sums, f'[basis]\nrank = 4\ndirections = "random"\n{more}')
    fitted = fit_all(found, ["a", "b"], SETTINGS)
    with only_writer(found.adapter_folder("b")):
        again = fit_all(found, ["b", "a", "c"], SETTINGS, resume=resume, overwrite=True)
        with pytest.raises(BusyError):
            fit_all(found, ["b"], SETTINGS, resume=resume, overwrite=True)
    assert (type(again["b"]), again["b"].where) == (BusyError, str(found.adapter_folder("b")))
    assert again["a"].sha256 == fitted["a"].sha256
    assert ours_in(found.adapters_folder) == ["a", "b", "c"]


def test_layers_are_counted_in_the_network_that_the_tasks_share(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the rate; an empty model for each task took longer than all else of a finished one."""
    found = project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\ntargets = "q_proj"\n[tasks.b]\ndata = "data"\n')
    with monkeypatch.context() as patch:
        patch.setattr(BaseModel, "load_empty", lambda *_, **__: pytest.fail("made"))
        fitted = fit_all(found, ["a", "b"], SETTINGS)
    alone = fit(str(llama), tmp_path / "p" / "basis", sums, tmp_path / "alone", SETTINGS)
    rates = [adapter.training["settings"]["learning_rate"] for adapter in (alone, *fitted.values())]
    assert len(set(rates)) == 1


def test_candidates_lie_where_the_pattern_says(llama: Path, sums: Path, tmp_path: Path) -> None:
    """Beside the adapters in use, one after another or together; an adapter finds its basis from there."""
    found = project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[tasks.b]\ndata = "data"\n')
    out = str(tmp_path / "p" / "{name}" / "new")
    with pytest.raises(SettingsError, match=r"lie in one folder.*Write --out FOLDER/\{name\}"):
        fit_all(found, ["a", "b"], SETTINGS, together=True, out=out)
    fitted = fit_all(found, ["a", "b"], SETTINGS, out=out)
    assert [adapter.folder for adapter in fitted.values()] == [tmp_path / "p" / name / "new" for name in "ab"]
    together = fit_all(found, ["a", "b"], SETTINGS, together=True, out=str(tmp_path / "p" / "c" / "{name}"))
    assert [adapter.folder for adapter in together.values()] == [tmp_path / "p" / "c" / name for name in "ab"]
    assert Adapter.load(tmp_path / "p" / "c" / "a").load_basis().sha256 == fitted["a"].basis_sha256
    assert not ours_in(found.adapters_folder)


def test_of_several_tasks_it_is_told_whose_turn_it_is(
    llama: Path, sums: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """And how long those take that are to be trained for sure; of one task, or of one that is kept, nothing."""
    more = "".join(f'[tasks.{name}]\ndata = "data"\n' for name in "bc")
    found = project(tmp_path / "p", llama, sums, f'[basis]\nrank = 4\ndirections = "random"\n{more}')
    log.set_level("INFO", logger="lorasb_export")
    fit_all(found, ["a"], SETTINGS)
    assert not [message for message in log.messages if " of 1: " in message]
    fit_all(found, ["a", "b", "c"], SETTINGS, resume=True)
    first, second = (message for message in log.messages if " of 3: " in message)
    assert first == "2 of 3: b"
    assert re.fullmatch(r"3 of 3: c, about \d+ s left", second)


def test_a_task_outside_of_a_project_has_the_basis_made_for_it(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "a", "--data", str(sums), "--model", str(make_llama(tmp_path / "wide", width=128))]
    done = CliRunner().invoke(app, [*words, "--max-steps", "1"])
    assert done.exit_code == 0, done.output
    assert [source["name"] for source in Basis.load("basis").calibration["data"]] == ["a"]


def test_calibrate_without_a_task_says_so(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no task to calibrate on" in CliRunner().invoke(app, ["calibrate", "--model", str(llama)]).stderr


def test_together_one_that_diverges_is_left_out(llama: Path, sums: Path, tmp_path: Path) -> None:
    """At a rate that no second step outlives: `a` has eight of them, `short` and `brief` one."""
    found = project(
        tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[tasks.short]\ndata = "s"\n[tasks.brief]\ndata = "s"\n'
    )
    (tmp_path / "p" / "s").mkdir()
    rows = (sums / "train.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "p" / "s" / "train.jsonl").write_text("".join(rows))
    settings = FitSettings(epochs=1, learning_rate=1e30)
    fitted = fit_all(found, ["short", "a", "brief"], settings, together=True)
    assert (fitted["a"].what, list(fitted)) == (
        "the valid loss of a is not finite after step 2",
        ["short", "a", "brief"],
    )
    assert sorted(path.name for path in (tmp_path / "p" / "adapters").iterdir()) == ["brief", "short"]
    assert fitted["short"].training["together"] == ["a", "brief", "short"]
    again = fit_all(found, ["short", "a", "brief"], settings, together=True, resume=True)
    assert isinstance(again["a"], TrainingError)
    assert again["brief"].sha256 == fitted["brief"].sha256


def test_together_nothing_is_loaded_where_all_is_kept(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[tasks.b]\ndata = "data"\n')
    fitted = fit_all(found, ["a", "b"], SETTINGS, together=True)
    monkeypatch.setattr(BaseModel, "load", lambda *_, **__: pytest.fail("loaded"))
    again = fit_all(found, ["a", "b"], SETTINGS, together=True, resume=True)
    assert [again[name].sha256 for name in "ab"] == [fitted[name].sha256 for name in "ab"]


def test_together_all_that_diverge_are_each_told_once(llama: Path, sums: Path, tmp_path: Path) -> None:
    found = project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[tasks.b]\ndata = "data"\n')
    settings = FitSettings(epochs=1, learning_rate=1e30)
    outcomes = list(fit_tasks(FitRequest(found, ["a", "b"], settings), together=True))
    assert [(name, type(error)) for name, error in outcomes] == [("a", TrainingError), ("b", TrainingError)]
    assert not [path for path in (tmp_path / "p" / "adapters").iterdir() if not path.name.startswith(".")]


def test_an_interrupted_run_of_one_task_is_told_before_another_trains(llama: Path, sums: Path, tmp_path: Path) -> None:
    found = project(tmp_path / "p", llama, sums, '[tasks.b]\ndata = "data"\n')
    left = tmp_path / "p/adapters/.b.run/checkpoint-1/complete.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    with pytest.raises(OutputError, match=r"an interrupted run is there \(.*\.b\.run\)"):
        fit_all(found, ["a", "b"], SETTINGS)
    assert not (tmp_path / "p/adapters/a").exists()


def test_rows_longer_than_the_base_reaches_are_told_before_another_task_trains(sums: Path, tmp_path: Path) -> None:
    found = project(tmp_path / "p", make_gpt2(tmp_path / "gpt2"), sums, '[tasks.b]\ndata = "data"\n')
    own = {"b": FitSettings(max_steps=1, max_length=5000)}
    with pytest.raises(SettingsError, match=r"max_length is 5000, the base's positions end at"):
        fit_all(found, ["a", "b"], FitSettings(max_steps=1, max_length=64), own=own)
    assert not (tmp_path / "p/adapters/a").exists()


@pytest.mark.parametrize("names", ["b", "ab"])
def test_texts_longer_than_the_base_reaches_are_told_by_the_names_of_their_classifiers(
    names: str, bert: Path, parity: Path, tmp_path: Path
) -> None:
    """Before a basis is made; and so it is foreseen."""
    found = project(tmp_path / "p", bert, parity, '[basis]\nrank = 4\n[tasks.b]\ndata = "data"\n')
    own = dict.fromkeys(names, FitSettings(max_steps=1, max_length=5000))
    with pytest.raises(SettingsError) as error:
        fit_all(found, ["a", "b"], SETTINGS, own=own)
    where = ", ".join(names)
    assert str(error.value) == f"max_length is 5000, the base's positions end at 512 ({where}). Lower max_length to 512"
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["data", "lorasb.toml"]
    foreseen = plan_fit(FitRequest(found, ["a", "b"], SETTINGS, own=own))
    assert [foreseen[name]["action"] for name in "ab"] == ["refuse" if name in names else "wait" for name in "ab"]


def test_positions_are_looked_at_where_every_task_has_an_adapter(bert: Path, parity: Path, tmp_path: Path) -> None:
    """Of one of them the rows may have changed."""
    found = project(tmp_path / "p", bert, parity, '[basis]\nrank = 4\n[tasks.b]\ndata = "data"\n')
    before = fit_all(found, ["a", "b"], SETTINGS)
    own = {"a": replace(SETTINGS, max_steps=1), "b": replace(SETTINGS, max_length=5000)}
    with pytest.raises(SettingsError, match=r"positions end at 512 \(b\)"):
        fit_all(found, ["a", "b"], SETTINGS, own=own, resume=True, overwrite=True)
    assert all(Adapter.load(found.adapter_folder(name)).sha256 == before[name].sha256 for name in "ab")
