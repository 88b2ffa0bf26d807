"""What a project has: its basis, and of every task and adapter how far it is and what it scores."""

from __future__ import annotations

from typing import Any

from .basis_source import EMBEDDED
from .errors import ArtifactError
from .format import read_adapter_config, read_basis_config
from .project import Project


def inspect_project(project: Project) -> dict[str, Any]:
    """What the configs of a project's folders say. No weights are read: ten thousand adapters take seconds.

    Returns:
        `path`; `kind`, which is `project`; the `base_model`; the shared `basis`, None where it is not made yet; the
        `adapters` by name, first the file's tasks and then those of no task; and `unfinished`, the working folders of
        runs, interrupted or still going. A basis or adapter that cannot be read has only `state`, `damaged`, and
        `problem`.

    Raises:
        SettingsError: the folder is no project and has no adapters.
    """
    names = dict.fromkeys([*project.tasks, *project.adapter_names()])
    if project.file is None and not names:
        raise project.lacks("nothing to inspect", "Name a folder")
    basis = _basis(project)
    sha256 = basis.get("sha256") if basis else None
    return {
        "path": str(project.folder),
        "kind": "project",
        "base_model": project.model,
        "basis": basis,
        "adapters": {name: _adapter(project, name, sha256) for name in names},
        "unfinished": sorted(str(path) for path in (project.folder / "adapters").glob(".*.run") if path.is_dir()),
    }


def _basis(project: Project) -> dict[str, Any] | None:
    folder = project.path(project.basis_path)
    if not (folder / "basis_config.json").is_file():
        return None
    found: dict[str, Any] = {"path": str(folder)}
    try:
        config, shapes = read_basis_config(folder)
    except ArtifactError as error:
        return found | {"state": "damaged", "problem": str(error)}
    made_for = [source.get("name") for source in config["calibration"].get("data", [])]
    return found | {
        "state": "made",
        "rank": config["rank"],
        "modules": len(shapes),
        "sha256": config["sha256"],
        "calibrated_on": made_for,
    }


def _adapter(project: Project, name: str, shared: str | None) -> dict[str, Any]:
    """Of one adapter.

    Args:
        shared: sha256 of the basis that the project's tasks share.
    """
    folder = project.adapter_folder(name)
    if not (folder / "adapter_config.json").is_file():
        return {"state": "not fitted"}
    try:
        config = read_adapter_config(folder)
    except ArtifactError as error:
        return {"state": "damaged", "problem": str(error)}
    source, training = config["basis"]["source"], config["training"]
    of_adapter = "own" if source == EMBEDDED else source
    return {
        "state": "fitted",
        "basis": "shared" if config["basis"]["sha256"] == shared else of_adapter,
        "rank": config["r"],
        "modules": len(config["target_modules"]),
        "steps": training.get("steps"),
        "valid_loss": training.get("valid_loss"),
        "evaluation": training.get("evaluation", {}),
    }
