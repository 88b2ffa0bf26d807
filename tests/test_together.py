"""Tasks together end as each alone, also where the run is stopped and resumed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_export import Adapter, Basis, fit
from lorasb_export.data.task import TaskData, load_task, task_of
from lorasb_export.errors import SettingsError, TrainingError
from lorasb_export.training import job
from lorasb_export.training.fit import fit_together
from lorasb_export.training.task_run import TaskRun
from lorasb_export.training.trainer import RTrainer
from tests.training import SETTINGS, equal


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_tasks_together_end_as_each_alone(
    accumulate: int,
    optimizer: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 3.8: other lengths of runs, other schedules, one clip each; the same R to 1e-6 in float64."""
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(group: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        assert all(p.grad is not None for p in group)  # else torch's norm of nothing is on the CPU
        return clip(group, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    settings = replace(SETTINGS, accumulate=accumulate, optimizer=optimizer)
    together = fit_together(llama, basis, tasks, tmp_path / "together", settings)
    for adapter, (name, task) in zip(together, tasks.items(), strict=True):
        alone = fit(str(llama), basis, task, tmp_path / name, settings)
        assert equal(adapter, alone, 1e-6)
        written = Adapter.load(tmp_path / "together" / name)
        assert written.training["together"] == ["minus", "plus"]
        for key in ("steps", "train_loss", "valid_loss", "best_step", "trainable_parameters"):
            assert written.training[key] == pytest.approx(alone.training[key], abs=1e-5), key
    start = Adapter.fresh(Basis.load(basis))
    assert not equal(together[0], start, 1e-3)
    assert not equal(together[0], together[1], 1e-3)
    assert not list((tmp_path / "together").glob(".*"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_together_is_resumed_bit_for_bit(
    optimizer: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)

    class Stop(Exception):
        pass

    step = RTrainer.training_step

    def stopping(self: RTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 7:
            raise Stop
        return step(self, *arguments)

    inputs = (str(llama), basis, list(tasks.values()))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(Stop):
            fit_together(*inputs, tmp_path / "a", settings)
    others = [replace(task, name=f"other-{name}") for name, task in tasks.items()]
    fit_together(*inputs[:2], others, tmp_path / "a", settings)  # meanwhile, in the same project
    backwards = fit_together(*inputs[:2], inputs[2][::-1], tmp_path / "a", settings, resume=True)
    resumed = backwards[::-1]  # in whatever order they are named
    undisturbed = fit_together(*inputs, tmp_path / "b", settings)
    assert all(equal(one, two, 0) for one, two in zip(resumed, undisturbed, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(Stop):
            fit_together(*inputs, tmp_path / "c", settings)
    with pytest.raises(TrainingError, match=r"run together had other tasks .*together"):
        fit_together(*inputs[:2], [*inputs[2], *others], tmp_path / "c", settings, resume=True)
    again = fit_together(*inputs, tmp_path / "a", settings, resume=True)  # finished: read, not trained
    assert [adapter.sha256 for adapter in again] == [adapter.sha256 for adapter in undisturbed]


def test_a_run_of_other_tasks_is_told_by_their_names_and_how_to_go_on_with_it_or_without(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two tasks is named no longer, and another is new."""
    out, now = tmp_path / "out", [tasks["plus"], replace(tasks["minus"], name="new")]
    step = RTrainer.training_step

    def stopping(self: RTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit_together(llama, basis, tasks, out, SETTINGS)
    (left,) = out.glob(".together+*.run")
    with pytest.raises(TrainingError) as error:
        fit_together(llama, basis, now, out, SETTINGS, resume=True)
    assert (error.value.what, error.value.where, error.value.fix) == (
        "an interrupted run together had other tasks than this one: with minus, without new",
        str(left),
        "Go on with it by `lorasb fit minus plus --together --resume`; or remove that folder, to train these from the "
        "beginning",
    )
    shutil.rmtree(left)
    assert [adapter.name for adapter in fit_together(llama, basis, now, out, SETTINGS, resume=True)] == ["plus", "new"]


def test_killed_between_two_adapters_it_goes_on_beside_one_finished_before(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = task_of("first", {"train": list(tasks["plus"].rows("train"))[:6]})
    out = tmp_path / "out"
    fit(str(llama), basis, first, out / "first", SETTINGS)
    write = job.write_training_record

    def killed(folder: Path, run: TaskRun, *rest: Any) -> None:
        if run.task.name == "plus":
            raise KeyboardInterrupt
        write(folder, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_training_record", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_together(str(llama), basis, [first, *tasks.values()], out, SETTINGS, resume=True)
    assert (out / "minus").exists()
    fitted = fit_together(str(llama), basis, [first, *tasks.values()], out, SETTINGS, resume=True)
    undisturbed = fit_together(str(llama), basis, tasks, tmp_path / "undisturbed", SETTINGS)
    assert {adapter.name: adapter.sha256 for adapter in fitted[1:]} == {a.name: a.sha256 for a in undisturbed}


def test_overwrite_replaces_only_what_has_changed_also_where_that_is_interrupted(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`two` has other rows now, `one` is damaged, `new` is new; the others are as they were."""
    rows, out = list(tasks["plus"].rows("train")), tmp_path / "out"
    before = {**tasks, **{name: task_of(name, {"train": rows[:count]}) for name, count in [("one", 7), ("two", 8)]}}
    made = {adapter.name: adapter for adapter in fit_together(str(llama), basis, before, out, SETTINGS)}
    (out / "one" / "adapter.safetensors").write_bytes(b"damaged")
    now = {**before, "two": task_of("two", {"train": rows[:9]}), "new": task_of("new", {"train": rows[:6]})}
    kept = {path: path.stat().st_mtime_ns for name in tasks for path in (out / name).iterdir()}
    ran, stops, step = list[list[str]](), [4], RTrainer.training_step

    def watched(self: RTrainer, *arguments: object) -> torch.Tensor:
        names = [run.task.name for run in self.runs]
        if names not in ran[-1:]:
            ran.append(names)
        if names == ["one", "two"] and self.state.global_step in stops:
            stops.clear()
            raise KeyboardInterrupt
        return step(self, *arguments)

    again = {"resume": True, "overwrite": True}
    monkeypatch.setattr(RTrainer, "training_step", watched)
    with pytest.raises(KeyboardInterrupt):
        fit_together(str(llama), basis, now, out, SETTINGS, **again)
    fitted = {adapter.name: adapter for adapter in fit_together(str(llama), basis, now, out, SETTINGS, **again)}
    assert (list(fitted), ran) == (list(now), [["new"], ["one", "two"]])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [fitted[name].sha256 for name in tasks] == [made[name].sha256 for name in tasks]
    for name in ("one", "two", "new"):
        assert equal(fitted[name], fit(str(llama), basis, now[name], tmp_path / name, SETTINGS), 1e-6)
    assert not list(out.glob(".*"))


def test_no_task_is_nothing_to_train(llama: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no task to fit. Give at least one"):
        fit_together(str(llama), basis, [], tmp_path)


def test_classifiers_do_not_train_together(bert: Path, parity: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="each has its own head"):
        fit_together(str(bert), basis, [load_task("a", parity), load_task("b", parity)], tmp_path)
