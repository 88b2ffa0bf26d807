"""Task data: rows of one kind, from JSONL files, the Hub or memory.

A label is a class, or a number to predict when any of the task's labels has a decimal point.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from .choices import CAUSAL_LM, SEQ_CLS, Split
from .errors import DataError, first_line
from .fetch import may_be_dataset
from .rows import LABELLED, Row, as_json, check_row, kind_of, read_rows, refuse_unwritable
from .storage import expanded

logger = logging.getLogger(__name__)

SPLITS = get_args(Split)


@dataclass(frozen=True)
class TaskData:
    """The rows of one task, by split; only `train` is always there."""

    name: str
    source: str
    task_type: str
    splits: Mapping[str, Sequence[Row]]
    sha256: str

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
        """The distinct training labels, sorted; empty for CAUSAL_LM and for regression."""
        if self.task_type != SEQ_CLS or self.regression:
            return []
        return sorted({row["label"] for row in self.splits["train"]})

    @property
    def num_labels(self) -> int | None:
        """Outputs of the classification head: one for regression; None for CAUSAL_LM."""
        return 1 if self.regression else len(self.labels) or None

    def rows(self, split: str) -> Sequence[Row]:
        """Rows of `split`. Raises DataError when the task has none."""
        if not self.splits.get(split):
            raise DataError(f"task {self.name} has no {split} rows", where=self.source, fix=f"Add {split}.jsonl")
        return self.splits[split]

    def held_out(self) -> str:
        """The split to report on: `test` where there is one, else `valid`."""
        return "test" if self.splits.get("test") else "valid"


def load_held_out(name: str, source: str | Path) -> TaskData:
    """As `load_task`, for rows to be scored on: all of a single file are held out."""
    task = load_task(name, source)
    return replace(task, splits={**task.splits, "test": task.splits["train"]}) if expanded(source).is_file() else task


def load_task(name: str, source: str | Path) -> TaskData:
    """Read a task from a folder of train/valid/test.jsonl, one .jsonl file, or a Hub dataset id.

    `validation.jsonl` is taken for `valid.jsonl`; other .jsonl files of the folder are left alone, with a warning.
    `name` is what errors, cards and `fit_together` call the task.

    Raises:
        DataError: nothing there; CSV; both names of one split; or, with file and line, a broken line, a missing, empty
            or wrong field, a row of another kind than the first, a label that no training row has.
    """
    path = expanded(source)
    if path.suffix.lower() == ".csv":
        fix = 'Make JSON lines of it, one {"prompt": …, "completion": …} or {"text": …, "label": …} for each row'
        raise DataError("CSV is not read", where=path, fix=fix)
    if path.is_file():
        placed = {"train": list(read_rows(path))}
    elif path.is_dir():
        placed = {split: list(read_rows(file)) for split, file in _files(path).items()}
        if "train" not in placed:
            raise DataError("no train.jsonl in the data folder", where=path, fix="Add it, one JSON object a line")
        for split in placed:
            if split != "train" and not placed[split]:
                raise DataError(f"{split}.jsonl is empty", where=path, fix="Remove it or add rows")
    else:
        placed = _rows_from_hub(str(source))
    return _checked(name, str(path.absolute()) if path.exists() else str(source), placed)


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
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}", where=f"task {name}", fix=f"Use {', '.join(SPLITS)}")
        placed[split] = [(f"task {name}, {split} row {number}", row) for number, row in enumerate(rows, 1)]
        for place, row in placed[split]:
            refuse_unwritable(row, place)
    return _checked(name, "memory", placed)


def load_tasks(data: Mapping[str, str | Path | TaskData]) -> list[TaskData]:
    """The task of every name: read, or a loaded one under that name."""
    return [replace(t, name=n) if isinstance(t, TaskData) else load_task(n, t) for n, t in data.items()]


def _checked(name: str, source: str, placed: Mapping[str, Sequence[tuple[str, Row]]]) -> TaskData:
    """The task of rows that come with their places, which errors name."""
    if not placed.get("train"):
        raise DataError("no training rows", where=source, fix="Add at least one JSON object, one a line")
    kind = kind_of(placed["train"][0][1], placed["train"][0][0])
    for place, row in (placed_row for rows in placed.values() for placed_row in rows):
        if kind_of(row, place) != kind:
            raise DataError(
                f"a {kind_of(row)} row among {kind} rows", where=place, fix="Give each kind of row a task of its own"
            )
        check_row(row, kind, place)
    splits = {split: [row for _, row in rows] for split, rows in placed.items()}
    digest = hashlib.sha256(as_json(splits)).hexdigest()
    task = TaskData(name, source, SEQ_CLS if kind == LABELLED else CAUSAL_LM, splits, digest)
    if kind == LABELLED:
        _check_labels(task, placed)
    return task


def _files(folder: Path) -> dict[str, Path]:
    """The file of each split that a data folder has; warns of .jsonl files that are none of them."""
    splits = {f"{split}.jsonl": split for split in SPLITS} | {"validation.jsonl": "valid"}
    present = sorted(path for path in folder.glob("*.jsonl") if path.is_file())
    found = {splits[path.name]: path for path in present if path.name in splits}
    if (folder / "valid.jsonl") in present and (folder / "validation.jsonl") in present:
        raise DataError("both valid.jsonl and validation.jsonl", where=folder, fix="Keep one of them")
    other = [path.name for path in present if path.name not in splits]
    if other:
        _warn_once(f"{', '.join(other)} in {folder} not read: a task's files are {', '.join(splits)}")
    return {split: found[split] for split in SPLITS if split in found}


def _rows_from_hub(name: str) -> dict[str, list[tuple[str, Row]]]:
    if not may_be_dataset(name, Path()):
        fix = "Check the path; a dataset on the Hub is owner/name"
        raise DataError("no such file, folder or Hub dataset", where=name, fix=fix)
    from datasets import load_dataset

    try:
        dataset = load_dataset(name)
    except Exception as error:  # datasets raises a dozen unrelated types for "not there" and "not reachable"
        what, fix = f"no such file, folder or Hub dataset: {first_line(error)}", "Check the path, or the network"
        if "Config name" in str(error):
            what, fix = "the dataset has several parts", "Fetch the one you want and write its rows to train.jsonl"
        raise DataError(what, where=name, fix=fix) from None
    if "train" not in dataset:
        fix = "Fetch the split you want and write its rows to train.jsonl"
        raise DataError(f"the dataset has no split train (it has {', '.join(dataset)})", where=name, fix=fix)
    if "valid" in dataset and "validation" in dataset:
        fix = "Fetch the one you want and write its rows to valid.jsonl"
        raise DataError("the dataset has a split valid and a split validation", where=name, fix=fix)
    names = {"train": "train", "valid": "valid" if "valid" in dataset else "validation", "test": "test"}
    if others := [split for split in dataset if split not in names.values()]:
        _warn_once(f"of {name} are not read: {', '.join(others)}; splits are train, validation (or valid) and test")
    placed = {
        split: [(f"{name} {theirs} row {number}", row) for number, row in enumerate(dataset[theirs].to_list(), 1)]
        for split, theirs in names.items()
        if theirs in dataset
    }
    for split in ("valid", "test"):  # those of a competition hide their labels, as -1
        if placed.get(split) and all(row.get("label") == -1 for _, row in placed[split]):
            _warn_once(f"the {names[split]} split of {name} is not read: its labels are all -1")
            del placed[split]
    return placed


@cache
def _warn_once(message: str) -> None:
    """A task is read again when it is its turn."""
    logger.warning("%s", message)


def refuse_single_class(labels: Sequence[Any], where: object = None) -> None:
    """Raise DataError for a classifier with nothing to tell apart."""
    if len(labels) == 1:
        fix = "Add training rows of another class; numbers with a fraction are for regression"
        raise DataError(f"every training row has the label {labels[0]!r}", where=where, fix=fix)


def _check_labels(task: TaskData, placed: Mapping[str, Sequence[tuple[str, Row]]]) -> None:
    rows = [placed_row for split in placed.values() for placed_row in split]
    named = isinstance(rows[0][1]["label"], str)
    for place, row in rows:
        label = row["label"]
        if isinstance(label, bool) or not isinstance(label, str | int | float):
            raise DataError(
                f"label {label!r} is neither a name nor a number", where=place, fix="Use one string or one number a row"
            )
        if not isinstance(label, str) and not abs(label) <= sys.float_info.max:
            raise DataError(f"label {label!r:.40} is not finite, or too large", where=place, fix="Remove the row")
        if isinstance(label, str) != named:
            raise DataError("some labels are names, some are numbers", where=place, fix="Use one kind")
    if task.regression:
        return
    known = set(task.labels)
    for place, row in rows:
        if row["label"] not in known:
            raise DataError(
                f"label {row['label']!r} is not among the training labels",
                where=place,
                fix="Add training rows with it, or remove the row",
            )
