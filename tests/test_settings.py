"""What can be set, and the learning rate where none is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

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
        (CalibrationSettings, "seed", (-1, 2**32)),
        (FitSettings, "seed", (-1, 2**32)),
        (FitSettings, "epochs", (0, math.nan, math.inf)),
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
