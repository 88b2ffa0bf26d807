"""What can be set, and the learning rate where none is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import calibrate, fit
from lorasb_export.data.task import TaskData
from lorasb_export.errors import SettingsError
from lorasb_export.settings import CalibrationSettings, FitSettings


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((CalibrationSettings, name) for name in ("loss", "directions", "reduction", "dtype")), (FitSettings, "dtype")],
)
def test_a_setting_that_is_none_of_the_choices_is_refused(kind: Callable[..., Any], name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is 'int8'\. Use \w+, "):
        kind(**{name: "int8"})


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (CalibrationSettings, "samples", (0, 1.5, math.nan, math.inf)),
        (CalibrationSettings, "eta", (0, math.nan, math.inf)),
        *((CalibrationSettings, name, (0, -1, 2**63)) for name in ("rank", "batch_size", "max_length")),
        *((FitSettings, name, (0, -1, 2**63)) for name in ("batch_size", "accumulate", "max_length")),
        *((FitSettings, f"{name}_every", (0, -1)) for name in ("checkpoint", "evaluate")),
        *((FitSettings, name, (0, -1)) for name in ("max_steps", "patience")),
        (CalibrationSettings, "seed", (-1, 2**32)),
        (FitSettings, "seed", (-1, 2**32)),
        (FitSettings, "epochs", (0, math.nan, math.inf, 1e308)),
        (FitSettings, "learning_rate", (0, -1, math.nan, math.inf, 1e39)),
        (FitSettings, "scaling", (0, math.nan)),
        (FitSettings, "warmup", (-3, 1, 100, math.nan)),
        (FitSettings, "weight_decay", (-1, math.nan)),
        (FitSettings, "max_grad_norm", (-1, math.nan, math.inf)),
    ],
)
def test_numbers_out_of_range_are_refused(kind: Callable[..., Any], name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=rf"^{name} is {re.escape(str(value))}"):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value", "right"),
    [
        (CalibrationSettings, "rank", 4.5, "int"),
        (CalibrationSettings, "rank", None, "int"),
        (CalibrationSettings, "samples", True, "int or float"),
        (FitSettings, "batch_size", "8", "int"),
        (FitSettings, "max_steps", 2.5, "int"),
        (FitSettings, "learning_rate", "1e-3", "int or float or list or tuple"),
    ],
)
def test_values_of_another_type_are_refused(kind: Callable[..., Any], name: str, value: object, right: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is {value!r}, which has the wrong type. Give .*{right}$"):
        kind(**{name: value})


def test_a_list_of_targets_is_one_of_endings() -> None:
    targets: Any = ["q_proj", "v_proj"]
    assert CalibrationSettings(targets=targets).targets == "q_proj,v_proj"
    with pytest.raises(SettingsError, match=r"^targets is 4, which"):
        CalibrationSettings(targets=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "task_type", "directions", "rank", "share", "rate"),
    [
        ("muon", "CAUSAL_LM", "gradient", 64, 1, 3e-3),
        ("muon", "CAUSAL_LM", "gradient", 16, 1, 9e-3),
        ("muon", "CAUSAL_LM", "gradient", 256, 1, 1e-3),
        ("muon", "CAUSAL_LM", "random", 64, 1, 9e-3),
        ("muon", "SEQ_CLS", "random", 16, 1, 9e-3),
        ("muon", "CAUSAL_LM", "block", 64, 1 / 4, 1.8e-2),
        ("adamw", "CAUSAL_LM", "gradient", 16, 1 / 4, 6e-3),
    ],
)
def test_the_learning_rate_fits_the_basis(
    optimizer: str, task_type: str, directions: str, rank: int, share: float, rate: float
) -> None:
    found = FitSettings(optimizer=optimizer).for_task(task_type, directions, rank, share)
    assert found.learning_rate == rate
    if task_type == "SEQ_CLS":
        assert found.head_learning_rate == 1e-3  # it is AdamW's, and knows no rank


ONE_STEP = FitSettings(max_steps=1)


def test_the_learning_rate_fits_the_kind_of_task(
    llama: Path, bert: Path, basis: Path, tasks: dict[str, TaskData], parity: Path, tmp_path: Path
) -> None:
    text, classes = (str(llama), basis, tasks["plus"]), (str(bert), CalibrationSettings(rank=4), parity)
    of_two = CalibrationSettings(rank=8, targets="q_proj,v_proj")  # of seven linear layers of a block
    for number, (made, settings, rate) in enumerate(
        (
            (text, ONE_STEP, 1.6e-2),
            ((text[0], of_two, text[2]), ONE_STEP, 2.9e-2),
            ((text[0], calibrate(str(llama), {}, replace(of_two, directions="block")), text[2]), ONE_STEP, 8.7e-2),
            (text, FitSettings(max_steps=1, optimizer="adamw"), 6e-3),
            (classes, ONE_STEP, 9e-3),
            (classes, FitSettings(max_steps=1, learning_rate=2e-3), 2e-3),
        )
    ):
        assert fit(*made, tmp_path / str(number), settings).training["settings"]["learning_rate"] == rate
