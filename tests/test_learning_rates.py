"""`--lr 1e-3,1e-2`: a run at each rate, and of every task the R that did best on its valid rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Adapter, calibrate, fit
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.errors import DataError, OutputError, SettingsError, TrainingError
from lorasb_export.evaluation.metrics import better
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit_together
from lorasb_export.training.trainer import RTrainer

SETTINGS = FitSettings(max_steps=6, checkpoint_every=3)
RATES = (1e-5, 1e-2)


@pytest.fixture(scope="module")
def basis(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates") / "basis"
    calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=8)).save(folder)
    return folder


def at(*rates: float) -> FitSettings:
    return replace(SETTINGS, learning_rate=rates if len(rates) > 1 else rates[0])


def test_the_best_rate_on_the_valid_rows_is_kept(llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    best = fit(str(llama), basis, sums, tmp_path / "a", at(*RATES))
    alone = {rate: fit(str(llama), basis, sums, tmp_path / str(rate), at(rate)) for rate in RATES}
    assert best.training["learning_rates"] == pytest.approx(
        {str(rate): one.training["valid_loss"] for rate, one in alone.items()}, abs=1e-6
    )
    assert best.training["settings"]["learning_rate"] == 1e-2
    assert Adapter.load(tmp_path / "a").sha256 == alone[1e-2].sha256 != alone[1e-5].sha256
    assert (tmp_path / "a" / "training_log.jsonl").read_text() == (tmp_path / "0.01/training_log.jsonl").read_text()
    assert "Trained at each of these learning rates" in (tmp_path / "a" / "README.md").read_text()


def test_the_rate_that_was_kept_may_be_written_down(llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    """`fit --resume` finds the adapter trained as it should be."""
    best = fit(str(llama), basis, sums, tmp_path / "a", at(*RATES))
    kept, other = sorted(RATES, key=lambda rate: rate != best.training["settings"]["learning_rate"])
    assert fit(str(llama), basis, sums, tmp_path / "a", at(kept), resume=True).sha256 == best.sha256
    with pytest.raises(TrainingError, match=r"was trained otherwise: learning_rate \[1e-05, 0.01\], not"):
        fit(str(llama), basis, sums, tmp_path / "a", at(other), resume=True)


def test_an_interrupted_search_goes_on_with_the_rate_it_was_at(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, out = fit(str(llama), basis, sums, tmp_path / "whole", at(*RATES)), tmp_path / "a"
    step, taken = RTrainer.training_step, Counter[float]()

    def counting(self: RTrainer, *args: object) -> torch.Tensor:
        rate = self.settings.learning_rate
        if rate == RATES[1] and taken[rate] == 4:
            taken[rate] += 1
            raise KeyboardInterrupt
        taken[rate] += 1
        return step(self, *args)

    monkeypatch.setattr(RTrainer, "training_step", counting)
    with pytest.raises(KeyboardInterrupt):
        fit(str(llama), basis, sums, out, at(*RATES))
    with pytest.raises(TrainingError, match="other learning rates"):
        fit(str(llama), basis, sums, out, at(RATES[1]), resume=True)
    taken[RATES[1]] += 1  # not to be interrupted again
    assert fit(str(llama), basis, sums, out, at(*RATES), resume=True).sha256 == undisturbed.sha256
    assert taken == {RATES[0]: 6, RATES[1]: 4 + 2 + 3}  # from the checkpoint of step 3


def test_an_interrupted_search_is_not_lost_without_a_word(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, step = (str(llama), basis, sums, tmp_path / "a", at(*RATES)), RTrainer.training_step

    def stopping(self: RTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit(*inputs)
    with pytest.raises(OutputError, match="an interrupted run is there"):
        fit(*inputs)
    assert list(tmp_path.glob(".a.run/rate-*/checkpoint-3/complete.json"))


@pytest.mark.parametrize("rates", [(1e-3, 2e-2), (2e-2, 1e-3)])
def test_a_classifier_has_the_head_of_its_rate(
    bert: Path, parity: Path, tmp_path: Path, rates: tuple[float, float]
) -> None:
    """Every run trains the model's one head, from where the first began."""
    folder = tmp_path / "parity"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text((parity / "train.jsonl").read_text())
    own = CalibrationSettings(rank=4)
    best = fit(str(bert), own, folder, tmp_path / "a", at(*rates))
    assert best.training["settings"]["learning_rate"] == 2e-2
    assert Adapter.load(tmp_path / "a").sha256 == best.sha256
    assert best.sha256 == fit(str(bert), own, folder, tmp_path / "b", at(2e-2)).sha256


