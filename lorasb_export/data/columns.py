"""The fields of rows from the columns of the data: each from one, or a text from several by a template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import DataError, some
from .rows import Placed, Row, warn_once

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_OPTIONAL = ("tools",)  # a chat may have none
_CORRECT = "Correct columns of its [tasks.NAME], or of [data]"


def is_template(value: str) -> bool:
    """Whether a value of `columns` has braces: `{title}: {body}`; without any it is a column's name."""
    return "{" in value or "}" in value


def columns_of(value: str) -> list[str]:
    """The columns that a value of `columns` names; none where it is a template with a brace that stands alone."""
    if not is_template(value):
        return [value]
    found = list(_BRACES.finditer(value))
    return [] if any(braces[0] in "{}" for braces in found) else [braces[1] for braces in found if braces[1]]


def renamed(placed: Mapping[str, Sequence[Placed]], columns: Mapping[str, str], where: str) -> dict[str, list[Placed]]:
    """The rows of every split with the fields that `columns` make of what they have; nothing else of them is kept.

    Raises:
        DataError: a row lacks a column; no row of a split has one of a template; or it is no text or number.
    """
    in_templates = {name for value in columns.values() if is_template(value) for name in columns_of(value)}
    for split, rows in placed.items():
        there = {column: None for _, row in rows for column in row}
        if rows and (missing := sorted(in_templates - there.keys())):
            what = f"no row has a column {missing[0]!r} (there are: {some(there)})"
            raise DataError(what, where=f"{where}: {split}", fix=_CORRECT)
    there = {column: None for rows in placed.values() for _, row in rows for column in row}
    used = {name for value in columns.values() for name in columns_of(value)}
    if "text" in columns and "label" in there and not {"label"} & {*columns, *used}:
        warn_once(f"columns leave out the labels of {where}, so text is learnt, not classes")
    return {split: [_of_fields(row, columns) for row in of_split] for split, of_split in placed.items()}


def _of_fields(placed: Placed, columns: Mapping[str, str]) -> Placed:
    place, row = placed

    def filled(braces: re.Match[str]) -> str:
        return _text(row, braces[1], place) if braces[1] else braces[0][0]

    fields = {}
    for field, value in columns.items():
        if is_template(value):
            fields[field] = _BRACES.sub(filled, value)
        elif value in row:
            fields[field] = row[value]
        elif field in _OPTIONAL:
            continue
        else:
            raise DataError(f"no column {value!r} (there are: {some(row)})", where=place, fix=_CORRECT)
    return place, fields


def _text(row: Row, column: str, place: str) -> str:
    """What a template has for a column: nothing where the row has none, or an empty one, which pandas writes as NaN."""
    value = row.get(column)
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        what = f"column {column!r} is of type {type(value).__name__}, and a template takes text and numbers"
        raise DataError(what, where=place, fix="Convert the rows, or leave it out")
    return str(value)
