"""Runs that are reported to W&B and the like."""

from __future__ import annotations

import importlib
import re
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
from lorasb_export.training.trackers import run_name


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
        "def init(name, **_):\n    global run\n    run = MagicMock()\n    names.append(name)\n    print('syncing')\n"
        "def finish():\n    global run\n    run = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield importlib.import_module("wandb")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_every_run_is_a_run_of_its_own_in_wandb(
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    wandb: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = FitSettings(max_steps=1, dtype="float64", report_to="wandb", learning_rate=(1e-3, 1e-2))
    for name, task in tasks.items():
        fit(str(llama), basis, task, tmp_path / name, rates)
    assert wandb.names == ["plus", "plus", "minus", "minus"]
    told = [call.args[0]["lorasb"] for call in wandb.config.update.call_args_list if "lorasb" in call.args[0]]
    assert [(about["tasks"], about["learning_rate"]) for about in told] == [
        ([name], rate) for name in ("plus", "minus") for rate in (1e-3, 1e-2)
    ]
    assert (told[0]["rank"], told[0]["batch_size"], told[0]["optimizer"]) == (8, 8, "muon")
    said = capsys.readouterr()
    assert (said.out, said.err.count("syncing")) == ("", 4)  # stdout is for results
    assert wandb.run is None
    wandb.init("the caller's")
    fit(str(llama), basis, tasks["plus"], tmp_path / "again", rates)
    assert wandb.names[4:] == ["the caller's"]
    assert wandb.run is not None


def test_a_model_is_not_uploaded_by_the_way(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    settings = FitSettings(max_steps=1, dtype="float64", report_to="wandb")
    with pytest.raises(SettingsError, match=r"WANDB_LOG_MODEL=end would upload the whole base.*lorasb push"):
        fit(str(llama), basis, sums, tmp_path / "a", settings)
    assert not wandb.names


def test_what_a_run_is_called() -> None:
    """Trackio takes a run of the same name for the same run; W&B takes 128 letters."""
    this, other = {"settings": {"learning_rate": 1e-3}}, {"settings": {"learning_rate": 1e-2}}
    assert run_name("wandb", ["a"], this) == run_name("wandb", ["a"], other) == "a"
    names = [run_name("trackio", ["a"], identity) for identity in (this, dict(this), other)]
    assert names[0] == names[1] != names[2]
    assert all(re.fullmatch("a-[0-9a-f]{6}", name) for name in names)
    assert run_name("tensorboard", ["a", "b"], this) == "a+b"
    assert run_name("wandb", [f"task-{k}" for k in range(50)], this) == "50 tasks"


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
