"""The basis that the tasks of a project share: found, made, not taken away from the adapters trained in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .. import distributed
from ..base.model import BaseModel
from ..basis import Basis
from ..basis_source import EMBEDDED
from ..calibration.calibrate import calibrate, calibrated_once
from ..calibration.requirements import check
from ..cards import card
from ..data.source import AnySource
from ..errors import OutputError, SettingsError, some
from ..files.kind import BASIS_WEIGHTS
from ..files.lock import only_writer
from ..files.output import is_free, refuse_existing
from ..files.storage import absolute, sha256_file
from ..format import read_adapter_config
from ..hub.ids import is_mistyped_path, parse_hub_folder
from ..names import ours_in
from ..settings import DRAWN, CalibrationSettings
from ..training.checkpoints import runs_begun
from .project import OWN_BASIS, Project

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def basis_of_task(project: Project, name: str) -> str:
    """Where the basis of a task is, or `own`."""
    own = project.tasks[name].basis if name in project.tasks else None
    if own is None:
        return str(project.basis_folder)
    is_path = project.path(own).exists() or is_mistyped_path(own, project.folder)
    return str(project.path(own)) if own != OWN_BASIS and is_path else own


def shared_folder(project: Project) -> Path:
    """Where the basis that the project's tasks share is, or is to be made.

    Raises:
        SettingsError: it reads like one of the Hub, whose place a new basis would take.
    """
    folder = project.basis_folder
    if parse_hub_folder(project.basis_path) and not folder.parent.is_dir():
        fix = f"Name that one as basis in [tasks.NAME], or with --basis; for a new folder write ./{project.basis_path}"
        raise SettingsError("path reads like a basis of the Hub", where="[basis]", fix=fix)
    return folder


def is_shared(project: Project, source: str | Path) -> bool:
    """Whether `source`, as it is written here, is the folder of the basis that the project's tasks share."""
    return absolute(source) == project.basis_folder


def load_or_make(
    project: Project,
    source: str,
    base: BaseModel,
    tasks: Mapping[str, AnySource],
    calibration: CalibrationSettings,
    network: Callable[[], PreTrainedModel | None],
) -> Basis:
    """The basis at `source`; where that is the project's shared one and not there yet, it is made.

    It is calibrated over all tasks that share it in the project's file; over `tasks`, name → data, where it has none.
    One that cannot be trained, for it has nothing to learn, is passed over: its own training says so.

    Args:
        network: gives the loaded base, or None; asked only where a basis is made.

    Raises:
        SettingsError: the shared one is not as the project's file has it.
    """
    if not is_shared(project, source):
        return _of_others(source, base)

    def make() -> Basis:
        sharing = _sharing(project, tasks, calibration)
        weights = project.weights(sharing)
        return calibrate(base, sharing, calibration, weights=weights, network=network(), pass_over=True)

    return _as_said(project, calibrated_once(shared_folder(project), make))


def _sharing(
    project: Project, tasks: Mapping[str, AnySource], calibration: CalibrationSettings
) -> dict[str, AnySource]:
    """The data that the project's shared basis is made from: none of a drawn one."""
    names = [] if calibration.directions in DRAWN else project.shared_tasks() or list(tasks)
    return {name: tasks.get(name) or project.task_source(name) for name in names}


def check_to_be_made(
    project: Project, base: BaseModel, tasks: Mapping[str, AnySource], calibration: CalibrationSettings
) -> None:
    """Raise what is seen without weights to be wrong with the shared basis that `load_or_make` would make."""
    check(base, _sharing(project, tasks, calibration), calibration)


def load_if_there(project: Project, source: str, base: BaseModel) -> Basis | None:
    """The basis at `source`; None where that is the project's shared one, and it is still to be made.

    Raises:
        SettingsError: the shared one is not as the project's file has it.
    """
    if is_shared(project, source):
        folder = shared_folder(project)
        return None if is_free(folder) else _as_said(project, Basis.load(folder))
    return _of_others(source, base)


def _of_others(source: str, base: BaseModel) -> Basis:
    basis = Basis.load(source)
    base.verify(basis.base, basis.modules)
    return basis


def _as_said(project: Project, basis: Basis) -> Basis:
    """The project's shared basis, or a SettingsError where its file says that it is another."""
    if differing := basis.differences(project.calibration):
        raise SettingsError(
            f"the project's basis does not match [basis] in lorasb.toml: {', '.join(differing)}",
            where=shared_folder(project),
            fix="Correct [basis] there, or calibrate another with --out and name it by path in [basis]",
        )
    return basis


def calibrate_into(
    project: Project,
    target: Path,
    settings: CalibrationSettings,
    *,
    model: str | None,
    tasks: Mapping[str, AnySource],
    weights: Mapping[str, float],
    overwrite: bool,
) -> Basis:
    """Calibrate a basis into the folder `target`; under torchrun the processes share the rows.

    Args:
        model: the base, where it is not the project's.
        tasks: name → data; without any those that share the project's basis.
        weights: of tasks, in place of the project's.

    Raises:
        OutputError: `target` exists, or adapters of the project were trained in it.
        SettingsError: there is no task, though one is needed; and as `calibrate`, with its other errors.
    """
    _refuse_to_strand(project, target)
    if not tasks and settings.directions not in DRAWN:
        tasks = {name: project.task_source(name) for name in project.shared_tasks()}
        if not tasks:
            raise project.lacks("no task to calibrate on", "Add [tasks.NAME] data = …, or pass --data NAME=PATH")
    weights = {**project.weights(tasks), **weights}
    distributed.start()
    with ExitStack() as lock:

        def take() -> None:
            lock.enter_context(only_writer(target))
            refuse_existing(target, overwrite, kind="basis")
            card.check(target)

        distributed.on_main(take)
        base = BaseModel.resolve(model or project.require_model())
        basis = calibrate(base, tasks, settings, weights=weights)
        if distributed.is_main():
            _refuse_to_strand(project, target)  # by an adapter that was trained meanwhile
            basis.save(target, overwrite=overwrite)
        distributed.barrier()
    distributed.stop()
    return basis


def _refuse_to_strand(project: Project, target: Path) -> None:
    """Raise OutputError when `target` is a basis that adapters of the project were trained in, and need; or runs that
    are under way, or were interrupted.

    Raises:
        ArtifactError: the config of an adapter is damaged.
    """
    weights = target / BASIS_WEIGHTS
    if not weights.is_file():
        return
    sha256 = sha256_file(weights)  # not what its config says: a damaged basis is of no use to them anyway
    # Of a damaged one nobody knows which basis it needs: its error is raised.
    configs = {name: read_adapter_config(project.adapter_folder(name)) for name in ours_in(project.adapters_folder)}
    bases = {name: config["basis"] for name, config in configs.items() if config["basis"]["source"] != EMBEDDED}
    trained = [name for name, basis in bases.items() if basis["sha256"] == sha256]
    if trained:
        raise OutputError(
            f"adapters were trained in this basis and are of no use without it: {some(trained)}",
            where=target,
            fix="Choose another folder with --out, or remove these adapters first",
        )
    runs = {
        folder: run for folder, run in runs_begun(project.adapters_folder).items() if run.get("basis_sha256") == sha256
    }
    if runs:
        names = sorted({name for run in runs.values() for name in run.get("tasks", [])})
        raise OutputError(
            f"this basis is being trained in, or interrupted runs go on in it: {some(names)}",
            where=target,
            fix=f"Choose another folder with --out, or end these first, or remove {some(runs)}",
        )
