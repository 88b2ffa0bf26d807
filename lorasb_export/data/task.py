"""Task data: rows of one kind, from JSONL or CSV files, the Hub or memory.

A label is a class, or a number to predict when any of the task's labels has a decimal point.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..choices import CAUSAL_LM, SEQ_CLS
from ..errors import DataError, SettingsError, require_path
from ..files.storage import cannot_read, expanded
from .columns import renamed
from .hold_out import divided
from .hub_dataset import rows_from_hub
from .row_files import is_csv, number_labels, read_rows, split_files
from .rows import (
    LABELLED,
    TEXT,
    Placed,
    Row,
    as_json,
    check_row,
    fields_read,
    kind_of,
    refuse_empty,
    refuse_unwritable,
    warn_once,
)
from .source import SPLITS, AnySource, TaskSource


@dataclass(frozen=True)
class TaskData:
    """The rows of one task, by split; only `train` is always there."""

    name: str
    source: str
    task_type: str
    splits: Mapping[str, Sequence[Row]]
    sha256: str
    read_as: Mapping[str, Any] = field(default_factory=dict)  # the options of its TaskSource
    label_order: Sequence[Any] = ()  # of a head that has learnt these very labels

    def __repr__(self) -> str:
        rows = ", ".join(f"{len(rows)} {split}" for split, rows in self.splits.items())
        return f"<TaskData {self.name}: {self.kind} rows, {rows}, of {self.source}>"

    @property
    def kind(self) -> str:
        """The kind of its rows: COMPLETION, CHAT, TEXT or LABELLED."""
        return kind_of(self.splits["train"][0])

    @property
    def regression(self) -> bool:
        """Whether the labels are numbers to predict: any of them is a float."""
        rows = (row for split in self.splits.values() for row in split)
        return self.task_type == SEQ_CLS and any(isinstance(row["label"], float) for row in rows)

    @property
    def labels(self) -> list[Any]:
        """The distinct training labels, in the order of `label_order` if they are the same, else sorted; empty for
        CAUSAL_LM and for regression."""
        if self.task_type != SEQ_CLS or self.regression:
            return []
        return in_order({row["label"] for row in self.splits["train"]}, self.label_order)

    @property
    def num_labels(self) -> int | None:
        """Outputs of the classification head: one for regression; None for CAUSAL_LM."""
        return outputs_of(self.task_type, self.labels)

    def rows(self, split: str) -> Sequence[Row]:
        """Rows of `split`. Raises DataError when the task has none."""
        if not self.splits.get(split):
            fix = f"Add {split}.jsonl" + (
                ", or set hold_out in its [tasks.NAME] or in [data]" if split == "valid" else ""
            )
            raise DataError(f"task {self.name} has no {split} rows", where=self.source, fix=fix)
        return self.splits[split]

    def unit(self, split: str) -> str:
        """What errors call a row of `split`; its number, from 1, follows."""
        return f"{self.name}: {split} row"

    def split_sha256(self, split: str) -> str:
        """A digest of what is read of the rows of `split`."""
        return _digest([fields_read(row, self.kind) for row in self.splits[split]])

    def held_out(self) -> str:
        """The split to report on: `test` where there is one, else `valid`."""
        return "test" if self.splits.get("test") else "valid"

    @property
    def has_held_out(self) -> bool:
        """Whether that split has rows."""
        return bool(self.splits.get(self.held_out()))


def _digest(rows: object) -> str:
    return hashlib.sha256(as_json(rows)).hexdigest()


def outputs_of(task_type: str, labels: Collection[Any]) -> int | None:
    """Outputs of the head of a classifier of `labels`, of which regression has none; None for CAUSAL_LM."""
    return (len(labels) or 1) if task_type == SEQ_CLS else None


def in_order(labels: Collection[Any], order: Sequence[Any]) -> list[Any]:
    """`labels` in the order of a head's outputs, where it has learnt the same ones; else sorted."""
    return list(order) if sorted(map(repr, order)) == sorted(map(repr, labels)) else sorted(labels)