def test_together_every_task_has_its_own_best_rate(llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    task = load_task("a", sums)
    backwards = [{**row, "completion": "qKxWjYvH"} for row in task.rows("valid")]  # what training makes less likely
    worse = TaskData("b", "b", task.task_type, {**task.splits, "valid": backwards}, "b" * 64)
    tasks = [task, worse]
    a, b = fit_together(str(llama), basis, tasks, tmp_path / "together", at(*RATES))
    assert [one.training["settings"]["learning_rate"] for one in (a, b)] == [1e-2, 1e-5]
    for name, found, rate in (("a", a, 1e-2), ("b", b, 1e-5)):
        fixed = dict(zip("ab", fit_together(str(llama), basis, tasks, tmp_path / str(rate), at(rate)), strict=True))
        assert Adapter.load(tmp_path / "together" / name).sha256 == found.sha256 == fixed[name].sha256


def test_a_rate_that_diverges_is_left_out(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wild = replace(SETTINGS, max_grad_norm=1e30, evaluate_every=6)
    found = fit(str(llama), basis, sums, tmp_path / "a", replace(wild, learning_rate=(1e-2, 1e30)))
    assert found.training["learning_rates"]["1e+30"] is None
    assert "not finite at 1e+30" in (tmp_path / "a" / "README.md").read_text()
    assert "Learning rate 1e+30 left out: the loss of a is not finite" in caplog.text
    with pytest.raises(TrainingError, match="the loss of b is not finite"):
        fit(str(llama), basis, sums, tmp_path / "b", replace(wild, learning_rate=(1e29, 1e30)))


def test_what_the_last_step_makes_is_looked_at_too(llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    """No training loss is computed with it: the valid loss is, and without valid rows R itself is looked at."""
    one_step = replace(SETTINGS, max_steps=1, warmup=0.0)
    with pytest.raises(TrainingError, match="the valid loss of a is not finite after step 1"):
        fit(str(llama), basis, sums, tmp_path / "a", replace(one_step, learning_rate=1e25))
    found = fit(str(llama), basis, sums, tmp_path / "b", replace(one_step, learning_rate=(1e-2, 1e25)))
    assert found.training["learning_rates"]["1e+25"] is None
    with pytest.raises(TrainingError, match="R of c is not finite at the end"):
        fit(str(llama), basis, sums / "train.jsonl", tmp_path / "c", replace(one_step, learning_rate=3e38))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()


def test_without_valid_rows_rates_cannot_be_compared(llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no valid rows, so learning rates cannot be compared"):
        fit(str(llama), basis, sums / "train.jsonl", tmp_path / "a", at(*RATES))


@pytest.mark.parametrize("rates", [(), (1e-3, 1e-3), (1e-3, -1.0), (1e-3, "x"), (1e-3, float("nan")), (True, 1e-3)])
def test_what_is_no_list_of_rates_is_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="learning_rate"):
        FitSettings(learning_rate=rates)


def test_the_verb_and_the_project_file_take_several(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = "[fit]\nmax_steps = 2\nmax_grad_norm = 1e30\nlearning_rate = [1e-3, 1]\n"
    (tmp_path / "lorasb.toml").write_text(
        f'model = "{llama}"\n[basis]\npath = "{basis}"\n{section}[tasks.a]\ndata = "{sums}"\n'
    )
    done = CliRunner().invoke(app, ["fit"])
    assert "a: 2 steps at learning rate " in done.stdout
    assert "loss by learning rate: 0.001 " in done.stdout
    assert "1 is kept; a higher one may do better" in done.stdout
    printed = json.loads(CliRunner().invoke(app, ["fit", "--resume", "--json"]).stdout)["adapters"]["a"]
    assert (printed["learning_rate"], printed["metric"]) == (1, "loss")
    done = CliRunner().invoke(app, ["fit", "--lr", "1e-4,1e-2,1e30", "--overwrite"])
    assert "1e+30 not finite. 0.01 is kept\n" in done.stdout
    done = CliRunner().invoke(app, ["fit", "--lr", "1e-4,2e-4,3e-4", "--overwrite"])
    assert list(Adapter.load("adapters/a").training["learning_rates"]) == ["0.0001", "0.0002", "0.0003"]
    assert "'much' is no rate" in CliRunner().invoke(app, ["fit", "--lr", "much"]).stderr


def test_nan_is_worse_than_anything() -> None:
    nan = float("nan")
    assert better("loss", 9.0, nan)
    assert better("mcc", -1.0, nan)
    assert not better("loss", nan, 9.0)
    assert not better("loss", nan, nan)
