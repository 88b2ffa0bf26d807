"""`lorasb.toml`: the defaults of a project folder. Flags win; unknown keys are refused with the nearest valid one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.source import TaskSource
from ..errors import ArtifactError, SettingsError, some
from ..files.storage import absolute, expanded
from ..hub.ids import is_mistyped_path, may_be_dataset, parse_hub_id
from ..names import adapters_in, look_up_adapter, name_problem, ours_in, task_name_problem, unknown_adapter
from ..settings import CalibrationSettings, FitSettings
from .file import FILE_NAME, Task, nearest, read_project_file

if TYPE_CHECKING:
    from ..adapter import Adapter

logger = logging.getLogger(__name__)

OWN_BASIS = "own"


@dataclass(frozen=True)
class Project:
    """A project folder and what its `lorasb.toml` says; all defaults where there is none, and `file` is None."""

    folder: Path
    file: Path | None = None
    model: str | None = None
    revision: str | None = None
    basis_path: str = "basis"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    repo: str | None = None
    public: bool = False

    @classmethod
    def load(cls, config: str | Path | None = None) -> Project:
        """Read `config`, or `lorasb.toml` in the current folder where there is one.

        Raises:
            SettingsError: the file named is not there, is not TOML, or has unknown keys or values of a wrong type;
                all problems at once.
        """
        path = expanded(config or FILE_NAME)
        if not path.is_file():
            if config:
                raise SettingsError("no such config file", where=path, fix="Write one with: lorasb init")
            return cls(Path.cwd())
        content = read_project_file(path)
        basis, data, hub = (content.get(section, {}) for section in ("basis", "data", "hub"))
        return cls(
            folder=path.resolve().parent,
            file=path,
            model=content.get("model"),
            revision=content.get("revision"),
            basis_path=basis.get("path", "basis"),
            calibration={key: value for key, value in basis.items() if key != "path"},
            fit=content.get("fit", {}),
            data=data,
            tasks={name: Task(**{**data, **table}) for name, table in content.get("tasks", {}).items()},
            repo=hub.get("repo"),
            public=hub.get("public", False),
        )

    def path(self, relative: str) -> Path:
        """A path written in the project file, which is relative to that file; absolute, and without `..`."""
        return absolute(self.folder / expanded(relative))

    @property
    def basis_folder(self) -> Path:
        """Where the basis that the tasks share is, or is to be made."""
        return self.path(self.basis_path)

    @property
    def adapters_folder(self) -> Path:
        return self.folder / "adapters"

    def adapter_folder(self, name: str) -> Path:
        return self.adapters_folder / name

    def tasks_to_fit(self, words: Sequence[str] | None, data: str | None) -> list[str]:
        """The tasks named, or all of the project.

        Args:
            data: of the tasks, where the project does not name it.

        Raises:
            SettingsError: there are none; one is badly named, or has no data.
        """
        names = list(words or self.tasks)
        if not names and data is not None:
            raise SettingsError("--data is of a task without a name", fix="Name it: lorasb fit TASK --data …")
        if not names:
            raise self.lacks("no task to fit", "Add [tasks.NAME] data = …")
        refuse_bad_names(names)
        for name in names if data is None else ():
            self.task_source(name)
        return names

    def settings_of(self, name: str, flags: Mapping[str, Any]) -> FitSettings:
        """How a task is trained: by the flags, else as its own table says, else as `[fit]` does."""
        own = self.tasks[name].fit if name in self.tasks else {}
        try:
            return FitSettings(**{**self.fit, **own, **flags})
        except SettingsError as error:
            where = f"[tasks.{name}.fit]" if own else error.where
            raise SettingsError(error.what, where=where, fix=error.fix) from None

    def calibration_settings(self, fit: FitSettings, flags: Mapping[str, Any] | None = None) -> CalibrationSettings:
        """How a basis is made for training with `fit`: rows as long, no larger batches and the same dtype, for these
        fit in memory; but where flags or `[basis]` say otherwise, as they do."""
        as_trained = {"dtype": fit.dtype, "max_length": fit.max_length}
        as_trained["batch_size"] = min(fit.batch_size, CalibrationSettings.batch_size)
        return CalibrationSettings(**{**as_trained, **self.calibration, **(flags or {})})

    def shared_tasks(self) -> list[str]:
        """Names of the tasks that use the project's shared basis."""
        return [name for name, task in self.tasks.items() if task.basis is None]

    def weights(self, names: Iterable[str]) -> dict[str, float]:
        """The calibration weights of those of the named tasks that the project has."""
        return {name: self.tasks[name].weight for name in names if name in self.tasks}

    def find_adapter(self, word: str | None) -> str:
        """The folder or Hub id behind a word: `look_up_adapter` among the adapters of this project.

        None is the adapter of the project's first task that has one; of several it is said which.

        Raises:
            SettingsError: None, and the project has no adapter; or a name that is that of none.
        """
        if word is None:
            names = dict.fromkeys(ours_in(self.adapters_folder))
            ordered = list(dict.fromkeys([*(name for name in self.tasks if name in names), *names]))
            if not ordered:
                raise self.lacks("no adapter in this project", "Run lorasb fit, or name one")
            word = ordered[0]
            if len(names) > 1:
                logger.warning("No adapter is named: %s is taken, the first of %s", word, some(ordered))
        found = look_up_adapter(word, self.adapters_folder)
        if found is None:
            raise unknown_adapter(word, self.adapters_folder, self.tasks, adapters_in)
        return str(found)

    def find_folder(self, word: str) -> str:
        """As `find_adapter`, but any existing folder of that name comes first; an adapter that it hides is told of."""
        if not Path(word).is_dir():
            return self.find_adapter(word)
        hidden = self.adapter_folder(word)
        if name_problem(word) is None and hidden.is_dir() and not hidden.samefile(word):
            logger.warning("%s is taken for the folder of that name here; the adapter is adapters/%s", word, word)
        return word

    def task(self, name: str, data: str = "") -> Task:
        """A task of the file, or what `[data]` makes of `data` that belongs to none."""
        return self.tasks.get(name) or Task(data, **self.data)

    def task_source(self, name: str) -> TaskSource:
        """The data of a task: an absolute path, or what may be a Hub dataset id; with how it is read, where its table
        or `[data]` says that.

        Raises:
            SettingsError: the project has no such task.
        """
        if name not in self.tasks:
            near = nearest(name, self.tasks)
            raise self.lacks(f"no task {name!r} in the project{near}", "Add [tasks.NAME] data = …, or pass --data")
        task, path = self.tasks[name], self.path(self.tasks[name].data)
        # Not Path.exists: of a home that may not be entered it raises, by Python's version, and one task would end all.
        source = task.data if not os.path.exists(path) and may_be_dataset(task.data, self.folder) else str(path)
        told = vars(task)
        if "valid" in task.splits:  # a table that names both is refused: here `[data]` says what is held out of others
            told = {**told, "hold_out": 0}
        return TaskSource.of(source, told)

    def other_source(self, name: str, data: str, *, hold_out: bool = True) -> TaskSource:
        """`data` in place of a task's own: its columns are called as those are, and as many rows are held out.

        The task's own data is read as the project says, data of no task as `[data]` does.
        """
        task, path = self.task(name, data), expanded(data)
        if name in self.tasks:
            own = self.path(task.data)
            if path.samefile(own) if path.exists() and os.path.exists(own) else data == task.data:
                return self.task_source(name)
        return TaskSource.of(data, {"columns": task.columns, "hold_out": task.hold_out if hold_out else 0})

    def find_data(self, word: str) -> TaskSource:
        """The data of the task of that name, else `word` as data of no task; a path that a task hides is told of."""
        if word not in self.tasks:
            return self.other_source("", word)
        if Path(word).exists():
            logger.warning("%s is taken for the task: ./%s names the path", word, word)
        return self.task_source(word)

    def task_of(self, adapter: Adapter, data: str | None) -> tuple[str, TaskSource | None]:
        """Name and data of an adapter's task: the project's of the adapter's name, else the one it was trained on.

        The data is `data` if that is given; None where only a name is known: what a push leaves of a path would be
        taken for a Hub dataset.
        """
        name = adapter.name or ""
        if name not in self.tasks or adapter.folder != self.adapter_folder(name):
            name = adapter.training.get("task") or name
        if data or name in self.tasks:
            return name, self.other_source(name, data, hold_out=False) if data else self.task_source(name)
        source = adapter.training.get("data")
        if not source or not (os.path.isabs(source) or parse_hub_id(source)):
            return name, None
        try:
            return name, TaskSource.of(source, adapter.training.get("data_read") or {})
        except SettingsError as error:
            what = f"training says data_read otherwise than fit does: {error.what}"
            raise ArtifactError(what, where=adapter.folder, fix="Pass --data") from None

    def require_model(self) -> str:
        """The base: an absolute folder, or a Hub id with the project's revision.

        Raises:
            SettingsError: neither file nor flag names one.
        """
        if self.model is None:
            raise self.lacks("no base model", 'Set model = "…", or pass --model')
        mistyped = self.revision is None and is_mistyped_path(self.model, self.folder)
        if mistyped or self.path(self.model).exists():
            return str(self.path(self.model))
        on_the_hub = parse_hub_id(self.model)
        return f"{on_the_hub.repo}@{self.revision}" if on_the_hub and self.revision else self.model

    def lacks(self, what: str, fix: str) -> SettingsError:
        """The error that something is not in the project; in a folder that is none, what to do about that."""
        if self.file is None:
            what, fix = f"{what}: there is no {FILE_NAME} here", "Change to the project's folder, or run lorasb init"
        return SettingsError(what, where=self.file or self.folder, fix=fix)


def refuse_bad_names(names: Iterable[str]) -> None:
    """Raise SettingsError for a task name that is not fit for a folder and a served model."""
    problems = list(filter(None, map(task_name_problem, names)))
    if problems:
        raise SettingsError(some(problems), where="tasks", fix="Rename the task")
