"""The adapters of a project exported: which, where none is named, on which rows compared with torch, one by one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..bars import in_turn
from ..belonging import of_one_basis
from ..choices import MAX_COMPARED, MAX_DROP
from ..data.task import TaskData, load_held_out, load_task
from ..errors import PER_ITEM_ERRORS, BaseModelError, DataError, LoraSBError, Problems, SettingsError, some_problems
from ..exporting import export, onnx_adapters
from ..exporting.onnx_adapters import exported_record, require_exportable, require_of_graph
from ..files.output import refuse_existing
from ..files.storage import expanded, folder_bytes
from ..format import read_adapter_config
from ..names import PLACE, name_of, ours_in
from .base import find_base
from .project import Project

logger = logging.getLogger(__name__)


def adapters_to_export(project: Project, into: Path | None = None) -> tuple[list[str], dict[str, LoraSBError]]:
    """Which of all the project's adapters one ONNX graph can hold; what is left out is warned of.

    Left out is what is damaged, a classifier, badly called, or, if they are few, of another basis than most.

    Args:
        into: the export that they go into: of its basis, those that it lacks, or has with another R. None may be left.

    Returns:
        their folders; and by name the problems without which the export would be complete: those of adapters that are
        damaged, or that it has as they were before.

    Raises:
        SettingsError: there is no adapter.
        LoraSBError: none can be exported; of the kind of the first problem.
    """
    names = _names(project)
    record = {} if into is None else exported_record(into)
    there = record.get("adapters", {})
    taken = {name.casefold(): name for name in there}
    found: dict[str, Adapter] = {}
    failed: dict[str, LoraSBError] = {}
    problems: dict[str, LoraSBError] = {}
    for name in names:
        folder = project.adapter_folder(name)
        adapter = None
        try:
            if name in there and _is_exported(folder, there[name]):
                continue
            adapter = Adapter.load(folder)
            require_exportable(name, adapter)
            if into is not None:
                require_of_graph(adapter, record, into)
            other = taken.setdefault(name.casefold(), name)
            if other != name:
                raise SettingsError(f"{name} and {other} differ by capitals only", where=folder, fix="Rename a folder")
            if name in there and record["routed"]:
                fix = "Export all anew, with --out"
                raise SettingsError(f"{name} has changed, and a routed graph only grows", where=into, fix=fix)
            found[name] = adapter
        except LoraSBError as error:
            problems[name] = error.alone()
            if adapter is None or name in there:  # it could not be read; or an older one stays
                failed[name] = problems[name]
    if len(problems) == len(names):
        Problems(problems.values()).raise_all("nothing is exported")
    if problems:
        logger.warning("%d of %d are passed over:\n%s", len(problems), len(names), some_problems(problems))
    chosen = of_one_basis(found) if into is None else found
    return [str(project.adapter_folder(name)) for name in chosen], failed


def _names(project: Project) -> list[str]:
    """Of all its adapters. Raises SettingsError where there is none."""
    if not (names := ours_in(project.adapters_folder)):
        raise project.lacks("no adapter in this project", "Run lorasb fit, or name one")
    return names


def _is_exported(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether an export's record says of this adapter what its config does."""
    config = read_adapter_config(folder)
    return (entry.get("sha256"), entry.get("scaling")) == (config["sha256"], config["scaling"])


def tasks_to_compare(project: Project, folders: Sequence[str], data: str | None) -> dict[str, TaskData]:
    """The task of each adapter that is compared, by the adapter's name, of those whose data is found.

    Args:
        folders: folders or Hub ids of adapters, of which the first few are compared.
        data: the rows, if not the task's own.

    Raises:
        DataError: of `data`: it cannot be read, or has no held-out rows; what is wrong with others is a warning.
        ArtifactError: an adapter is damaged.
    """
    found = {}
    for folder in folders[:MAX_COMPARED]:
        loaded = Adapter.load(folder)
        name, source = project.task_of(loaded, data)
        task = None
        if data is not None:
            task = load_held_out(name, source or data)
            task.rows(task.held_out())  # or what was asked for would be left out in silence
        elif source is not None and (name in project.tasks or os.path.exists(str(source))):
            try:
                task = load_task(name, source)
            except DataError as error:
                logger.warning("The data of %s cannot be read: %s", name, error)
        if task is not None and task.has_held_out:
            found[loaded.name or ""] = task
        else:
            compared = "the graph is compared on built-in prompts only (--data names them)"
            logger.warning("No held-out rows for %s: %s", name, compared)
    return found


