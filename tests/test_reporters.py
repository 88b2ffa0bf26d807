"""Runs that are reported to W&B and the like."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasb_export import fit
from lorasb_export.data.task import TaskData
from lorasb_export.errors import MissingPackageError, SettingsError
from lorasb_export.settings import FitSettings


def test_a_reporter_that_is_not_installed_is_named(llama: Path, basis: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"trackio is not installed.*pip install trackio"):
        fit(str(llama), basis, sums, tmp_path / "a", FitSettings(dtype="float64", report_to="trackio"))


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in with what transformers' callback calls."""
    lib = tmp_path / "modules" / "wandb" / "sdk" / "lib"
    lib.mkdir(parents=True)
    (lib / "config_util.py").write_text("class ConfigError(Exception): pass\n")
    (lib.parents[1] / "__init__.py").write_text(
        "from unittest.mock import MagicMock\n"
        "run, config, log, names = None, MagicMock(), MagicMock(), []\n"
        "def init(name, **_):\n    global run\n    run = MagicMock()\n    names.append(name)\n"
        "def finish():\n    global run\n    run = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield importlib.import_module("wandb")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_every_run_is_a_run_of_its_own_in_wandb(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, wandb: Any
) -> None:
    rates = FitSettings(max_steps=1, dtype="float64", report_to="wandb", learning_rate=(1e-3, 1e-2))
    for name, task in tasks.items():
        fit(str(llama), basis, task, tmp_path / name, rates)
    assert wandb.names == ["plus", "plus", "minus", "minus"]
    assert wandb.run is None
    wandb.init("the caller's")
    fit(str(llama), basis, tasks["plus"], tmp_path / "again", rates)
    assert wandb.names[4:] == ["the caller's"]
    assert wandb.run is not None


def test_a_tracker_that_does_not_start_says_so_itself(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wandb does without a key: with an exception of its own and more lines than one."""

    def init(*_: Any, **__: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", init)
    settings = FitSettings(max_steps=1, dtype="float64", report_to="wandb")
    with pytest.raises(
        SettingsError, match=r"^wandb does not start: api_key not configured \(no-tty\) \(report_to\)\. "
    ):
        fit(str(llama), basis, sums, tmp_path / "a", settings)
    monkeypatch.undo()
    assert fit(str(llama), basis, sums, tmp_path / "a", replace(settings, report_to="none"), resume=True).folder
    monkeypatch.setattr("lorasb_export.training.requirements.require_packages", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=init))
    with pytest.raises(SettingsError, match=r"^tensorboard does not start: api_key"):
        fit(str(llama), basis, sums, tmp_path / "b", replace(settings, report_to="tensorboard"))
