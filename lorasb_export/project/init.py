"""Write a commented `lorasb.toml`; add tasks to one."""

from __future__ import annotations

import json
import logging
import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..data.row_files import is_rows, read_rows, split_files
from ..data.rows import LABELLED, kind_of
from ..errors import DataError, OutputError, SettingsError, some
from ..files.atomic import atomic_file
from ..files.lock import only_writer
from ..files.output import cannot_write
from ..files.storage import expanded
from ..settings import ALL_LINEAR, MLP_OUTPUT, FitSettings
from .file import FILE_NAME, MAX_BYTES
from .project import OWN_BASIS, Project, refuse_bad_names

logger = logging.getLogger(__name__)

_TEMPLATE = """\
# The project file of lorasb: defaults for every verb run in this folder. Flags win.
model = {model}  # a folder or a Hub id

[basis]  # one frozen basis, calibrated over all tasks below that have none of their own
{basis}
# also: directions ("gradient"; "random" or "block": without data), samples (rows of each task), dtype, seed;
#   targets may be "all-linear", "mlp-output" (the last layer of every MLP), or name endings ("q_proj,v_proj")

[fit]
{fit}
# also: batch_size, learning_rate, max_steps, max_length, dtype ("float32", "bfloat16", "nf4"), checkpoint_every, seed

# [data]  # of every task below that does not say it itself
# columns = {{ prompt = "question", completion = "answer" }}  # field of a row → what the data calls it
# hold_out = 0.1  # of tasks without valid rows: about a tenth of the training rows

{tasks}# each also: columns, hold_out, basis ("own")

# [hub]
# repo = "me/NAME"  # for all of it; with {{name}} in it, one for the basis and for each adapter
"""

TEXT_DEFAULTS: Mapping[str, float | str] = {"rank": 128, "targets": MLP_OUTPUT}
_ALL_LAYERS: Mapping[str, float | str] = {"rank": 64, "targets": ALL_LINEAR}  # of what has labels, and of the paper


