"""Tasks together, of which one comes to a loss that is not finite: the others train as if it had not been there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasb_export import Adapter, fit
from lorasb_export.data.task import TaskData, task_of
from lorasb_export.errors import TrainingError
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit_together
from lorasb_export.training.trainer import RTrainer
from tests.training import SETTINGS

Step = Callable[..., torch.Tensor]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes R of the first task NaN before a step of the run at `rate`, of every run; the run ends at step `end`."""
    step: Step = RTrainer.training_step

    def poison(at: int | None, *, rate: float = 1e-2, end: int | None = None) -> None:
        def poisonous(self: RTrainer, *arguments: object) -> torch.Tensor:
            if self.state.global_step == end:
                raise KeyboardInterrupt
            if self.state.global_step == at and self.settings.learning_rate == rate:
                self._parameters[0][0].data.fill_(torch.nan)
            return step(self, *arguments)

        monkeypatch.setattr(RTrainer, "training_step", poisonous)

    return poison


def the_R(adapter: Adapter) -> torch.Tensor:
    return torch.stack([R.detach() for R in adapter.R.values()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_others_train_on_to_their_own_R(
    optimizer: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    poisoned: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings, out = replace(SETTINGS, optimizer=optimizer), tmp_path / "out"
    plus, minus = (fit(str(llama), basis, tasks[name], tmp_path / name, settings) for name in ("plus", "minus"))
    poisoned(4)
    with pytest.raises(TrainingError, match=r"^the loss of minus is not finite at step 5, on training rows \d+"):
        fit_together(str(llama), basis, tasks, out, settings)
    assert "the loss of minus is not finite at step 5, on training rows" in caplog.text
    assert [path.name for path in out.iterdir()] == ["plus"]
    found = Adapter.load(out / "plus")
    assert torch.allclose(the_R(found).double(), the_R(plus).double(), rtol=0, atol=1e-6)
    assert found.training["valid_loss"] == pytest.approx(plus.training["valid_loss"], abs=1e-5)
    assert "nan" not in (out / "plus" / "training_log.jsonl").read_text().lower()
    poisoned(None)
    kept, of_minus = fit_together(str(llama), basis, tasks, out, settings, resume=True)
    assert kept.sha256 == found.sha256  # trained again is what was left out, alone
    assert torch.equal(the_R(of_minus), the_R(minus))


def test_one_that_was_left_out_stays_out_of_a_resumed_run(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, poisoned: Callable[..., None]
) -> None:
    inputs = (str(llama), basis, tasks)
    poisoned(4)
    with pytest.raises(TrainingError, match="of minus"):
        fit_together(*inputs, tmp_path / "undisturbed", SETTINGS)
    poisoned(4, end=7)
    with pytest.raises(KeyboardInterrupt):
        fit_together(*inputs, tmp_path / "a", SETTINGS)
    poisoned(None)
    with pytest.raises(TrainingError, match="the loss of minus is not finite at step 5"):
        fit_together(*inputs, tmp_path / "a", SETTINGS, resume=True)
    one, two = (Adapter.load(tmp_path / name / "plus") for name in ("undisturbed", "a"))
    assert one.sha256 == two.sha256


def test_an_evaluation_before_the_next_log_tells_of_the_step_and_the_rows_too(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, poisoned: Callable[..., None]
) -> None:
    poisoned(1)
    settings = replace(SETTINGS, max_steps=100, evaluate_every=4, checkpoint_every=50)  # a log at every tenth step
    with pytest.raises(TrainingError, match=r"^the loss of plus is not finite at step 2, on training rows \d+"):
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)


def test_a_regression_that_predicts_infinities_ends_in_the_same_error(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = [(math.inf, 1, sign * math.inf) for sign in (1, -1)]
    monkeypatch.setattr("lorasb_export.training.validation.row_scores", lambda *arguments, **options: endless)
    rows = [{"text": f"row {i}", "label": i + 0.5} for i in range(4)]
    task = task_of("numbers", {"train": rows, "valid": rows[:2]})
    settings = FitSettings(max_steps=2, metric="pearson")
    with pytest.raises(TrainingError, match=r"^the valid loss of numbers is not finite after step 1 "):
        fit(str(bert), CalibrationSettings(rank=4), task, tmp_path / "a", settings)


def test_a_rate_is_left_out_for_the_task_that_it_is_too_high_for(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, poisoned: Callable[..., None]
) -> None:
    poisoned(4)
    fitted = fit_together(str(llama), basis, tasks, tmp_path, replace(SETTINGS, learning_rate=(1e-2, 1e-3)))
    rates = {adapter.training["task"]: adapter.training["learning_rates"] for adapter in fitted}
    assert [rate for rate, loss in rates["minus"].items() if loss is None] == ["0.01"]
    assert None not in rates["plus"].values()
    assert {adapter.training["settings"]["learning_rate"] for adapter in fitted} == {1e-2, 1e-3}