def load_held_out(name: str, source: AnySource | TaskData) -> TaskData:
    """As `load_task`, for rows to be scored on: all of a single file are held out, if it is not divided.

    A task that is loaded already is returned as it is.
    """
    if isinstance(source, TaskData):
        return source
    task = load_task(name, source)
    if not expanded(str(source)).is_file() or task.splits.get("valid"):
        return task
    return replace(task, splits={**task.splits, "test": task.splits["train"]})


def load_task(name: str, source: AnySource) -> TaskData:
    """Read a task from a folder of train/valid/test.jsonl (or .csv), one such file, or a Hub dataset id.

    `validation.jsonl` is taken for `valid.jsonl`; other .jsonl and .csv files of the folder are left alone, with a
    warning.

    Args:
        name: what errors, cards and `fit_together` call the task.
        source: the path or id; or a `TaskSource` of it, which says what its columns and splits are called, or how many
            training rows to hold out.

    Raises:
        DataError: nothing there, or it cannot be read; two files of one split; or, with file and line, a broken line, a
            missing, empty or wrong field or column, a row of another kind than the first, a label that no training row
            has.
        SettingsError: splits or a subset of what is no Hub dataset.
    """
    if not isinstance(source, TaskSource):
        require_path("the task's data", source, "For rows in memory make a task with task_of")
        source = TaskSource(str(source))
    path = expanded(source.path)
    with cannot_read(path, DataError):
        is_here = path.exists()
    if is_here and (source.subset or source.splits):
        raise SettingsError("subset and splits are of Hub datasets", where=path, fix="Leave them out")
    placed, place = _read(source, path), str(path.absolute()) if is_here else source.path
    kind = _checked_kind(place, placed)
    if source.hold_out and "valid" not in placed:
        placed["train"], placed["valid"] = divided(placed["train"], kind, source.hold_out, place)
    return replace(_made(name, place, kind, placed), read_as=source.options())


def task_of(name: str, splits: Mapping[str, Iterable[Row]]) -> TaskData:
    """A task of rows that are in memory, checked as `load_task` checks those of a file.

    Args:
        name: what errors, cards and `fit_together` call it.
        splits: `train`, and `valid` and `test` where there are any → the rows, each a dict.

    Raises:
        DataError: as for `load_task`, with split and number of the row.
    """
    placed = {}
    for split, rows in splits.items():
        split = "valid" if split == "validation" else split
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}", where=f"task {name}", fix=f"Use {', '.join(SPLITS)}")
        if split in placed:
            raise DataError("rows for valid and for validation", where=f"task {name}", fix="Give one of them")
        placed[split] = [(f"task {name}, {split} row {number}", row) for number, row in enumerate(rows, 1)]
        for place, row in placed[split]:
            refuse_unwritable(row, place)
    return _made(name, "memory", _checked_kind("memory", placed), placed)


def load_tasks(data: Mapping[str, AnySource | TaskData]) -> Iterator[TaskData]:
    """The task of every name: a loaded one under that name, or read, each when it is asked for: the rows of all of
    them may be more than memory holds.

    Raises:
        SettingsError: no names.
    """
    if not isinstance(data, Mapping):
        raise SettingsError(f"the data is a {type(data).__name__}, not tasks by name", fix='Give {"name": data}')
    for name, task in data.items():
        yield replace(task, name=name) if isinstance(task, TaskData) else load_task(name, task)


def _checked_kind(source: str, placed: Mapping[str, Sequence[Placed]]) -> str:
    """The kind of all rows. Raises DataError for what is wrong with them, whichever are held out."""
    if not placed.get("train"):
        raise DataError("no training rows", where=source, fix="Add at least one JSON object, one a line")
    kind = kind_of(placed["train"][0][1], placed["train"][0][0])
    for place, row in (placed_row for rows in placed.values() for placed_row in rows):
        if (other := kind_of(row, place)) != kind:
            what, fix = f"a {other} row among {kind} rows", "Give each kind of row a task of its own"
            if (other, kind) == (TEXT, LABELLED):
                fix = "Add its label, or take rows without labels out of the task's data"
            raise DataError(what, where=place, fix=fix)
        check_row(row, kind, place)
    if kind == LABELLED:
        _check_labels([placed_row for rows in placed.values() for placed_row in rows])
    return kind


