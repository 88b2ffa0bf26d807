"""A project of one task, a, with its adapter, in the working folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasb_export import Adapter, calibrate
from lorasb_export.settings import CalibrationSettings


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a project of the task a with its adapter, which is as training starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasb.toml").write_text(f'model = "{llama}"\n[tasks.a]\ndata = "{sums}"\n')
    adapter = Adapter.fresh(calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random")))
    adapter.training = {"task": "a", "data": str(sums)}
    adapter.save("adapters/a")
    return tmp_path