def write_project(
    path: str | Path | None,
    model: str,
    tasks: Mapping[str, str],
    *,
    basis: Mapping[str, float | str] | None = None,
    fit: Mapping[str, float | str] | None = None,
    as_published: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a commented `lorasb.toml`.

    Args:
        tasks: name → data.
        basis, fit: what to set in these sections. When None, the default epochs, and a larger R on fewer layers for
            text, R on all of them where the rows have labels: see docs/benchmarks.md. Where only some have, these get a
            basis of their own: one is of one kind of rows.
        as_published: in place of these defaults, train as the paper does (arXiv 2411.19557): every task in a basis of
            its own, on all linear layers, R by AdamW.

    Raises:
        OutputError: the file exists and `overwrite` is false.
        SettingsError: a task's name is not fit for a folder; or the file would be larger than is read.
    """
    path = expanded(path or FILE_NAME)
    if path.exists() and not overwrite:
        raise OutputError("the project file exists", where=path, fix="Edit it, or pass --overwrite")
    refuse_bad_names(tasks)
    labelled = _labelled(path.parent, tasks)
    kinds = set(labelled.values())
    own = set(tasks) if as_published else _others(labelled, kinds)
    its_optimizer = {"optimizer": "adamw"} if as_published else {}
    text = _TEMPLATE.format(
        model=_toml(model),
        basis=_lines(basis or (_ALL_LAYERS if as_published or kinds == {True} else TEXT_DEFAULTS)),
        fit=_lines(fit or {"epochs": FitSettings.epochs, **its_optimizer}),
        tasks="".join(f"{_table(name, data, own=name in own)}\n" for name, data in tasks.items()),
    )
    _write(path, text, len(tasks))
    return path


def add_tasks(project: Project, tasks: Mapping[str, str]) -> list[str]:
    """Put those of `tasks` that `project` does not have at the end of its file; all else in it stays as it is.

    They get a basis of their own where all tasks there have one, or where those that share one have other rows: labels
    beside text.

    Args:
        tasks: name → data.

    Returns:
        The names of those added.

    Raises:
        SettingsError: there is no project file; a task's name is not fit for a folder; the file would be larger than is
            read; or it has its tasks in a form that no table can be added to.
    """
    if project.file is None:
        raise SettingsError("there is no project file to add to", where=FILE_NAME, fix="Leave out --add")
    if tasks.keys() <= project.tasks.keys():
        return []
    with only_writer(project.file, wait=True):  # of two that read the same file one would lose what the other adds
        return _added(Project.load(project.file), project.file, tasks)


def _added(project: Project, file: Path, tasks: Mapping[str, str]) -> list[str]:
    """As `add_tasks`, of a `project` that nobody else writes into its `file`."""
    new = {name: data for name, data in tasks.items() if name not in project.tasks}
    refuse_bad_names(new)
    if new:
        shared = {name: task.data for name, task in project.tasks.items() if task.basis is None}
        labelled = _labelled(project.folder, new)
        kinds = set(_labelled(project.folder, shared).values()) or set(labelled.values())
        own = set(new) if project.tasks and not shared else _others(labelled, kinds)
        before = file.read_bytes().decode("utf-8-sig").rstrip()
        text = "\n\n".join([before, *(_table(name, data, own=name in own) for name, data in new.items())])
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            what = "its tasks stand on one line as an inline table, to which none can be appended"
            fix = "Write each of them as a table, [tasks.NAME]"
            raise SettingsError(what, where=file, fix=fix) from None
        _write(file.resolve(), text, len(project.tasks) + len(new))  # a link stays one
    return list(new)


def _write(path: Path, text: str, tasks: int) -> None:
    if (size := len(text.encode())) > MAX_BYTES:
        what = f"{tasks:,} tasks make a file of {size:,} bytes, and {MAX_BYTES:,} are read"
        raise SettingsError(what, where=path, fix="Use shorter paths")
    with cannot_write(path), atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())


def tasks_in(folder: str) -> dict[str, str]:
    """Name → data of the tasks in `folder`: the folders in it that have a train split, and its .jsonl and .csv files,
    sorted.

    Raises:
        SettingsError: there is none, or two of one name; or the folder is itself a task's, with a train split.
    """
    place = expanded(folder)
    if _has_train(place):
        fix = "Give the folder that it lies in, or name it with --task NAME=DATA"
        raise SettingsError("it has a train split, so it is one task", where=place, fix=fix)
    found: dict[str, Path] = {}
    without_train = []
    for path in sorted(place.glob("[!.]*")):
        if not (is_rows(path) or _has_train(path)):
            without_train += [path.name] * any(map(is_rows, _entries(path)))
            continue
        name = path.stem if path.is_file() else path.name
        if name in found:
            what = f"{found[name].name} and {path.name} are two tasks of one name"
            raise SettingsError(what, where=place, fix="Rename or remove one")
        found[name] = path
    if not found:
        fix = "Give the folder that has a .jsonl or .csv file, or a folder with train.jsonl or train.csv, for each"
        raise SettingsError("there are no tasks in it", where=place, fix=fix)
    if without_train:
        logger.warning("folders with rows and without train.jsonl or train.csv are no tasks: %s", some(without_train))
    return {name: os.path.join(folder, path.name) for name, path in found.items()}


def _has_train(folder: Path) -> bool:
    return any(path.stem == "train" and is_rows(path) for path in _entries(folder))


def _entries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return list(folder.iterdir())
    return []


def _labelled(folder: Path, tasks: Mapping[str, str]) -> dict[str, bool]:
    """Of the tasks whose first row can be read, whether it is labelled. `fit` reads and checks all rows."""
    found = {}
    for name, data in tasks.items():
        with suppress(DataError):
            place = folder / os.path.expanduser(data)
            file = split_files(place).get("train") if place.is_dir() else place
            if first := next(iter(read_rows(file)), None) if file else None:
                found[name] = kind_of(first[1], first[0]) == LABELLED
    return found


def _others(labelled: Mapping[str, bool], kinds: set[bool]) -> set[str]:
    """Tasks that cannot share a basis with those of `kinds`, labelled or not; where these are of both, with text."""
    return {name for name, has in labelled.items() if kinds == {not has} or (has and len(kinds) > 1)}


def _table(name: str, data: str, *, own: bool) -> str:
    return f"[tasks.{_toml(name)}]\n{_lines({'data': data} | ({'basis': OWN_BASIS} if own else {}))}\n"


def _toml(value: float | str) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML takes no surrogates


def _lines(values: Mapping[str, float | str]) -> str:
    return "\n".join(f"{key} = {_toml(value)}" for key, value in values.items())
