"""Where the rows of a task are, and how they are read where that alone does not say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ..choices import Split
from ..errors import SettingsError
from .columns import columns_of, is_template
from .rows import FIELDS

SPLITS = get_args(Split)


@dataclass(frozen=True)
class TaskSource:
    """Data that is not called or split as a task's is.

    Attributes:
        path: a folder, a file, or a Hub dataset id, `owner/name` or `owner/name@revision`.
        columns: field of a row → what the data calls it, or for a text a template of several, such as
            `{title}: {body}`; all else in the data is left alone. Empty: as it is called.
        hold_out: of data without valid rows, about the share of its training rows to hold out as such. A digest of the
            row's fields decides, of a chat one of its turns' roles, contents and calls: equal rows stay together, and
            no row changes sides when others are added, unless it is the last of its class. Where there are valid rows,
            none are held out.
        subset: which one of a Hub dataset of several.
        splits: split → that of the Hub dataset, as `datasets` writes it: `train_sft`, `train[:95%]`. What is not named
            is not read. Empty: train, validation (or valid) and test.

    Raises:
        SettingsError: a field or split that no task has, no `train` among the splits, a share that is none, a template
            that names no column, or a value of a wrong type.
    """

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    hold_out: float = 0.0
    subset: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        for name, types in {
            "columns": Mapping,
            "splits": Mapping,
            "hold_out": int | float,
            "subset": str | None,
        }.items():
            if not isinstance(getattr(self, name), types) or getattr(self, name) is True:
                what = f"{name} is {getattr(self, name)!r}, which has the wrong type"
                raise SettingsError(what, where=self.path, fix="Write it as docs/reference/project-file.md does")
        for name, known in (("columns", FIELDS), ("splits", SPLITS)):
            for key, value in getattr(self, name).items():
                if key not in known:
                    raise SettingsError(f"{name} has {key!r}", where=self.path, fix=f"Use {', '.join(known)}")
                if not isinstance(value, str):
                    raise SettingsError(f"{key!r} in {name} is {value!r}", where=self.path, fix="Give a name in quotes")
        for key, value in self.columns.items():
            what = f"{key!r} in columns is {value!r}"
            if key in ("label", "messages", "tools") and is_template(value):
                raise SettingsError(what, where=self.path, fix="Name one column: texts alone are made of several")
            if not columns_of(value):
                fix = "Write {column} for a column, {{ and }} for braces of the text"
                raise SettingsError(f"{what}, which is no template", where=self.path, fix=fix)
        if self.splits and "train" not in self.splits:
            raise SettingsError("splits name no train", where=self.path, fix="Say which split to train on")
        if not 0 <= self.hold_out < 1:
            what = f"hold_out is {self.hold_out}"
            raise SettingsError(what, where=self.path, fix="Give a share of the training rows, below 1")
        if self.hold_out and "valid" in self.splits:
            fix = "Leave out either"
            raise SettingsError("hold_out makes valid rows, and splits name some", where=self.path, fix=fix)

    def __str__(self) -> str:
        return self.path

    def options(self) -> dict[str, Any]:
        """What it says besides the path."""
        return {option: value for option in _OPTIONS if (value := getattr(self, option))}

    @classmethod
    def of(cls, path: str, options: Mapping[str, Any]) -> TaskSource:
        """With what `options` say of a path."""
        return cls(path, **{option: options[option] for option in _OPTIONS if options.get(option)})


_OPTIONS = [option.name for option in fields(TaskSource) if option.name != "path"]
AnySource = str | Path | TaskSource  # a path or Hub id, alone or with how it is read
