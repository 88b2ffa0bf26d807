"""A basis drawn at random, which needs no data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.calibration.calibrate import calibrate
from lorasb_export.errors import SettingsError
from lorasb_export.inspection import inspect_folder
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.conftest import lorasb


@pytest.mark.parametrize("directions", ["random", "block"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_basis_drawn_at_random_needs_no_data(
    kind: str, directions: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = request.getfixturevalue(kind), tmp_path / "basis"
    done = lorasb("calibrate", "--model", str(base), "--directions", directions, "--rank", "4", "--out", str(folder))
    said = f"Basis of rank 4 for {14 if kind == 'llama' else 13} modules from random numbers: {folder}\n"
    assert (done.exit_code, done.stdout) == (0, said), done.output
    basis = Basis.load(folder)
    for module in basis.modules.values():
        for factor in (module.B, module.A.T):
            assert torch.allclose(factor.T @ factor, torch.eye(4), atol=1e-6)
        assert not module.S.any()
        assert (module.block is not None) == (directions == "block")
    settings = CalibrationSettings(rank=4, directions=directions)
    network = BaseModel.resolve(base).load("CAUSAL_LM" if kind == "llama" else "SEQ_CLS")
    if directions == "block":
        monkeypatch.setattr(BaseModel, "load", None)  # it needs no weights either
    assert basis.sha256 == calibrate(str(base), {}, settings).sha256
    assert basis.sha256 == calibrate(str(base), {}, settings, network=network).sha256
    assert inspect_folder(folder)["directions"] == directions
    card = (folder / "README.md").read_text()
    assert f"| directions | {directions} |" in card
    assert f"AutoModelFor{'CausalLM' if kind == 'llama' else 'SequenceClassification'}.from_pretrained(" in card
    with pytest.raises(SettingsError, match="rank 40 exceeds module"):
        calibrate(str(base), {}, CalibrationSettings(rank=40, directions=directions))


@pytest.mark.parametrize("more", ["--data a=rows", "--weight a=2", "--samples 8", "--reduction raw", "--loss token"])
def test_a_flag_of_the_data_is_wrong_usage_where_none_is_read(more: str, llama: Path) -> None:
    done = lorasb("calibrate", "--model", str(llama), "--directions", "block", *more.split())
    assert (done.exit_code, f"{more.split()[0]}: a basis whose directions" in done.stderr) == (2, True)


@pytest.mark.parametrize(("source", "directions"), [("shared", "random"), ("own", "random"), ("own", "block")])
def test_fit_in_a_basis_drawn_at_random_asks_for_no_gradient(
    source: str, directions: str, llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts at the base model, with three times the rate, nine times at a rank of 4."""
    settings = CalibrationSettings(rank=4, directions=directions)
    monkeypatch.setattr("lorasb_export.training.run_basis.capture", None)
    made = settings if source == "own" else calibrate(str(llama), {}, settings)
    adapter = fit(str(llama), made, sums, tmp_path / "a", FitSettings(max_steps=2))
    assert adapter.training["settings"]["learning_rate"] == 8.1e-2
    assert (adapter.training["capture"], adapter.training["energy"]) == (None, {})
    assert any(R.any() for R in adapter.R.values())
    assert not any(R.any() for R in Adapter.fresh(adapter.load_basis()).R.values())
    assert "The basis holds" not in (tmp_path / "a" / "README.md").read_text()


def test_random_bases_of_two_models_differ(llama: Path, tmp_path: Path) -> None:
    """Of one shape: a model and its tuned twin. By its basis an adapter is known to fit others."""
    shutil.copytree(llama, tmp_path / "twin")
    weights = load_file(llama / "model.safetensors")
    save_file(
        {name: 1.01 * w for name, w in weights.items()}, tmp_path / "twin" / "model.safetensors", {"format": "pt"}
    )
    settings = CalibrationSettings(rank=4, directions="random")
    one, two = (calibrate(str(base), {}, settings) for base in (llama, tmp_path / "twin"))
    assert one.sha256 != two.sha256


@pytest.mark.parametrize("directions", ["random", "block"])
def test_another_seed_draws_another_basis(directions: str, llama: Path) -> None:
    settings = CalibrationSettings(rank=4, directions=directions)
    one, two = (calibrate(str(llama), {}, replace(settings, seed=seed)) for seed in (0, 1))
    assert one.sha256 != two.sha256


@pytest.mark.parametrize("directions", ["random", "block"])
def test_a_seed_draws_one_basis_whatever_the_callers_dtype(directions: str, llama: Path) -> None:
    settings = CalibrationSettings(rank=4, directions=directions)
    expected = calibrate(str(llama), {}, settings).sha256
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert calibrate(str(llama), {}, settings).sha256 == expected
        finally:
            torch.set_default_dtype(torch.float32)
