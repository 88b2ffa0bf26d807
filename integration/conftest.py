"""The small real model, and one run of the quickstart that several tests look at."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.base import BaseModel
from lorasb_export.quickstart.model import small_model
from tests.conftest import llama, sums  # noqa: F401  fixtures of the fast tests

# A shell starts background jobs with SIGINT ignored; our children would inherit that and never see a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Quickstart:
    """What `lorasb quickstart --json` printed, and where."""

    folder: Path
    result: dict[str, Any]
    messages: str


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    return BaseModel.resolve(small_model()).folder


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart") / "project"
    command = [sys.executable, "-m", "lorasb_cli", "quickstart", "--out", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return Quickstart(folder, json.loads(done.stdout), done.stderr)
