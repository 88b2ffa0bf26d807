"""The rows of a dataset on the Hub, by split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, first_line
from ..files.output import disk_error_in
from ..hub.calls import hub_errors, status_of, with_retries
from ..hub.ids import may_be_dataset
from .rows import LABELLED, Placed, kind_of, warn_once
from .source import TaskSource

if TYPE_CHECKING:
    from datasets import Dataset

_OF_A_WRONG_NAME = ("BuilderConfig", "Unknown split", "Unrecognized instruction")
_UNTOLD = "An error occurred while generating the dataset"  # what went wrong is this error's cause, or its next lines


def rows_from_hub(source: TaskSource) -> dict[str, list[Placed]]:
    """Split → the rows, each with its place; without those of a class that is not known.

    Raises:
        DataError: no such dataset, subset or split, or the Hub refuses, fails or cannot be reached.
    """
    if not may_be_dataset(source.path, Path()):
        fix = "Check the path; a dataset on the Hub is owner/name"
        raise DataError("no such file, folder or Hub dataset", where=source.path, fix=fix)
    placed, left_out = {}, {}
    label = source.columns.get("label") if source.columns else "label"
    for split, (theirs, dataset) in _splits(source).items():
        placed[split] = [
            (f"{source.path} {theirs} row {number}", {column: _without_nulls(value) for column, value in row.items()})
            for number, row in enumerate(dataset.to_list(), 1)
        ]
        labelled = [placed_row for placed_row in placed[split] if placed_row[1].get(label) != -1]
        if split != "train" and placed[split] and not labelled:
            warn_once(f"the {theirs} split of {source.path} is not read: its labels are all -1")
            del placed[split]  # that of a competition, which hides them
        elif labelled and len(labelled) < len(placed[split]) and _has_classes(dataset, source, label):
            left_out[theirs] = len(placed[split]) - len(labelled)
            placed[split] = labelled
    if left_out:
        counts = ", ".join(f"{count} of {theirs}" for theirs, count in left_out.items())
        warn_once(f"rows of {source.path} that have no label (-1) are left out: {counts}")
    return placed


def _has_classes(dataset: Dataset, source: TaskSource, label: str | None) -> bool:
    """Whether the column `label` is of classes, among which -1 is none: of plain numbers it may be one."""
    from datasets import ClassLabel

    if not isinstance(dataset.features.get(label), ClassLabel):
        return False
    return bool(source.columns) or kind_of(dict(dataset.features), source.path) == LABELLED  # else it is not learnt


def _without_nulls(value: Any) -> Any:
    """Of a column's value what its row had: in a column of one type each message or tool has the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _splits(source: TaskSource) -> dict[str, tuple[str, Dataset]]:
    """Split → what the dataset calls it, and its rows."""
    if source.splits:
        found = _load(source, split=list(source.splits.values()))
        return dict(zip(source.splits, zip(source.splits.values(), found, strict=True), strict=True))
    found = _load(source)
    there = ", ".join(found)
    if "train" not in found:
        fix = "Name those to read in splits of its [tasks.NAME], as train = …"
        raise DataError(f"the dataset has no split train (it has {there})", where=source.path, fix=fix)
    if "valid" in found and "validation" in found:
        fix = "Name the ones to read in splits of its [tasks.NAME]"
        raise DataError("the dataset has a split valid and a split validation", where=source.path, fix=fix)
    names = {"train": "train", "valid": "valid" if "valid" in found else "validation", "test": "test"}
    if others := [split for split in found if split not in names.values()]:
        others_are = f"of {source.path} are not read: {', '.join(others)}"
        warn_once(f"{others_are}; splits are train, validation (or valid) and test")
    return {split: (theirs, found[theirs]) for split, theirs in names.items() if theirs in found}


def _load(source: TaskSource, **options: Any) -> Any:
    from datasets import load_dataset

    name, _, revision = source.path.partition("@")
    options |= {"name": source.subset} if source.subset else {}
    options |= {"revision": revision} if revision else {}
    try:
        return with_retries(lambda: load_dataset(name, **options))
    except Exception as error:  # datasets raises a dozen unrelated types for "not there" and "not reachable"
        what, fix = _told(error)
        if "Config name" in str(error):
            there, _, _ = str(error).partition("configs: ")[2].partition("\n")
            what = f"the dataset has several parts: {there}"
            fix = "Name the one to read as subset of its [tasks.NAME]"
        elif "gated dataset" in str(error):
            what, fix = "the dataset is gated", "Ask for access on its page, and log in: hf auth login"
        elif any(hint in str(error) for hint in _OF_A_WRONG_NAME):
            what, fix = first_line(error), "Correct subset or splits of its [tasks.NAME]"
        elif failure := _failure_of_the_hub(error):
            with hub_errors(source.path, DataError, "the dataset cannot be read: "):
                raise failure from failure.__cause__
        raise DataError(what, where=source.path, fix=fix) from None


def _told(error: Exception) -> tuple[str, str]:
    """What is wrong, and what to do, where neither a name in the project's file nor the Hub is at fault."""
    if isinstance(error, FileNotFoundError) and error.errno is None:  # that of a file here has one
        return f"no such file, folder or Hub dataset: {first_line(error)}", "Check the path, or the network"
    reason = error.__cause__ or error if str(error) == _UNTOLD else error
    lines = [line for line in str(reason).splitlines() if line.strip() and line != _UNTOLD]
    said = lines[0] if lines else type(reason).__name__
    fix = "Try again; if it stays so, save its rows as train.jsonl, and give that file"
    if isinstance(reason, OSError) and (reason.filename or disk_error_in(said) or "disk space" in said):
        fix = "Let HF_HOME or HF_DATASETS_CACHE be a folder with room that can be written"
    elif "scripts are no longer supported" in said:
        fix = "Save its rows as train.jsonl, and give that file"
    return f"cannot read the Hub dataset: {said}", fix


def _failure_of_the_hub(error: BaseException) -> BaseException | None:
    """What the Hub, or the way to it, did: `datasets` raises that, or an error of its own that no file is there, with
    that as its context. None where nothing says that it is more than a name nobody has."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    found: BaseException | None = error
    while found is not None:
        if "OfflineModeIsEnabled" in str(found):
            return OfflineModeIsEnabled()
        unreached = isinstance(found, (httpx2.TransportError, ConnectionError))
        if unreached or (isinstance(found, (OSError, httpx2.HTTPError)) and status_of(found) not in (0, 404)):
            return found
        found = found.__cause__ or found.__context__
    return None
