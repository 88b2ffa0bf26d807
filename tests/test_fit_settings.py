"""What a task, and a basis that is made for it, are trained and calibrated with: the common settings or their own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis
from tests.test_fit_tasks import SETTINGS, fit_all, project


def test_rows_are_as_long_in_calibration_as_in_training(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless [basis] says otherwise; whichever of the two verbs makes the basis."""
    found = project(tmp_path / "p", llama, sums, "[basis]\nrank = 4\n[fit]\nmax_steps = 1\nmax_length = 9\n")
    monkeypatch.chdir(tmp_path / "p")
    for verb in ("calibrate", "fit"):
        shutil.rmtree(tmp_path / "p" / "basis", ignore_errors=True)
        CliRunner().invoke(app, [verb], catch_exceptions=False)
        assert Basis.load(tmp_path / "p" / "basis").calibration["max_length"] == 9
    found = replace(found, calibration={"rank": 4, "max_length": 11})
    own = fit_all(found, ["a"], SETTINGS, basis="own", overwrite=True)["a"].load_basis()
    assert own.calibration["max_length"] == 11


def test_a_task_has_settings_of_its_own(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[basis]\nrank = 4\n[fit]\nmax_steps = 1\n[tasks.b]\ndata = "data"\nfit.max_steps = 2\n'
    project(tmp_path / "p", llama, sums, text)
    monkeypatch.chdir(tmp_path / "p")
    (tmp_path / "p" / "data" / "valid.jsonl").unlink()
    assert CliRunner().invoke(app, ["fit"]).exit_code == 0
    made = {name: Adapter.load(f"adapters/{name}") for name in "ab"}
    assert {name: adapter.training["steps"] for name, adapter in made.items()} == {"a": 1, "b": 2}
    assert CliRunner().invoke(app, ["fit", "--resume"]).exit_code == 0  # each is as it should be
    assert {name: Adapter.load(f"adapters/{name}").sha256 for name in "ab"} == {n: a.sha256 for n, a in made.items()}
    said = CliRunner().invoke(app, ["fit", "--together", "--overwrite"]).stderr
    assert "b cannot be trained together with settings of their own" in said
    assert CliRunner().invoke(app, ["fit", "--together", "--max-steps", "1", "--overwrite"]).exit_code == 0
    toml = Path("lorasb.toml").read_text().replace("fit.max_steps = 2", "fit.patience = 2")
    Path("lorasb.toml").write_text(toml)
    said = CliRunner().invoke(app, ["fit", "--overwrite"]).stderr
    assert "task b has no valid rows, so patience has nothing to count" in said
    assert "task a" not in said


def test_a_tasks_own_basis_is_made_as_the_task_is_trained(llama: Path, sums: Path, tmp_path: Path) -> None:
    text = (
        '[basis]\nrank = 4\n[fit]\nmax_length = 9\n[tasks.b]\ndata = "data"\nfit.max_length = 11\nfit.batch_size = 2\n'
    )
    found = project(tmp_path / "p", llama, sums, text)
    own = {"b": found.settings_of("b", {"max_steps": 1})}
    made = fit_all(found, ["a", "b"], found.settings_of("a", {"max_steps": 1}), own=own, basis="own")
    calibrations = {name: adapter.load_basis().calibration for name, adapter in made.items()}
    assert {name: (c["max_length"], c["batch_size"]) for name, c in calibrations.items()} == {"a": (9, 8), "b": (11, 2)}


def test_batches_are_no_larger_in_calibration_than_in_training(llama: Path, sums: Path, tmp_path: Path) -> None:
    """Where the rows of a training step fit in memory, those of its basis are to fit too."""
    found = project(tmp_path / "p", llama, sums, "")
    for of_fit, of_basis, expected in ((2, {}, 2), (16, {}, 8), (2, {"batch_size": 3}, 3)):
        found = replace(found, calibration={"rank": 4, **of_basis})
        settings = replace(SETTINGS, batch_size=of_fit)
        basis = fit_all(found, ["a"], settings, basis="own", overwrite=True)["a"].load_basis()
        assert basis.calibration["batch_size"] == expected
