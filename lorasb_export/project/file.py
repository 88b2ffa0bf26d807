"""What a `lorasb.toml` may say: its sections and keys, read and checked."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.source import TaskSource
from ..errors import SettingsError
from ..names import name_problem
from ..settings import CalibrationSettings, FitSettings, is_one_of, types_of

FILE_NAME = "lorasb.toml"
MAX_BYTES = 4_000_000  # ten thousand tasks take half a million, of long names and paths a whole one
_MAX_DOTS = 16  # before Python 3.14 tomllib takes minutes over a key of many parts
_LONG_KEY = re.compile(rf"""(?<![\w\\-])((?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[\w-]+)[ \t]*\.[ \t]*){{{_MAX_DOTS + 1}}}""")

_FLAGS = {"lr": "learning_rate"}  # whose name is nothing like the key's


@dataclass(frozen=True)
class Task:
    """One `[tasks.NAME]` table, and of `[data]` what that table says nothing of.

    Attributes:
        data: folder, file or Hub dataset id.
        columns, hold_out, subset, splits: of the data: see `TaskSource`. A `hold_out` of None: nothing was said of it.
        basis: a basis of its own, in place of the project's shared one.
        weight: of the task's rows in the calibration of the shared basis.
        fit: how it is trained otherwise than `[fit]` says.
    """

    data: str
    columns: Mapping[str, str] = field(default_factory=dict)
    hold_out: float | None = None
    subset: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    basis: str | None = None
    weight: float = 1.0
    fit: Mapping[str, Any] = field(default_factory=dict)


_Types = Mapping[str, tuple[type, ...]]  # key → what its value may be

# A table is checked by itself.
_TOP: _Types = {"model": (str,), "revision": (str,), "basis": (), "fit": (), "data": (), "tasks": (), "hub": ()}
_SECTIONS: dict[str, _Types] = {
    "basis": {"path": (str,), **types_of(CalibrationSettings), "targets": (str, list)},
    "fit": types_of(FitSettings),
    "data": {"columns": (dict,), "hold_out": (int, float)},
    "tasks.NAME": {**types_of(Task), "columns": (dict,), "splits": (dict,), "fit": (dict,)},
    "hub": {"repo": (str,), "public": (bool,)},
}
# The base is loaded once for all tasks, in one dtype, and heads are drawn by one seed.
_OF_A_TASK = {key: types for key, types in _SECTIONS["fit"].items() if key not in ("dtype", "seed")}


def read_project_file(path: Path) -> dict[str, Any]:
    """The tables of a project file, whose keys and values are all ones that it may have.

    Raises:
        SettingsError: it is not TOML, or has unknown keys or values of a wrong type; all problems at once.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a byte order mark
        if _LONG_KEY.search(text):
            raise ValueError(f"a key of more than {_MAX_DOTS} parts")
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"not valid TOML: {error}", where=path, fix="Correct it there") from None
    problems = _problems(content)
    if problems:
        raise SettingsError("; ".join(problems), where=path, fix="Correct these lines")
    return content


def nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(_FLAGS.get(word, word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _hint(key: str, keys: Iterable[str]) -> str:
    """For a key that is none of `keys`: the sections that have it, the nearest of `keys`, or all of them."""
    homes = [f"[{section}]" for section, of_section in _SECTIONS.items() if key in of_section]
    if homes:
        return f" (it is a key of {' and of '.join(homes)})"
    return nearest(key, keys) or f" (there are: {', '.join(keys)})"


def _problems(content: Mapping[str, Any]) -> list[str]:
    """Every unknown key and every value of a wrong type."""
    found = _check_table("", content, _TOP)
    for section in ("basis", "fit", "hub"):
        found += _check_table(section, content.get(section, {}), _SECTIONS[section])
    common = content.get("data", {})
    found += _check_table("data", common, _SECTIONS["data"]) or _wrong_source("data", "", common)
    tasks = content.get("tasks", {})
    if not isinstance(tasks, dict):
        return [*found, "[tasks] must be a table"]
    for name, table in tasks.items():
        found += filter(None, [name_problem(name)])  # `fit` and `init` refuse those that are taken
        wrong = _check_table(f"tasks.{name}", table, _SECTIONS["tasks.NAME"])
        if isinstance(table, dict):
            wrong += _check_table(f"tasks.{name}.fit", table.get("fit", {}), _OF_A_TASK)
        if isinstance(table, dict) and "data" not in table:
            wrong.append(f"[tasks.{name}] lacks data")
        if not wrong and not 0 < table.get("weight", 1) < math.inf:
            wrong.append(f"[tasks.{name}] weight = {table['weight']} is not a positive number")
        found += wrong or _wrong_source(f"tasks.{name}", table["data"], table)
    return found


def _wrong_source(section: str, path: str, table: Mapping[str, Any]) -> list[str]:
    """What is wrong with what a table says of data."""
    try:
        TaskSource.of(path, table)
    except SettingsError as error:
        return [f"[{section}] {error.what}: {error.fix}"]
    return []


def _check_table(section: str, table: Any, types: _Types) -> list[str]:
    place = f"[{section}] " if section else ""
    if not isinstance(table, dict):
        return [f"{place}must be a table"]
    problems = [f"{place}unknown key {key!r}{_hint(key, types)}" for key in table if key not in types]
    for key, value in table.items():
        allowed = types.get(key)
        if allowed and not is_one_of(value, allowed):
            right = " or ".join(kind.__name__ for kind in allowed)
            problems.append(f"{place}{key} = {value!r} has the wrong type: it takes {right}")
    return problems
