"""The file of `lorasb evaluate --predictions`: JSON lines, one for each row of each adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.row_files import split_files
from ..errors import OutputError
from ..files.output import cannot_write, refuse_existing_file
from ..files.storage import expanded


def json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"


class PredictionsFile:
    """What is written outlasts an interruption; what is replaced is there until the first lines are written.

    Args:
        overwrite: replace the file.

    Raises:
        OutputError: it is there already, or is no file.
    """

    def __init__(self, path: str | Path, *, overwrite: bool) -> None:
        self.path, self._mode = expanded(path), "wb" if overwrite else "ab"
        refuse_existing_file(self.path, overwrite)

    def refuse_rows_of(self, data: Path) -> None:
        """Raise OutputError where it is the data to be scored, or a file of it."""
        data = expanded(data)
        files = split_files(data).values() if data.is_dir() else [data]
        if self.path.exists() and any(file.exists() and file.samefile(self.path) for file in files):
            raise OutputError("these are the rows to be scored", where=self.path, fix="Give --predictions another file")

    def require_writable(self) -> None:
        """Make its folder; raise OutputError now, and not after an hour, where it could not be written."""
        with cannot_write(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            self.path.open("ab").close()
            if is_new:
                self.path.unlink()

    def append(self, name: str, outcome: dict[str, Any]) -> None:
        """Move the predictions out of what `evaluate` gave of the adapter `name`."""
        lines = ({"name": name, "split": outcome["split"], **row} for row in outcome.pop("predictions"))
        with cannot_write(self.path), self.path.open(self._mode) as end:
            end.writelines(map(json_line, lines))
        self._mode = "ab"
