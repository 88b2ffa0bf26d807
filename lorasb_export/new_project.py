"""Write a commented `lorasb.toml`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .errors import OutputError
from .output import cannot_write, replaced_file
from .project import FILE_NAME, refuse_bad_names
from .settings import CalibrationSettings, FitSettings

_TEMPLATE = """\
# The project file of lorasb: defaults for every verb run in this folder. Flags win.
model = {model}  # a folder or a Hub id

[basis]  # one frozen basis, calibrated over all tasks below
{basis}
# also: directions ("gradient"; "random" or "block": without data), samples (rows of each task), dtype, seed,
#   targets ("all-linear", "mlp-output", or module name endings: "q_proj,v_proj")

[fit]
{fit}
# also: batch_size, learning_rate, max_steps, max_length, dtype ("float32", "bfloat16"), checkpoint_every, seed

{tasks}
# [hub]
# repo = "me/{{name}}-lorasb"  # one for the basis and for each adapter
"""


def write_project(
    path: str | Path | None,
    model: str,
    tasks: Mapping[str, str],
    *,
    basis: Mapping[str, float] | None = None,
    fit: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a commented `lorasb.toml`.

    Args:
        tasks: name → data.
        basis, fit: numbers to set in these sections; the rank and the epochs, at their defaults, when None.

    Raises:
        OutputError: the file exists and `overwrite` is false.
        SettingsError: a task's name is not fit for a folder.
    """
    path = Path(path or FILE_NAME)
    if path.exists() and not overwrite:
        raise OutputError("the project file exists", where=path, fix="Edit it, or pass --overwrite")
    refuse_bad_names(tasks)
    text = _TEMPLATE.format(
        model=_quoted(model),
        basis=_lines(basis or {"rank": CalibrationSettings.rank}),
        fit=_lines(fit or {"epochs": FitSettings.epochs}),
        tasks="".join(f"[tasks.{_quoted(name)}]\ndata = {_quoted(data)}\n\n" for name, data in tasks.items()),
    )
    with cannot_write(path), replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML takes no surrogates


def _lines(values: Mapping[str, float]) -> str:
    return "\n".join(f"{key} = {value}" for key, value in values.items())
