"""The files of `lorasb generate`: rows to ask (`--prompts`), and what was answered to each (`--out`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..data.row_files import read_rows
from ..data.rows import Prompt, Row, prompt_of
from ..errors import DataError, OutputError, Problems
from ..files.atomic import atomic_file
from ..files.output import cannot_write, refuse_existing_file
from ..files.storage import expanded, real
from .predictions import json_line


def read_prompts(path: Path) -> tuple[list[Row], list[Prompt]]:
    """The rows of a file of JSON lines, or of CSV, and what each asks; answers in them are ignored.

    Raises:
        DataError: there is none; or with file and line, up to ten at once, a broken line, or a row that asks nothing.
    """
    rows: list[Row] = []
    prompts: list[Prompt] = []
    problems = Problems()
    with problems:  # what ends the reading, as a file that is not there
        for place, row in read_rows(path, label=None, problems=problems):
            with problems:
                prompts.append(prompt_of(row, place))
                rows.append(row)
    problems.raise_all("nothing was asked")
    if not rows:
        raise DataError("there are no rows to ask", where=path, fix="Add at least one JSON object, one a line")
    return rows, prompts


def answered(rows: Sequence[Row], found: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """For each row its `number` from 1, the `row`, and `answers`: name → what it said."""
    return [
        {"number": number, "row": row, "answers": {name: said[number - 1] for name, said in found.items()}}
        for number, row in enumerate(rows, 1)
    ]


@contextmanager
def answers_file(
    path: str, *, overwrite: bool, prompts: str | None
) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], object]]:
    """Yield what writes lines of JSON to `path`; they are there when the block ends without an exception.

    Args:
        prompts: the file that is asked, which it must not be.

    Raises:
        OutputError: it cannot be written, before the block begins; or it exists and `overwrite` is false.
    """
    target = real(expanded(path))  # a link stays one
    if prompts is not None and target.exists() and target.samefile(expanded(prompts)):
        raise OutputError("these are the prompts to be asked", where=path, fix="Give --out another file")
    refuse_existing_file(expanded(path), overwrite)
    with ExitStack() as stack:
        with cannot_write(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(stack.enter_context(atomic_file(target)).open("wb"))

        def write(lines: Iterable[Mapping[str, Any]]) -> None:
            with cannot_write(target):
                file.writelines(map(json_line, lines))
                file.flush()

        yield write
