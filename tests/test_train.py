"""Training: it learns and writes the whole folder; what it would spoil, or what spoils it, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasb_export import Adapter, Basis, fit, load_task
from lorasb_export.errors import BaseModelError, OutputError, TrainingError
from lorasb_export.files.lock import only_writer
from lorasb_export.settings import FitSettings
from tests import training
from tests.training import SETTINGS

basis = training.basis


def test_it_learns_and_writes_the_whole_folder(llama: Path, sums: Path, basis: Path) -> None:
    out = basis.parent / "adapters" / "learns"
    adapter = fit(str(llama), basis, sums, out, FitSettings(epochs=12, learning_rate=1.5e-2))
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "lorasb.json",
        "training.png",
        "training_log.jsonl",
    ]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    loaded = Adapter.load(out)
    assert loaded.training == json.loads(json.dumps(adapter.training))
    task = load_task("sums", sums)
    assert loaded.training["splits_sha256"] == {split: task.split_sha256(split) for split in ("train", "valid", "test")}
    assert loaded.load_basis().sha256 == Basis.load(basis).sha256
    assert not (out.parent / ".learns.run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_fit_into_the_same_folder_leaves_the_first_alone(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, resume: bool
) -> None:
    running = tmp_path / ".a.run"
    running.mkdir()
    (running / "half a checkpoint").write_text("…")
    with only_writer(tmp_path / "a"), pytest.raises(OutputError, match="another process is writing this target"):
        fit(str(llama), basis, sums, tmp_path / "a", resume=resume, overwrite=True)
    assert (running / "half a checkpoint").exists()


def test_the_basis_is_not_overwritten(llama: Path, sums: Path, basis: Path) -> None:
    with pytest.raises(OutputError, match="the target holds what it is made from"):
        fit(str(llama), basis, sums, basis, SETTINGS, overwrite=True)
    Basis.load(basis)


def test_a_diverging_run_is_stopped_and_named(llama: Path, sums: Path, basis: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss of a is not finite at step \d+, on training rows \d+"):
        fit(
            str(llama),
            basis,
            sums,
            basis.parent / "diverges" / "a",
            FitSettings(max_steps=40, learning_rate=1e30, max_grad_norm=1e30),
        )


def test_a_basis_of_another_base_is_refused(bert: Path, llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no weight for module"):
        fit(str(bert), basis, sums, tmp_path / "a", SETTINGS)
    assert list(tmp_path.iterdir()) == []
