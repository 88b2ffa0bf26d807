"""Short runs: settings in float64, a basis of the sums, and whether two runs came to the same R."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasb_export import Adapter, calibrate
from lorasb_export.settings import CalibrationSettings, FitSettings

SETTINGS = FitSettings(epochs=2, batch_size=3, learning_rate=1e-2, dtype="float64", checkpoint_every=3)


@pytest.fixture(scope="module")
def basis(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "basis"
    calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=8)).save(folder)
    return folder


def equal(one: Adapter, two: Adapter, tolerance: float) -> bool:
    return all(torch.allclose(R.double(), two.R[name].double(), rtol=0, atol=tolerance) for name, R in one.R.items())
