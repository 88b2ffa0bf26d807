"""The valid rows of a run: its metrics, the best R that is kept, patience, and a signal meanwhile."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_export import fit
from lorasb_export.data.task import TaskData
from lorasb_export.errors import DataError, SettingsError, Terminated
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.history import History
from lorasb_export.training.order import RowOrder
from lorasb_export.training.trainer import RTrainer
from lorasb_export.training.validation import Validation
from tests.training import SETTINGS, equal


@pytest.fixture
def counted_forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    seen: Counter[str] = Counter()
    step = RTrainer.training_step

    def counting(self: RTrainer, model: object, inputs: dict, *rest: object) -> torch.Tensor:
        seen["steps"] += 1
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(RTrainer, "training_step", counting)
    return seen


def test_the_best_evaluated_R_is_kept(llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path) -> None:
    """A rate that spoils the end: the R kept is that of the best evaluation, and its loss is the one reported."""
    settings = replace(
        SETTINGS, max_steps=12, evaluate_every=2, learning_rate=2.0, schedule="constant_with_warmup", warmup=0.5
    )
    best = fit(str(llama), basis, tasks["plus"], tmp_path / "best", settings)
    log = [json.loads(line) for line in (tmp_path / "best" / "training_log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert sorted(losses) == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 13))  # where it is evaluated too
    assert best.training["best_step"] == min(losses, key=losses.__getitem__) < 12
    assert best.training["valid_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    last = fit(str(llama), basis, tasks["plus"], tmp_path / "last", replace(settings, keep="last"))
    assert last.training["valid_loss"] == pytest.approx(losses[12], abs=1e-6)
    assert not equal(best, last, 1e-3)


def test_the_last_step_is_evaluated_whatever_lies_between(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", replace(SETTINGS, max_steps=3, evaluate_every=2))
    log = [json.loads(line) for line in (tmp_path / "a" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 3]


def test_of_an_R_that_a_better_one_has_surpassed_no_file_stays(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run may find a better one at each of its evaluations."""
    monkeypatch.setattr("lorasb_export.training.job.discard", lambda *_: None)
    settings = replace(SETTINGS, max_steps=8, evaluate_every=2, checkpoint_every=4)
    best = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings).training["best_step"]
    assert best > 2  # that of step 2 was the best when it was made
    assert [path.name for path in (tmp_path / ".a.run").glob("best-*")] == [f"best-0-{best}.safetensors"]


@pytest.mark.parametrize(("keep", "value"), [("best", 1.0), ("last", 2.0)])
def test_a_run_is_worth_what_the_R_is_that_it_keeps(keep: Any, value: float) -> None:
    """By this the runs at several learning rates are compared."""
    log = [{"step": step, "eval_loss": loss} for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0))]
    settings = FitSettings(max_steps=3, keep=keep)
    assert History(log, "", RowOrder([5], settings), settings).kept() == value


@pytest.mark.parametrize(("losses", "stops"), [((1.0, 1.1), False), ((1.0, 1.1, 1.2), True), ((1.0, 0.9, 1.1), True)])
def test_patience_does_not_count_what_a_run_starts_from(losses: tuple[float, ...], stops: bool) -> None:
    log = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    settings = FitSettings(max_steps=3, patience=1)
    assert History(log, "", RowOrder([5], settings), settings).has_stopped() == stops


