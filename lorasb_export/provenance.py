"""What wrote an artifact: the command line and the versions, to be recorded in it."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path


def command() -> str | None:
    """The `lorasb` command line this process runs, with the last part of every absolute path; None for other programs.

    It is provenance: with the settings that are recorded beside it, how to make the same thing again.
    """
    program = Path(sys.argv[0])
    if program.name != "lorasb" and program.parent.name != "lorasb_cli":
        return None
    return shlex.join(["lorasb", *map(without_folders, sys.argv[1:])])


def without_folders(word: str) -> str:
    """Of every absolute path in `path`, `name=path`, `--option=path` or several with commas, the last part."""
    before, equals, value = word.rpartition("=")
    parts = [os.path.basename(os.path.normpath(part)) if os.path.isabs(part) else part for part in value.split(",")]
    return f"{before}{equals}{','.join(parts)}"


def versions() -> dict[str, str]:
    """Versions of what writes an artifact, for its provenance."""
    return {name: version(name) for name in ("lorasb", "torch", "transformers")}
