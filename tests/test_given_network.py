"""A loaded network that the caller gives, and the caller's random state: used, checked, and left as they were."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from lorasb_export import calibrate, distributed, evaluate, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.base.structure import is_checkpointing
from lorasb_export.data.task import TaskData
from lorasb_export.errors import SettingsError
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit_together
from lorasb_export.training.requirements import check_requirements

SETTINGS = FitSettings(max_steps=1, batch_size=3, learning_rate=1e-2, dtype="float64")


def test_the_callers_network_is_given_back_as_it_was(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    network = BaseModel.resolve(llama).load(dtype="float64")
    cached = network.config.use_cache
    settings = replace(SETTINGS, gradient_checkpointing=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings, network=network)
    after = network.state_dict()
    assert set(after) == set(before)  # without an adapter, as of several rates it would be the last one's
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert network.config.use_cache == cached
    assert not network.training
    assert not is_checkpointing(network)
    assert not network.get_input_embeddings()._forward_hooks  # of input gradients, which checkpointing asks for


def test_what_asked_for_gradients_asks_for_them_again(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    network = BaseModel.resolve(llama).load(dtype="float64")
    network.model.layers.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert set(before.values()) == {True, False}
    with torch.no_grad():  # as in a cell of a notebook
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS, network=network)
    evaluate(tmp_path / "a", tasks["plus"], split="valid", network=network)
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == before


def test_an_accelerator_of_the_callers_is_as_before(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    mine = Accelerator(gradient_accumulation_steps=8, mixed_precision="bf16", cpu=True)
    try:
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS)
        assert (mine.gradient_accumulation_steps, mine.mixed_precision) == (8, "bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_runs_that_mpirun_starts_side_by_side_are_each_by_themselves(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would join them on a CPU, and write what torchrun sets into the environment."""
    sizes = dict.fromkeys(("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), "2")
    for name, value in sizes.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS)
    assert {name: value for name, value in os.environ.items() if name in sizes or name not in before} == sizes
    assert not dist.is_initialized()


def test_what_wraps_a_model_is_refused(llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path) -> None:
    compiled: Any = torch.compile(BaseModel.resolve(llama).load(dtype="float64"))
    for call in (
        lambda: fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS, network=compiled),
        lambda: calibrate(str(llama), tasks, CalibrationSettings(rank=4, dtype="float64"), network=compiled),
    ):
        with pytest.raises(SettingsError, match=r"the network is a OptimizedModule.*compile or wrap it afterwards"):
            call()


def test_a_classifier_that_pads_with_another_token_is_refused(bert: Path, parity: Path, tmp_path: Path) -> None:
    network = BaseModel.resolve(bert).load("SEQ_CLS", num_labels=2)
    network.config.pad_token_id = 5
    with pytest.raises(SettingsError, match=r"takes token 5 for padding.*Set network\.config\.pad_token_id = "):
        calibrate(str(bert), {"parity": parity}, CalibrationSettings(rank=2), network=network)


def test_weights_are_read_by_every_process_of_a_launcher(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `accelerate launch --use_fsdp` transformers would read them on the first alone, and zeros elsewhere."""
    expected = BaseModel.resolve(llama).load().state_dict()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    try:
        found = BaseModel.resolve(llama).load().state_dict()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_launcher_that_shards_and_a_group_of_ones_own_are_refused(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(SettingsError, match=r"fit does not train under FSDP \(ACCELERATE_USE_FSDP\)"):
            fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(SettingsError, match=r"torch\.distributed has 2 processes.*as torchrun does"):
        calibrate(str(llama), tasks, CalibrationSettings(rank=4, dtype="float64"))


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_no_way_to_shard_that_a_launcher_has_is_trained_under(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(SettingsError, match=rf"fit does not train under {way} \(ACCELERATE_USE_{way}\)"):
        check_requirements([], FitSettings())


@pytest.mark.parametrize(
    ("there", "missing"), [({}, "RANK and LOCAL_RANK"), ({"RANK": "0"}, "LOCAL_RANK"), ({"LOCAL_RANK": "0"}, "RANK")]
)
def test_an_environment_that_describes_processes_by_half_is_refused(
    there: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some operators of clusters write it; one process alone needs neither."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.start()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=rf"WORLD_SIZE is 2, without {missing}\. Set RANK, LOCAL_RANK"):
        distributed.start()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_what_is_no_number_in_the_environment_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", name: "two"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=rf"{name} is 'two', no whole number\. .*unset {name}"):
        distributed.start()


def test_what_is_drawn_after_a_fit_is_as_without_it(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    def states() -> tuple[object, ...]:
        of_numpy = np.random.get_state(legacy=False)["state"]
        return random.getstate(), of_numpy["key"].tolist(), of_numpy["pos"], torch.get_rng_state().tolist()

    before = states()
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS)
    assert states() == before


def test_a_network_on_several_devices_is_refused(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    network = BaseModel.resolve(llama).load(dtype="float64")
    network.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS, network=network)
    network.hf_device_map = {"model": "cpu", "lm_head": 0}
    with pytest.raises(SettingsError, match=r"several devices.*Adapter\.attach"):
        fit(str(llama), basis, tasks["plus"], tmp_path / "b", SETTINGS, network=network)
    with pytest.raises(SettingsError, match="several devices"):
        calibrate(str(llama), tasks, CalibrationSettings(rank=4, samples=2), network=network)


def test_a_network_that_the_settings_or_the_rows_do_not_fit_is_refused(
    llama: Path, bert: Path, basis: Path, tasks: dict[str, TaskData], parity: Path, tmp_path: Path
) -> None:
    text, classes = BaseModel.resolve(llama).load(), BaseModel.resolve(bert).load("SEQ_CLS", num_labels=3)
    drawn, out = CalibrationSettings(rank=2, directions="random", dtype="bfloat16"), tmp_path / "a"
    for call in (
        lambda: fit(str(llama), basis, tasks["plus"], out, FitSettings(dtype="bfloat16"), network=text),
        lambda: fit_together(str(llama), basis, [*tasks.values()], out, FitSettings(dtype="bfloat16"), network=text),
        lambda: calibrate(str(llama), {}, drawn, network=text),
    ):
        with pytest.raises(SettingsError, match=r"dtype is bfloat16, the network that was given is float32\. Set"):
            call()
    gradient = CalibrationSettings(rank=2)
    for other in (
        lambda: fit(str(bert), gradient, parity, out, network=classes),
        lambda: calibrate(str(bert), {"parity": parity}, gradient, network=classes),
    ):
        with pytest.raises(SettingsError, match=r"given is a classifier \(outputs: 3\), the rows need a .*: 2\)"):
            other()
    with pytest.raises(SettingsError, match=r"the network that was given is a model of text, the rows need a class"):
        fit(str(bert), gradient, parity, out, network=text)
    fit(str(llama), basis, tasks["plus"], out, FitSettings(max_steps=1, dtype="float32"), network=text)


def test_the_callers_classifier_keeps_its_head(bert: Path, parity: Path, tmp_path: Path) -> None:
    """Or a second `fit` on the same network would start from the head of the first."""
    network = BaseModel.resolve(bert).load("SEQ_CLS", num_labels=2)
    drawn = CalibrationSettings(rank=4, directions="random")
    for rates in (1e-2, (1e-2, 1e-3)):
        settings = FitSettings(max_steps=2, learning_rate=rates, metric="accuracy")
        inputs = str(bert), drawn, parity, tmp_path / "a", settings
        first, second = (fit(*inputs, overwrite=True, network=network).sha256 for _ in range(2))
        assert first == second == fit(*inputs, overwrite=True).sha256
