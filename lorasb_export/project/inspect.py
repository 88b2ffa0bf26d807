"""What a project has: its basis, and of every task and adapter how far it is and what it scores; what rows teach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .. import basis_source
from ..data.task import load_task
from ..errors import ArtifactError, SettingsError
from ..files.kind import ADAPTER_CONFIG, BASIS_CONFIG, artifact_kind
from ..format import finite, only_numbers, read_adapter_config, read_basis_config
from ..hub.ids import parse_hub_folder
from ..names import adapters_in
from .project import Project


def inspect_project(project: Project) -> dict[str, Any]:
    """What the configs of a project's folders say. No weights are read: ten thousand adapters take seconds.

    Returns:
        `path`; `kind`, which is `project`; `base_model`; `basis`, the shared one, with its `path` and `state` (`made`,
        `missing`, `damaged`) and, if it is made, `rank`, `modules` (their number), `sha256` and `calibrated_on` (names
        of tasks); `adapters` by name, those of the file's tasks first; and `unfinished`, the working folders of runs,
        interrupted or still going. Each adapter has `task` (whether the file has a task of its name), `path` and
        `state` (`fitted`, `not_fitted`, `damaged`; `not_ours` is no LoRA-SB adapter). A fitted one has `basis`
        (`shared`; `own`, inside of it; `other`, with a place of its own; `missing`, which it is of no use without),
        `rank`, `modules`, `steps`, `valid_loss` and `evaluation`, {split: {metric: {base, adapter, rows}}}. What is
        damaged has `problem`.

    Raises:
        SettingsError: the folder is no project and has no adapters.
    """
    names = dict.fromkeys([*project.tasks, *adapters_in(project.adapters_folder)])
    if project.file is None and not names:
        fix = "Name the folder to inspect, or change to the project's"
        raise SettingsError("there is no lorasb.toml here", where=project.folder, fix=fix)
    shared = project.basis_folder
    basis = _basis(shared)
    sha256_of = cache(lambda folder: _basis(folder).get("sha256"))  # many adapters name one
    adapters = {
        name: {"task": name in project.tasks, **_adapter(project.adapter_folder(name), shared, sha256_of)}
        for name in names
    }
    return {
        "path": str(project.folder),
        "kind": "project",
        "base_model": project.model,
        "basis": basis,
        "adapters": adapters,
        "unfinished": sorted(str(path) for path in project.adapters_folder.glob(".*.run") if path.is_dir()),
    }


def inspect_rows(project: Project, data: str, model: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `fit` would train on: `inspect_data`, of a task by its name or of any other rows, as the project has it.

    Args:
        data: a task's name; else a path or a Hub dataset id.
        model: the base, if not the project's.
        flags: settings of `fit` that win over the project's.

    Raises:
        SettingsError: there is no project, and no `model`; else as `inspect_data`.
    """
    settings = project.settings_of(data, flags)
    if model is None and project.file is None:
        fix = "Pass --model, or change to the project's folder"
        raise SettingsError("no base model: there is no lorasb.toml here", where=project.folder, fix=fix)
    base = model or project.require_model()
    task = load_task(data if data in project.tasks else "data", project.find_data(data))
    from ..training.inspect import inspect_data  # only now: it brings torch

    return inspect_data(task, base, settings)


def _basis(folder: Path) -> dict[str, Any]:
    found = {"path": str(folder), "state": "missing"}
    try:
        if not (folder / BASIS_CONFIG).is_file():
            return found
        config, shapes = read_basis_config(folder)
    except (ArtifactError, OSError) as error:
        return found | {"state": "damaged", "problem": str(error)}
    data = config["calibration"].get("data")
    sources = [source for source in data if isinstance(source, dict)] if isinstance(data, list) else []
    return found | {
        "state": "made",
        "rank": config["rank"],
        "modules": len(shapes),
        "sha256": config["sha256"],
        "calibrated_on": [source.get("name") for source in sources],
    }


def _adapter(folder: Path, shared: Path, sha256_of: Callable[[Path], str | None]) -> dict[str, Any]:
    """Of one adapter.

    Args:
        shared: the basis that the project's tasks share.
        sha256_of: basis folder → its digest, None where there is no basis that can be read.
    """
    found = {"path": str(folder), "state": "not_fitted"}
    try:
        if not (folder / ADAPTER_CONFIG).is_file():
            return found
        if artifact_kind(folder) != "adapter":
            return found | {"state": "not_ours"}
        config = read_adapter_config(folder)
    except (ArtifactError, OSError) as error:
        return found | {"state": "damaged", "problem": str(error)}
    training = config["training"]
    return found | {
        "state": "fitted",
        "basis": _place(config["basis"], folder, shared, sha256_of),
        "rank": config["r"],
        "modules": len(config["target_modules"]),
        "steps": finite(training.get("steps")),
        "valid_loss": finite(training.get("valid_loss")),
        "evaluation": only_numbers(training.get("evaluation", {})),
    }


def _place(named: Mapping[str, str], folder: Path, shared: Path, sha256_of: Callable[[Path], str | None]) -> str:
    source = basis_source.resolved(named["source"], folder, None)
    if source is None:
        return "own" if _basis(folder).get("sha256") == named["sha256"] else "missing"
    if parse_hub_folder(source):
        return "other"  # it is looked for when it is needed
    place = Path(source)
    if not place.is_absolute() or sha256_of(place) != named["sha256"]:  # no verb writes a relative one
        return "missing"
    return "shared" if place == shared else "other"
