"""Rows as they lie in files: JSON lines or CSV, one file for each split of a task."""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from ..errors import DataError, LoraSBError, Problems
from ..files.storage import MAX_JSON_BYTES, cannot_read, parse_json
from .rows import Placed, Row, refuse_empty, warn_once
from .source import SPLITS

_MISSING = ("nan", "na", "null", "none")  # what is written for an empty cell of CSV


def is_rows(path: Path) -> bool:
    """Whether it is a file that rows are read from."""
    return path.suffix.lower() in (".jsonl", ".csv") and path.is_file()


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split that a data folder has: JSON lines, or else CSV.

    Warns of the .jsonl and .csv files that are none of them. Raises DataError where the folder cannot be read.
    """
    splits = {split: split for split in SPLITS} | {"validation": "valid"}
    with cannot_read(folder, DataError):
        present = sorted(filter(is_rows, folder.iterdir()))
    found: dict[str, Path] = {}
    for path in sorted(present, key=is_csv):
        split = splits.get(path.stem)
        if split in found and is_csv(path) == is_csv(found[split]):
            raise DataError(f"both {found[split].name} and {path.name}", where=folder, fix="Keep one of them")
        if split is not None:
            found.setdefault(split, path)
    if other := [path.name for path in present if path not in found.values()]:
        files = ", ".join(f"{split}.jsonl" for split in splits)
        warn_once(f"{', '.join(other)} in {folder} not read: a task's files are {files}, or else .csv")
    return {split: found[split] for split in SPLITS if split in found}


def read_rows(path: Path, label: str | None = "label", problems: Problems | None = None) -> Iterator[Placed]:
    """The rows of a file of JSON lines, or of CSV, each with its place, `file:line`. Raises DataError naming it.

    Of CSV every cell is text; `number_labels` makes numbers of those of the column `label`, if there is one.

    Args:
        problems: takes the errors of single lines, which are then passed over, until it is full.
    """
    try:
        yield from _read_csv(path, label, problems) if is_csv(path) else _read_json_lines(path, problems)
    except OSError as error:
        if isinstance(error, LoraSBError):
            raise
        fix = f"Give a {'CSV' if is_csv(path) else 'JSONL'} file"
        raise DataError(f"cannot read the data: {error}", where=path, fix=fix) from None


def is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read_json_lines(path: Path, problems: Problems | None) -> Iterator[Placed]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES + 1), b""), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors put it there
                _refuse_other_formats(line, path)
            if line.strip():
                with problems or nullcontext():
                    yield f"{path}:{number}", _parse_row(line, f"{path}:{number}")
            if problems and problems.is_full:
                return


def _refuse_other_formats(start: bytes, path: Path) -> None:
    """Raise DataError for a file of rows that are not one a line, with a command that makes lines of them."""
    if start.startswith(b"PAR1"):
        kind, modules, read = "Parquet", "json, pyarrow.parquet", "pyarrow.parquet.read_table({}).to_pylist()"
    elif start.lstrip().startswith(b"[") and not (_is_json(start) and path.stat().st_size > len(start) + 3):
        kind, modules, read = "one JSON array", "json", 'json.load(open({}, "rb"))'
    else:
        return
    new = path.with_suffix(".lines.jsonl" if path.suffix == ".jsonl" else ".jsonl")
    source, target = (json.dumps(str(file), ensure_ascii=False) for file in (path, new))
    lines = f'[json.dumps(row, default=str) + "\\n" for row in {read.format(source)}]'
    program = f'import {modules}; lines = {lines}; open({target}, "x").writelines(lines)'
    fix = f"Make JSON lines of it: python -c {shlex.quote(program)}"
    raise DataError(f"the file is {kind}, not JSON lines", where=path, fix=fix)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_row(line: bytes, place: str) -> Row:
    if len(line) > MAX_JSON_BYTES:
        raise DataError(f"a line of more than {MAX_JSON_BYTES} bytes", where=place, fix="One JSON object a line")
    try:
        row = parse_json(line)
        if b"\\u" in line:  # half of a surrogate pair, as a text cut by JavaScript may end in, can only be escaped
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except ValueError as error:
        raise DataError(f"broken JSON: {error}", where=place, fix="One JSON object a line, in UTF-8") from None


def _read_csv(path: Path, label: str | None, problems: Problems | None) -> Iterator[Placed]:
    csv.field_size_limit(MAX_JSON_BYTES)
    place = str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)  # a spreadsheet writes semicolons where numbers have commas
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = [name.strip() for name in next(reader, [])]
            if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
                raise DataError(f"two columns called {twice[0]!r}", where=f"{path}:1", fix="Rename or remove one")
            for cells in filter(None, reader):
                place = f"{path}:{reader.line_num}"
                with problems or nullcontext():
                    yield place, _named_cells(names, cells, place, label if separator == ";" else None)
                if problems and problems.is_full:
                    return
    except csv.Error as error:
        fix = "Save it as CSV in UTF-8"
        raise DataError(f"broken CSV: {error}", where=f"{path}:{reader.line_num}", fix=fix) from None
    except UnicodeDecodeError as error:
        raise DataError(f"broken CSV: {error}", where=place, fix="Save it as CSV in UTF-8") from None


def _named_cells(names: Sequence[str], cells: Sequence[str], place: str, label: str | None) -> Row:
    """A row of CSV; in the column `label` a decimal comma becomes a point."""
    if len(cells) != len(names):
        fix = "Put a cell with a separator or a line break in quotes"
        raise DataError("more or fewer cells than the first line names", where=place, fix=fix)
    row = dict(zip(names, cells, strict=True))
    if label is not None and label in row:
        row[label] = re.sub(r"^([+-]?\d*),(\d+)$", r"\1.\2", row[label].strip())
    return row


def number_labels(placed: Sequence[Placed]) -> None:
    """Make numbers of the labels of CSV, where all of the task's are written as such; else they are names.

    A whole number that begins with 0, or has more than 18 digits, is a name.

    Raises:
        DataError: a label is empty; or one is no number, and another has a decimal point, or it is what other programs
            write for an empty cell among numbers alone: a column that is a number but for a few cells would make a
            class of each.
    """
    for place, row in placed:
        row["label"] = row["label"].strip()
        refuse_empty(row["label"], place)
    whole, fraction = r"[+-]?(0|[1-9]\d{0,17})", r"[+-]?(\d{0,30}\.\d{1,30}|\d{1,30}\.)"
    number = rf"{whole}|({whole}|{fraction})[eE][+-]?\d{{1,3}}|{fraction}"
    odd = [(place, row["label"]) for place, row in placed if not re.fullmatch(number, row["label"])]
    if not odd:
        for _, row in placed:
            row["label"] = int(row["label"]) if re.fullmatch(whole, row["label"]) else float(row["label"])
        return
    place, label = odd[0]
    if len(odd) < len(placed) and all(other.lower() in _MISSING for _, other in odd):
        fix = "Remove the row, fill it in, or give the class another name if it is one"
        raise DataError(f"the label {label!r} is that of an empty cell: the others are numbers", where=place, fix=fix)
    if any(re.fullmatch(fraction, row["label"]) for _, row in placed):
        fix = "Remove the row, or write all labels as names or all as numbers"
        raise DataError(f"the label {label!r} is no number, and others are", where=place, fix=fix)