def test_a_resumed_run_that_comes_to_no_better_R_keeps_the_best_of_its_checkpoint(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a better evaluation that no checkpoint knows of; on a GPU the second way there may end elsewhere."""
    settings = replace(SETTINGS, max_steps=6, evaluate_every=2, checkpoint_every=3)
    inputs = (str(llama), basis, tasks["plus"])
    step, losses = RTrainer.training_step, itertools.count(1000.0)

    def stopping(self: RTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 4:
            raise InterruptedError
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(InterruptedError):
            fit(*inputs, tmp_path / "a", settings)
    monkeypatch.setattr(Validation, "run", lambda *_: {"loss": next(losses)})
    resumed = fit(*inputs, tmp_path / "a", settings, resume=True)
    assert resumed.training["best_step"] == 2
    assert equal(resumed, fit(*inputs, tmp_path / "b", settings), 0)


def test_patience_ends_the_run_early_and_a_finished_run_is_not_trained_again(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, counted_forwards: Counter[str]
) -> None:
    settings = replace(
        SETTINGS, max_steps=40, evaluate_every=1, patience=2, learning_rate=2.0, schedule="constant_with_warmup"
    )
    adapter = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    stopped = adapter.training["steps"]
    assert counted_forwards["steps"] == stopped == adapter.training["best_step"] + 2 < 40
    assert fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings, resume=True).sha256 == adapter.sha256
    assert counted_forwards["steps"] == stopped


def test_patience_by_itself_is_asked_often_enough_to_run_out(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    settings = replace(
        SETTINGS, max_steps=40, evaluate_every=None, patience=3, learning_rate=2.0, schedule="constant_with_warmup"
    )
    adapter = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    assert adapter.training["steps"] == adapter.training["best_step"] + 3 * math.ceil(40 / 12) < 40


def test_with_patience_the_log_is_not_read_at_every_step(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_stopped, read = History.has_stopped, Counter[str]()

    def counting(self: History) -> bool:
        read["log"] += 1
        return has_stopped(self)

    monkeypatch.setattr(History, "has_stopped", counting)
    settings = replace(SETTINGS, max_steps=20, evaluate_every=10, patience=9)
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    assert read["log"] == 4  # as it begins, after each evaluation, at the end


def test_killed_after_an_early_stop_the_run_only_writes(
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted_forwards: Counter[str],
) -> None:
    settings = replace(
        SETTINGS, max_steps=40, evaluate_every=1, patience=2, learning_rate=2.0, schedule="constant_with_warmup"
    )
    inputs = (str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    with monkeypatch.context() as patch:
        patch.setattr(
            "lorasb_export.training.job.write_training_record", lambda *_: (_ for _ in ()).throw(OSError("disk"))
        )
        with pytest.raises(OSError, match="disk"):
            fit(*inputs)
    stopped = counted_forwards["steps"]
    adapter = fit(*inputs, resume=True)
    assert counted_forwards["steps"] == stopped == adapter.training["steps"]


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
@pytest.mark.parametrize("which", ["first", "of-the-last-step", "that-ends-patience"])
def test_sigterm_in_a_validation_does_not_wait_for_its_end(
    which: str, metric: str, llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: Any
) -> None:
    """It is made again when the run is resumed, which ends as the undisturbed one."""
    settings = replace(SETTINGS, max_steps=4, evaluate_every=2, metric=metric, checkpoint_every=100)
    if which == "that-ends-patience":
        settings = replace(settings, max_steps=40, patience=1, learning_rate=2.0, schedule="constant_with_warmup")
    whole = fit(str(llama), basis, tasks["plus"], tmp_path / "whole", settings)
    assert whole.training["steps"] < 40
    run, calls, last = Validation.run, [], whole.training["steps"] // 2

    def told(self: Validation, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == (1 if which == "first" else last):
            os.kill(os.getpid(), signal.SIGTERM)
            assert run(self, *arguments) is None
            return None
        return run(self, *arguments)

    monkeypatch.setattr(Validation, "run", told)
    with pytest.raises(Terminated):
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    (marker,) = (tmp_path / ".a.run").glob("checkpoint-*/complete.json")
    assert not json.loads(marker.read_text())["finished"]
    resumed = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings, resume=True)
    assert equal(resumed, whole, 0)
    assert resumed.training["best_step"] == whole.training["best_step"]
    assert resumed.training["steps"] == whole.training["steps"]


@pytest.mark.parametrize(("asked", "value"), [("patience", 1), ("metric", "exact_match")])
def test_what_needs_valid_rows_is_refused_without(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, asked: str, value: Any
) -> None:
    with pytest.raises(DataError, match=rf"no valid rows, so {value if asked == 'metric' else asked} .*leave {asked}"):
        fit(str(llama), basis, sums / "train.jsonl", tmp_path / "a", replace(SETTINGS, **{asked: value}))


def test_metrics_of_the_valid_split(
    llama: Path, bert: Path, basis: Path, tasks: dict[str, TaskData], parity: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, max_steps=4, metric="exact_match")
    answered = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    assert set(answered.training["valid_metrics"]) == {"exact_match"}
    with pytest.raises(SettingsError, match=r"metric 'mcc' does not fit"):
        fit(str(llama), basis, tasks["plus"], tmp_path / "b", replace(settings, metric="mcc"))

    folder = tmp_path / "parity"
    folder.mkdir()
    rows = (parity / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(rows)
    (folder / "valid.jsonl").write_text(rows)
    own = CalibrationSettings(rank=8)
    classified = fit(str(bert), own, folder, tmp_path / "c", FitSettings(epochs=15, learning_rate=2e-2, metric="mcc"))
    assert set(classified.training["valid_metrics"]) == {"accuracy", "mcc", "f1"}
    assert classified.training["valid_metrics"]["accuracy"] > 0.9


def test_after_a_run_sigterm_is_the_callers_again(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", replace(SETTINGS, max_steps=1))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