def _made(name: str, source: str, kind: str, placed: Mapping[str, Sequence[Placed]]) -> TaskData:
    """The task of checked rows. Raises DataError for a label that training lacks."""
    splits = {split: [row for _, row in rows] for split, rows in placed.items()}
    digest = _digest({split: [fields_read(row, kind) for row in rows] for split, rows in splits.items()})
    task = TaskData(name, source, SEQ_CLS if kind == LABELLED else CAUSAL_LM, splits, digest)
    if kind == LABELLED:
        _check_known(task, placed)
    return task


def _read(source: TaskSource, path: Path) -> dict[str, list[Placed]]:
    """The rows of every split under the names that fields have."""
    files = {"train": path} if path.is_file() else split_files(path) if path.is_dir() else {}
    label = source.columns.get("label") if source.columns else "label"
    placed = {split: list(read_rows(file, label)) for split, file in files.items()}
    if path.is_dir() and "train" not in placed:
        fix = "Add it, one JSON object a line, or train.csv"
        raise DataError("no train.jsonl in the data folder", where=path, fix=fix)
    for split, file in files.items():
        if split != "train" and not placed[split]:
            raise DataError(f"{file.name} is empty", where=path, fix="Remove it or add rows")
    if not path.exists():
        placed = rows_from_hub(source)
    if source.columns:
        placed = renamed(placed, source.columns, source.path)
    of_csv = [row for split, file in files.items() if is_csv(file) for row in placed[split]]
    if labelled := [(place, row) for place, row in of_csv if kind_of(row, place) == LABELLED]:
        number_labels(labelled)
    return placed


def refuse_single_class(labels: Sequence[Any], where: object = None) -> None:
    """Raise DataError for a classifier with nothing to tell apart."""
    if len(labels) == 1:
        fix = "Add training rows of another class; numbers with a fraction are for regression"
        raise DataError(f"every training row has the label {labels[0]!r}", where=where, fix=fix)


def _check_labels(rows: Sequence[Placed]) -> None:
    named = isinstance(rows[0][1]["label"], str)
    for place, row in rows:
        label = row["label"]
        if isinstance(label, bool) or not isinstance(label, str | int | float):
            raise DataError(
                f"label {label!r} is neither a name nor a number", where=place, fix="Use one string or one number a row"
            )
        if isinstance(label, str):
            refuse_empty(label, place)
            if label != label.strip():  # it would be a class beside that without
                what = f"label {label!r} has white space at an end"
                raise DataError(what, where=place, fix="Take it away, in all rows")
        if not isinstance(label, str) and not abs(label) <= sys.float_info.max:
            raise DataError(f"label {label!r:.40} is not finite, or too large", where=place, fix="Remove the row")
        if isinstance(label, str) != named:
            raise DataError("some labels are names, some are numbers", where=place, fix="Use one kind")


def _check_known(task: TaskData, placed: Mapping[str, Sequence[Placed]]) -> None:
    rows = [placed_row for split in placed.values() for placed_row in split]
    if task.regression:
        if all(float(row["label"]).is_integer() for _, row in rows):
            what = "have decimal points and are whole: they are learnt as numbers (regression)"
            warn_once(f"The labels of task {task.name} ({task.source}) {what}. Write 1 for 1.0 if they are classes")
        return
    known = set(task.labels)
    for place, row in rows:
        if row["label"] not in known:
            raise DataError(
                f"label {row['label']!r} is not among the training labels",
                where=place,
                fix="Add training rows with it, or remove the row",
            )
