"""What a basis captures of a task's gradient, and what is said about it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_export import calibrate, fit, fit_together
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.calibration import capture as module
from lorasb_export.calibration.capture import capture, is_little, overview, recorded
from lorasb_export.calibration.gradients import draw, gradients_of_rows
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.trainer import RTrainer


def random_basis(like: Basis) -> Basis:
    """Random orthonormal factors in place of the calibrated ones, and no word of what it was calibrated on."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: ModuleBasis(
            torch.linalg.qr(torch.randn(m.B.shape, generator=generator))[0],
            torch.linalg.qr(torch.randn(m.A.shape[::-1], generator=generator))[0].T.contiguous(),
            m.S,
        )
        for name, m in like.modules.items()
    }
    return Basis(like.base, like.rank, modules, {**like.calibration, "data": [], "capture": {}})


@pytest.mark.parametrize("reduction", ["sign", "raw"])
def test_oracle_25_own_basis_captures_more_than_a_random_one(reduction: str, llama: Path, sums: Path) -> None:
    base, task = BaseModel.resolve(llama), load_task("sums", sums)
    settings = CalibrationSettings(rank=4, reduction=reduction)
    network = base.load()
    own = calibrate(base, {"sums": task}, settings, network=network)
    found, other = capture(base, network, own, task), capture(base, network, random_basis(own), task)
    assert found["rows"] == 32
    assert found["basis"] == pytest.approx(found["own"], abs=1e-5)  # it was calibrated on these very rows
    assert found["basis"] > 2 * found["random"]
    assert other["basis"] == pytest.approx(found["random"], rel=0.25)
    assert all(set(ratios) == {"basis", "own", "random"} for ratios in found["modules"].values())


def test_oracle_25_a_raw_basis_captures_the_share_of_its_singular_values(llama: Path, sums: Path) -> None:
    base, task = BaseModel.resolve(llama), load_task("sums", sums)
    network, settings = base.load(), CalibrationSettings(rank=4, reduction="raw")
    basis = calibrate(base, {"sums": task}, settings, network=network)
    rows, pad_id = draw(task, base, [], settings), base.tokenizer.pad_token_id
    gradients = gradients_of_rows(network, find_targets(network, "all-linear"), rows, pad_id, settings)
    of_all = capture(base, network, basis, task)
    found, squares = of_all["modules"], {name: torch.linalg.svdvals(g).square() for name, g in gradients.items()}
    kept, whole = (sum(float(S[:end].sum()) for S in squares.values()) for end in (4, None))
    assert of_all["basis"] == pytest.approx(math.sqrt(kept / whole), abs=1e-4)
    for name, S in squares.items():
        assert found[name]["basis"] == pytest.approx(math.sqrt(S[:4].sum() / S.sum()), abs=1e-4)
        assert basis.calibration["energy"][name] == pytest.approx(float(S[:4].sum() / S.sum()), abs=1e-4)


def test_fit_warns_of_a_basis_that_captures_little(
    llama: Path, sums: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4))
    with caplog.at_level(logging.WARNING, logger="lorasb_export"):
        adapter = fit(str(llama), random_basis(own), sums, tmp_path / "poor", FitSettings(max_steps=1))
    assert "try a higher --learning-rate, or --basis own" in caplog.text
    assert adapter.training["capture"]["basis"] < adapter.training["capture"]["own"]
    caplog.clear()
    good = fit(str(llama), own, sums, tmp_path / "good", FitSettings(max_steps=1))
    found = recorded(own, load_task("sums", sums))
    assert found is not None
    assert found["modules"].keys() == own.modules.keys()
    assert good.training["capture"] == overview(found)
    assert json.loads((tmp_path / "good" / "lorasb.json").read_text())["capture"] == found
    assert "learn more slowly" not in caplog.text


def test_a_resumed_run_measures_another_basis_anew(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no checkpoint is complete another basis may be given, and what the first one captured still lies there."""
    task = load_task("sums", sums)
    first, second = (random_basis(calibrate(str(llama), {"sums": task}, CalibrationSettings(rank=r))) for r in (2, 8))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(str(llama), first, task, tmp_path / "a", FitSettings(max_steps=1))
    resumed = fit(str(llama), second, task, tmp_path / "a", FitSettings(max_steps=1), resume=True)
    fresh = fit(str(llama), second, task, tmp_path / "b", FitSettings(max_steps=1))
    assert resumed.training["capture"] == fresh.training["capture"]


def test_tasks_that_train_together_are_measured_each_by_itself(
    llama: Path, sums: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    base = BaseModel.resolve(llama)
    basis = random_basis(calibrate(base, {"sums": sums}, CalibrationSettings(rank=4)))
    made = fit_together(base, basis, tasks, tmp_path, FitSettings(max_steps=1))
    found = [overview(capture(base, base.load(), basis, task)) for task in tasks.values()]
    assert [adapter.training["capture"]["own"] for adapter in made] == [one["own"] for one in found]
    assert found[0]["own"] != found[1]["own"]


def test_little_is_near_random() -> None:
    assert is_little({"basis": 0.12, "own": 0.5, "random": 0.1})
    assert not is_little({"basis": 0.3, "own": 0.5, "random": 0.1})


def test_a_basis_of_very_many_tasks_takes_few_rows_of_each_and_nobody_measures_it(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    """Otherwise thousands of tasks would take as many SVDs, and a config of hundreds of megabytes."""
    base, task = BaseModel.resolve(llama), load_task("sums", sums)
    many = {f"t{k}": task for k in range(128)}
    basis = calibrate(base, many, CalibrationSettings(rank=4))
    rows = {of_task["rows"] for of_task in basis.calibration["data"]}
    assert (rows, basis.calibration["capture"]["tasks"], recorded(basis, task)) == ({1024 // 128}, {}, None)
    assert fit(base, basis, task, tmp_path / "a", FitSettings(max_steps=1)).training["capture"] is None


def test_a_fit_measures_with_no_more_memory_than_it_trains_with(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = random_basis(calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4)))
    base, task = BaseModel.resolve(llama), load_task("sums", sums)
    usual = capture(base, base.load(), basis, task)
    seen: list[tuple[int, bool]] = []
    of_rows = module.gradients_of_rows

    def watched(*arguments: Any) -> Any:
        seen.append((arguments[-1].batch_size, arguments[-1].gradient_checkpointing))
        return of_rows(*arguments)

    monkeypatch.setattr(module, "gradients_of_rows", watched)
    sparing = capture(base, base.load(), basis, task, FitSettings(batch_size=2, gradient_checkpointing=True))
    assert seen == [(2, True)]
    assert sparing["basis"] == pytest.approx(usual["basis"], rel=1e-4)
