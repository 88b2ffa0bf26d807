"""Verbs in a project folder: which rows, which figures, which base they take."""

from __future__ import annotations

from pathlib import Path

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner, Result

from lorasb_export import Adapter, calibrate
from lorasb_export.settings import CalibrationSettings


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a project of the task a with its adapter, which is as training starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasb.toml").write_text(f'model = "{llama}"\n[tasks.a]\ndata = "{sums}"\n')
    adapter = Adapter.start(calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random")))
    adapter.training = {"task": "a", "data": str(sums)}
    adapter.save("adapters/a")
    return tmp_path


def lorasb(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


def test_figures_of_a_few_rows_stay_out_of_the_card(project: Path) -> None:
    files = [Path("adapters/a", name) for name in ("adapter_config.json", "README.md")]
    before = [file.read_bytes() for file in files]
    assert lorasb("evaluate", "a", "--metric", "loss", "--limit", "1").exit_code == 0
    assert [file.read_bytes() for file in files] == before
    assert lorasb("evaluate", "a", "--metric", "loss").exit_code == 0
    assert Adapter.load("adapters/a").training["evaluation"]["test"]["loss"]["rows"] == 24
