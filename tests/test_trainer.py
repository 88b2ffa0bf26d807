"""A step of the loop: one R however it is computed, in little memory, without waits; and what its checkpoint holds."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

from lorasb_export import calibrate, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import TaskData, load_task, task_of
from lorasb_export.layers.layer import LoRASBLinear
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit_together
from lorasb_export.training.trainer import RTrainer
from tests.training import SETTINGS, equal


def test_forward_passes_of_one_step_train_the_R_of_one_batch(
    llama: Path, basis: Path, products: Path, tmp_path: Path
) -> None:
    """Of rows with few and with many labels: a mean of the passes' means would count those of short rows more."""
    settings = replace(SETTINGS, max_steps=4, optimizer="adamw")
    one, several = (
        fit(str(llama), basis, products, tmp_path / f"{size}", replace(settings, batch_size=size, accumulate=passes))
        for size, passes in ((8, 1), (4, 2))
    )
    assert equal(one, several, 1e-9)
    assert several.training["train_loss"] == pytest.approx(one.training["train_loss"], rel=1e-9)


def test_gradient_checkpointing_trains_the_same_R(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    plain = fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS)
    network, asked = BaseModel.resolve(llama).load(dtype="float64"), []
    network.model.layers[0].register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].requires_grad))
    settings = replace(SETTINGS, gradient_checkpointing=True)
    recomputed = fit(str(llama), basis, tasks["plus"], tmp_path / "b", settings, network=network)
    assert equal(plain, recomputed, 1e-9)
    assert set(asked) == {False}  # nothing goes back to the embeddings


@pytest.mark.parametrize("kind", ["text", "together", "classes"])
def test_a_training_step_never_waits_for_the_device(
    llama: Path, bert: Path, sums: Path, parity: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors have no values here: whatever asks for one, `.item()`, `.tolist()`, a mask as an index, raises."""
    step = RTrainer.training_step

    def without_values(self: RTrainer, model: Any, *arguments: Any) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            step(self, model, *arguments)
            self._clip_grad_norm(model)
        raise EOFError("the step is over")

    monkeypatch.setattr(RTrainer, "training_step", without_values)
    base, data = (bert, parity) if kind == "classes" else (llama, sums)
    drawn = calibrate(str(base), {}, CalibrationSettings(rank=4, directions="random"))
    one, other = (load_task(name, data) for name in ("one", "other"))
    train: Any = partial(fit, str(base), drawn, one, tmp_path / "one")
    if kind == "together":
        train = partial(fit_together, str(base), drawn, [one, other], tmp_path)
    with pytest.raises(EOFError, match="the step is over"):
        train(FitSettings(max_steps=2, accumulate=2))


def test_the_base_of_a_finished_run_makes_room_for_the_next_one(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever cycle holds it; on a device both might not fit. `meta` stands for one."""
    load, loaded = BaseModel.load, []

    def watched(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        network = load(self, *arguments, **options)
        loaded.append(weakref.ref(network))
        return network

    monkeypatch.setattr(BaseModel, "load", watched)
    gc.disable()  # by itself it comes at some moment or other
    try:
        fit(str(llama), basis, tasks["plus"], tmp_path / "plus", replace(SETTINGS, max_steps=1))
        BaseModel.resolve(llama).load(device="meta")
    finally:
        gc.enable()
    assert loaded[0]() is None


@pytest.mark.parametrize("together", [False, True])
def test_a_finished_run_lets_go_of_B_and_A_at_once(
    together: bool,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device those of the next run need the room; in a cycle they would stay until Python's collector comes."""
    network, kept = BaseModel.resolve(llama).load(dtype="float64"), []
    begin, trainers = RTrainer.create_optimizer, []

    def watched(self: RTrainer, model: Any = None) -> Any:
        layers = [layer for layer in network.modules() if isinstance(layer, LoRASBLinear)]
        kept.extend(weakref.ref(factor) for layer in layers for factor in (layer.B, layer.A))
        trainers.append(weakref.ref(self))  # DistributedDataParallel, which it holds, has lists of them too
        return begin(self, model)

    monkeypatch.setattr(RTrainer, "create_optimizer", watched)
    settings = replace(SETTINGS, max_steps=2)
    gc.collect()
    gc.disable()
    try:
        if together:
            fit_together(str(llama), basis, list(tasks.values()), tmp_path, settings, network=network)
        else:
            fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings, network=network)
        assert kept
        assert not any(factor() is not None for factor in kept)
        assert [trainer() for trainer in trainers] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("optimizer", "state"), [("adamw", "exp_avg"), ("muon", "momentum")])
def test_a_checkpoint_holds_R_and_the_optimizer_and_no_pickle_of_ours(
    optimizer: str,
    state: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorasb_export.training.job.discard", lambda *_: None)
    settings = replace(SETTINGS, max_steps=3, dtype="auto", optimizer=optimizer)
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    (checkpoint,) = (tmp_path / ".a.run").glob("checkpoint-*")
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "adapter-0.safetensors",
        "complete.json",
        "optimizer.pt",  # the last three are the Trainer's own, read with weights_only
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    R = load_file(checkpoint / "adapter-0.safetensors")
    assert sum(of[state].numel() for of in moments.values()) == sum(t.numel() for t in R.values())


def test_a_base_in_float16_gives_R_the_gradient_of_float32(
    llama: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mean over so many labels float16 would hold little: each one's share is near its least number."""
    task = task_of("long", {"train": [{"text": "a sentence of so many words " * 18} for _ in range(32)]})
    found: list[torch.Tensor] = []

    def keep(self: RTrainer, model: object) -> torch.Tensor:
        found.append(torch.cat([p.grad.flatten() for p in self._parameters[0]]))
        return found[-1].norm()

    monkeypatch.setattr(RTrainer, "_clip_grad_norm", keep)
    for dtype in ("float32", "float16"):
        fit(llama, basis, task, tmp_path / dtype, FitSettings(max_steps=1, batch_size=32, dtype=dtype))
    expected, of_half = found
    assert (of_half - expected).norm() < 0.005 * expected.norm()
