"""A loaded network that the caller gives, and the caller's random state: used, checked, and left as they were."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasb_export import calibrate, fit
from lorasb_export.base import BaseModel
from lorasb_export.data import TaskData
from lorasb_export.errors import SettingsError
from lorasb_export.given_network import is_checkpointing
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit_together

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
