"""What several tasks of a project are to be fitted with: settings, data, bases, starts and targets of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from ..base.model import BaseModel
from ..basis import Basis
from ..data.task import TaskData, load_task
from ..errors import ArtifactError, SettingsError, some
from ..files.output import is_free, refuse_existing
from ..files.storage import absolute, expanded
from ..names import PLACE
from ..settings import CalibrationSettings, FitSettings
from ..training.checkpoints import refuse_begun, working_folder
from ..training.job import Job
from ..training.requirements import check_requirements, require_same_task, two_bases
from ..training.run_basis import with_rate
from .basis import basis_of_task, is_shared
from .project import OWN_BASIS, Project
from .starts import Starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What a network is made for: a task's type, and how many labels a classifier has.
Kind = tuple[str, int | None]
_THERE = "Name the tasks that are left, or pass --resume to keep it, or --overwrite to train it anew"


def one_network_at_a_time(kinds: Mapping[str, Kind]) -> list[str]:
    """The names of tasks in the order in which they are trained: those of one network one after another, so that the
    base is loaded once for them all. Beyond that they stay as they are, and the first is first."""
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds.values()))}
    return sorted(kinds, key=lambda name: places[kinds[name]])


class _SeenOnce(BaseModel):
    """A base that is compared and not loaded: with thousands of adapters that may be kept, its weights are read once.

    What trains or merges holds a `BaseModel`, which reads them whenever it is asked: they may have been replaced.
    """

    @cached_property
    def _fingerprints(self) -> dict[frozenset[str], str]:
        return {}

    def fingerprint(self, modules: Iterable[str]) -> str:
        of = frozenset(modules)
        if of not in self._fingerprints:
            self._fingerprints[of] = super().fingerprint(of)
        return self._fingerprints[of]


def own_settings(
    project: Project, names: Iterable[str], flags: Mapping[str, Any], settings: FitSettings
) -> dict[str, FitSettings]:
    """Of the named tasks those that are trained otherwise than by `settings`, since their own tables say so: how."""
    with_own = [name for name in names if name in project.tasks and project.tasks[name].fit]
    own = {name: project.settings_of(name, flags) for name in with_own}
    return {name: of_task for name, of_task in own.items() if of_task != settings}


class FitRequest:
    """What `fit_tasks` is asked to do, or `plan_fit` to say beforehand. To make one reads only the project and `start`,
    and takes no process group: under torchrun each process makes its own before it joins the others.

    Args:
        own: of tasks that are trained otherwise, but in the same dtype and with the same seed.
        data: of a single task, where the project does not name it.
        out: the adapter folder of a single task, or with `{name}` in it of each.
        basis: a folder or Hub id for all tasks, or `own`: each task's own, which then lies in its adapter.
        start: an adapter to go on from (`fit`), or with `{name}` one for each task: the word of `Starts`. A task is
            trained in the basis of that, unless `basis` names one.
        resume: go on with interrupted tasks, keep finished ones.

    Raises:
        SettingsError: `data`, or an `out` without `{name}`, with several tasks; or see `Starts`.
        ArtifactError: see `Starts`.
    """

    def __init__(
        self,
        project: Project,
        names: Sequence[str],
        settings: FitSettings,
        *,
        own: Mapping[str, FitSettings] | None = None,
        model: str | None = None,
        data: str | None = None,
        basis: str | None = None,
        start: str | None = None,
        out: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        if len(names) > 1 and (data or (out and PLACE not in out)):
            fix = f"Name the task they are for, or write {PLACE} in --out"
            raise SettingsError("--data and --out take one task", fix=fix)
        self.project, self.settings, self.own, self._model = project, settings, own or {}, model
        self.resume, self.overwrite = resume, overwrite
        self.settings_of = {name: self.own.get(name, settings) for name in names}
        folders = {name: expanded(out.replace(PLACE, name)) for name in names} if out else {}
        self.targets = folders or {name: project.adapter_folder(name) for name in names}
        self.places = {name: project.other_source(name, data) if data else project.task_source(name) for name in names}
        if start and basis == OWN_BASIS:
            raise two_bases()
        self.starts, self._basis = Starts(project, start, self.targets), basis
        # Where the basis of each task is, or `own`.
        self.bases = {name: basis or self.starts.basis(name) or basis_of_task(project, name) for name in names}
        if basis is None:
            self._check_bases_of_starts()

    def _check_bases_of_starts(self) -> None:
        """Raise ArtifactError where the shared basis is gone that adapters to start from are in: another would be made.
        Of those in a basis that is not the project's it is told."""
        started = [name for name in self.bases if self.starts.basis(name) is not None]
        folder = self.project.basis_folder
        shared = {name for name in started if is_shared(self.project, self.bases[name])}
        if (gone := sorted(shared)) and is_free(folder):
            fix = "Restore it, or leave out --start-from"
            raise ArtifactError(f"the basis that {some(gone)} start from is gone", where=folder, fix=fix)
        asked = {name: (OWN_BASIS, basis_of_task(self.project, name)) for name in started if name not in shared}
        others = [name for name, ours in asked.items() if self.bases[name] not in ours]
        if others and self.starts.differ:
            logger.warning("%s: in the basis of what they start from, which is not the project's", some(others))

    @cached_property
    def base(self) -> BaseModel:
        return BaseModel.resolve(self._model or self.project.require_model())

    @cached_property
    def _seen_once(self) -> BaseModel:
        return _SeenOnce(self.base.name_or_path, self.base.revision, self.base.folder, self.base.config)

    @cached_property
    def load_empty(self) -> Callable[..., PreTrainedModel]:
        """As that of `base`, once for all tasks of as many labels."""
        return cache(self.base.load_empty)

    def refuse_there(self, name: str, *, together: bool = False) -> None:
        """Raise OutputError where what lies in the place of a task's adapter is not to be replaced."""
        refuse_existing(self.targets[name], self.overwrite or self.resume, _THERE, kind="adapter")
        if not (self.overwrite or self.resume or together):
            refuse_begun(working_folder(self.targets[name]))

    def is_begun(self, name: str) -> bool:
        """Whether a task's adapter, or an interrupted run of it, is there."""
        return not is_free(self.targets[name]) or working_folder(self.targets[name]).exists()

    def task(self, name: str) -> TaskData:
        """The rows of a task; anew each time, for all of them may be more than memory holds."""
        return load_task(name, self.places[name])

    def checked(self, name: str) -> TaskData:
        """A task that its settings suit, and what it starts from. Raises as `load_task`, `check_requirements` and
        `require_same_task`."""
        task = self.task(name)
        check_requirements([task], self.settings_of[name])
        if start := self.starts.described(name):
            require_same_task(start, replace(task, label_order=start.labels), self.settings_of[name])
        return task

    def basis_for(self, name: str, shared: Mapping[str, Basis | None]) -> Basis | CalibrationSettings:
        """A task's basis among `shared`, those that are there, by their places; otherwise how it is made."""
        if self._basis is None and self.bases[name] == OWN_BASIS and (start := self.starts.of(name)):
            return start.load_basis()
        return shared.get(self.bases[name]) or self.project.calibration_settings(self.settings_of[name])

    def job(self, task: TaskData, basis: Basis | CalibrationSettings) -> Job:
        """What `fit` would do with `task`, to be asked what that comes to; no weights are loaded."""
        empty = self.load_empty(task.task_type, num_labels=task.num_labels)
        out = absolute(self.targets[task.name])
        settings = with_rate(self.settings_of[task.name], self.base, basis, task, empty)
        start = self.starts.of(task.name)
        return Job(self._seen_once, basis, [task], [out], working_folder(out), settings, None, False, start)
