"""Datasets of the Hub as rows: which splits and rows count, and what is told where one cannot be had."""

from __future__ import annotations

import errno
import os
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import httpx2
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from lorasb_export import TaskSource
from lorasb_export.data.task import load_task
from lorasb_export.errors import DataError
from lorasb_export.project.project import Project
from tests.rows import tool_row


@pytest.mark.parametrize(
    "source", ["data/missing", "./data", "~/data", "../x/y", "data/", "a/b.jsonl", "a/b.CSV", "b.json", "/x/y"]
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("asked the Hub"))
    (tmp_path / "lorasb.toml").write_text(f'[tasks.a]\ndata = "{source}"\n')
    project = Project.load(tmp_path / "lorasb.toml")
    with pytest.raises(DataError, match=r"no such file, folder or Hub dataset|no train\.jsonl"):
        load_task("a", project.task_source("a"))


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([{"text": "a", "when": datetime(2026, 1, 1)}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict({"train": rows, "validation": rows}))
    assert sorted(load_task("t", "owner/name").splits) == ["train", "valid"]
    ours = DatasetDict({"train": rows, "valid": rows, "more": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: ours)
    assert sorted(load_task("t", "owner/ours").splits) == ["train", "valid"]
    assert "of owner/ours are not read: more" in caplog.text
    ours["validation"] = rows
    with pytest.raises(DataError, match="a split valid and a split validation"):
        load_task("t", "owner/ours")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict({"train_sft": rows}))
    with pytest.raises(DataError, match=r"no split train \(it has train_sft\) \(owner/name\)"):
        load_task("t", "owner/name")


def test_what_columns_of_one_type_put_into_tools_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [tool_row("weather", city="Oslo"), tool_row("clock", zone="CET")]
    rows = Dataset.from_list(kept)
    arguments = rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"city": "Oslo", "zone": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict({"train": rows}))
    assert load_task("t", "owner/name").rows("train") == kept


def test_a_hub_that_fails_without_a_word_is_told_by_the_kind_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (_ for _ in ()).throw(TimeoutError()))
    with pytest.raises(DataError, match=r"Hub dataset: TimeoutError \(owner/name\)"):
        load_task("t", "owner/name")


CACHE = "Let HF_HOME or HF_DATASETS_CACHE be a folder with room"


SAVE = "save its rows as train.jsonl, and give that file"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (DatasetNotFoundError("Dataset 'owner/name' doesn't exist"), "no such file, folder or Hub", "Check the path"),
        (DataFilesNotFoundError("No (supported) data files"), "no such file, folder or Hub dataset", "Check the path"),
        (
            caused(DatasetGenerationError("An error occurred while generating the dataset"), OSError("File too large")),
            "cannot read the Hub dataset: File too large",
            CACHE,
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device", CACHE),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "Permission denied: '/cache'", CACHE),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/cache"), "cannot read the Hub dataset", CACHE),
        (OSError("Not enough disk space. Needed: 4 GiB"), "Not enough disk space", CACHE),
        (RuntimeError("Dataset scripts are no longer supported, but found name.py"), "but found name.py", SAVE),
        (
            caused(DatasetGenerationError("An error occurred while generating the dataset"), ValueError("a\nb")),
            "cannot read the Hub dataset: a (owner/name)",
            SAVE,
        ),
        (
            DatasetGenerationError("An error occurred while generating the dataset\n\nAll must have the same columns"),
            "cannot read the Hub dataset: All must have the same columns",
            SAVE,
        ),
    ],
)
def test_a_dataset_that_cannot_be_read_is_told_from_one_that_is_not_there(
    error: Exception, said: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(DataError) as told:
        load_task("t", "owner/name")
    assert said in str(told.value)
    assert fix.lower() in told.value.fix.lower()


def test_a_hub_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx2.Response(503, request=httpx2.Request("GET", "http://hub"))
    there = DatasetDict({"train": Dataset.from_list([{"text": "a"}])})
    load = Mock(side_effect=[HfHubHTTPError("failed", response=answer), httpx2.ReadTimeout(""), there])
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("lorasb_export.hub.calls.wait_for", lambda seconds: None)
    assert load_task("t", "owner/name").rows("train") == [{"text": "a"}]


def test_a_dataset_of_several_parts_is_told_from_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (_ for _ in ()).throw(error))
    with pytest.raises(DataError, match=r"several parts: \['main', 'socratic'\] \(owner/name\)\. Name the one"):
        load_task("t", "owner/name")


def test_a_split_of_the_hub_without_labels_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GLUE has -1 for every row of a test split."""
    splits = {"train": [0, 1], "validation": [0], "test": [-1, -1]}

    def load(name: str) -> DatasetDict:
        rows = {split: [{"text": "a", "label": label} for label in labels] for split, labels in splits.items()}
        return DatasetDict({split: Dataset.from_list(of_split) for split, of_split in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(load_task("t", "owner/name").splits) == ["train", "valid"]
    assert "the test split of owner/name is not read: its labels are all -1" in caplog.text
    splits["test"][0] = 0
    with pytest.raises(DataError, match=r"label -1 is not among the training labels \(owner/name test row 2\)"):
        load_task("t", "owner/name")


def test_rows_of_the_hub_without_a_class_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which only a column of classes says of -1, and only where it is learnt."""
    splits = {"train": [0, -1, 1, -1], "validation": [-1, 1], "test": [-1, -1]}
    of_label: Any = ClassLabel(names=["no", "yes"])

    def load(name: str) -> DatasetDict:
        features = Features({"text": Value("string"), "body": Value("string"), "mood": of_label, "label": of_label})
        rows = {
            split: [{"text": f"{i}", "body": f"{i}", "mood": label, "label": label} for i, label in enumerate(labels)]
            for split, labels in splits.items()
        }
        return DatasetDict({split: Dataset.from_list(of_split, features) for split, of_split in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_task("t", "owner/classes")
    assert [(row["text"], row["label"]) for row in task.rows("train")] == [("0", 0), ("2", 1)]
    assert [row["label"] for row in task.rows("valid")] == [1]
    assert "test" not in task.splits
    assert "rows of owner/classes that have no label (-1) are left out: 2 of train, 1 of validation" in caplog.text
    renamed = load_task("t", TaskSource("owner/classes", {"text": "body", "label": "mood"}))
    assert [row["label"] for row in renamed.rows("train")] == [0, 1]
    pairs = load_task("t", TaskSource("owner/classes", {"prompt": "body", "completion": "text"}))
    assert (len(pairs.rows("train")), len(pairs.rows("test"))) == (4, 2)
    of_label = Value("int64")
    assert load_task("t", "owner/classes").labels == [-1, 0, 1]
    splits["train"], of_label = [-1, -1], ClassLabel(names=["no", "yes"])
    del splits["validation"]
    assert load_task("t", "owner/classes").labels == [-1]  # for `fit` to refuse