@dataclass(frozen=True)
class Export:
    """How adapters of a project are exported, one or many.

    Args:
        out: the folder to write; with `{name}` in it one for each adapter.
        format, precision, routed, verify, max_drop, overwrite: as for `export`; None is the default there.
        adds: `out` is an export of onnx-adapters, of a precision of its own, that they go into.
        model: the base, if it has moved since training.
        data: held-out rows to compare on, as for `tasks_to_compare`. A graph in fp32 is compared on rows only where
            these, or `max_drop`, are given.
    """

    project: Project
    out: str
    format: str
    adds: bool = False
    precision: str | None = None
    model: str | None = None
    verify: bool | None = None
    data: str | None = None
    max_drop: float | None = None
    overwrite: bool = False
    routed: bool = False

    @property
    def is_one_each(self) -> bool:
        """Whether each adapter goes into a folder of its own."""
        return PLACE in self.out and not self.adds

    def adapters(self) -> tuple[list[str], dict[str, LoraSBError]]:
        """Where none is named: all of the project, or its first task's, if `out` takes only one.

        Returns:
            their folders or Hub ids; and, of all for one graph, the problems that `adapters_to_export` found.

        Raises:
            SettingsError: there is no adapter; or as `adapters_to_export`.
        """
        if not (self.is_one_each or self.format == "onnx-adapters"):
            return [self.project.find_adapter(None)], {}
        if not self.is_one_each:
            return adapters_to_export(self.project, expanded(self.out) if self.adds else None)
        return [str(self.project.adapter_folder(name)) for name in _names(self.project)], {}

    def write(self, folders: Sequence[str]) -> dict[str, Any]:
        """`export` of the adapters in `folders`, or of those Hub ids, as one, or `add_onnx_adapters` of them; where
        there is none to add, what the export there records."""
        if not self.adds:
            return self._write(folders, self.out)
        if not folders:
            into = expanded(self.out)
            return {**exported_record(into), "out": self.out, "bytes": folder_bytes(into)}
        return onnx_adapters.add_onnx_adapters(folders, self.out, overwrite=self.overwrite, **self._options(folders))

    def write_each(self, folders: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | LoraSBError]]:
        """`export` of each into a folder of its own: `out` with the adapter's name in place of `{name}`.

        Yields:
            each name and what `export` gives; or its error, where that adapter alone is at fault: the next one is
            exported all the same. The error of a single one is raised.

        Raises:
            SettingsError: two are of one name.
            OutputError: one is there already; nothing was exported.
        """
        named = {name_of(Path(folder) if Path(folder).is_dir() else folder): folder for folder in folders}
        if len(named) < len(folders):
            fix = "Rename a folder, or export them one after another"
            raise SettingsError("two of the adapters would go to one folder", where=self.out, fix=fix)
        for name in named:
            there = "Name the adapters that are left, or pass --overwrite"
            refuse_existing(expanded(self.out.replace(PLACE, name)), self.overwrite, there, kind=self.format)
        for name in in_turn(named, "export", str):
            try:
                yield name, self._write([named[name]], self.out.replace(PLACE, name))
            except (*PER_ITEM_ERRORS, BaseModelError) as error:  # PEFT does not take every layer of every base
                if len(named) == 1:
                    raise
                logger.warning("%s is left out: %s", name, error)
                yield name, error.alone()

    def _write(self, folders: Sequence[str], out: str) -> dict[str, Any]:
        kind: dict[str, Any] = {"format": self.format, "precision": self._precision, "routed": self.routed}
        return export.export(folders, out, overwrite=self.overwrite, **kind, **self._options(folders))

    @cached_property
    def _precision(self) -> str:
        of_graph = exported_record(expanded(self.out))["precision"] if self.adds else self.precision
        return of_graph or "fp32"

    def _options(self, folders: Sequence[str]) -> dict[str, Any]:
        precision = self._precision  # before the base is looked for: there may be no export to add to
        verify = self.format != "peft" if self.verify is None else self.verify
        unread = self.format == "peft" and not verify  # a LoRA is written without the base's weights
        base = self.model if unread else find_base(self.project, self.model, folders[0])
        options: dict[str, Any] = {"base": base, "verify": verify}
        options["max_drop"] = MAX_DROP if self.max_drop is None else self.max_drop
        is_asked_for = self.data is not None or self.max_drop is not None
        is_compared = verify and self.format != "peft" and precision != "bf16"
        if is_compared and (precision != "fp32" or is_asked_for):
            options["data"] = tasks_to_compare(self.project, folders, self.data)
        return options
