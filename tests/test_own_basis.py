"""A basis of a run's own: calibrated once, and in the adapter's folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import TaskData
from lorasb_export.errors import TrainingError
from lorasb_export.settings import CalibrationSettings
from lorasb_export.training.trainer import RTrainer
from tests.test_resume import interrupt
from tests.training import SETTINGS


def test_an_own_basis_is_calibrated_once_and_lies_in_the_adapter(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CalibrationSettings(rank=4)
    inputs = (str(llama), own, tasks["plus"], tmp_path / "a", replace(SETTINGS, dtype="auto"))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(*inputs)
        patch.setattr("lorasb_export.training.run_basis.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
        with pytest.raises(KeyboardInterrupt):
            fit(*inputs, resume=True)
    other = fit(str(llama), CalibrationSettings(rank=2), *inputs[2:], resume=True)  # no checkpoint of the first yet
    assert other.rank == 2
    adapter = fit(*inputs, overwrite=True)
    assert (tmp_path / "a" / "basis.safetensors").is_file()
    assert adapter.basis_source is None
    assert adapter.training["capture"]["basis"] == adapter.training["capture"]["own"]


def test_other_rows_before_the_first_checkpoint_have_another_basis(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = str(llama), CalibrationSettings(rank=4)
    settings = replace(SETTINGS, dtype="auto", max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(*inputs, tasks["plus"], tmp_path / "a", settings)
    resumed = fit(*inputs, tasks["minus"], tmp_path / "a", settings, resume=True)
    assert resumed.basis_sha256 == fit(*inputs, tasks["minus"], tmp_path / "b", settings).basis_sha256


def test_an_adapter_on_the_callers_network_is_no_part_of_the_base(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    base, own = BaseModel.resolve(llama), CalibrationSettings(rank=4, targets="q_proj")
    network, settings = base.load(), replace(SETTINGS, dtype="auto")
    first = fit(base, own, tasks["plus"], tmp_path / "a", settings, network=network)
    first.inject(network)
    second = fit(base, own, tasks["plus"], tmp_path / "b", settings, network=network)
    assert second.basis_sha256 == first.basis_sha256


def test_a_base_that_has_changed_meanwhile_is_not_trained_on_in_the_basis_of_the_former(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    base, own, settings = tmp_path / "base", CalibrationSettings(rank=4), replace(SETTINGS, checkpoint_every=1)
    shutil.copytree(llama, base)
    inputs = (base, own, tasks["plus"], tmp_path / "a", settings)
    interrupt(*inputs)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="the interrupted run had other basis_sha256, base_fingerprint"):
        fit(*inputs, resume=True)
    assert fit(*inputs, resume=True, overwrite=True).base == BaseModel.resolve(base).ref(Adapter.load(tmp_path / "a").R)


def test_an_adapter_of_a_base_that_has_changed_since_is_not_taken_for_finished(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    inputs = base, CalibrationSettings(rank=4), tasks["plus"], tmp_path / "a", replace(SETTINGS, max_steps=1)
    made = fit(*inputs)
    assert fit(*inputs, resume=True).sha256 == made.sha256
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="trained otherwise: another base model"):
        fit(*inputs, resume=True)


def test_the_head_that_a_basis_is_made_with_is_drawn_by_its_own_seed(bert: Path, parity: Path, tmp_path: Path) -> None:
    """Whatever seed the training has."""
    made = [
        fit(str(bert), CalibrationSettings(rank=2), parity, tmp_path / str(seed), replace(SETTINGS, seed=seed))
        for seed in (0, 1)
    ]
    assert made[0].basis_sha256 == made[1].basis_sha256
    assert made[0].sha256 != made[1].sha256
