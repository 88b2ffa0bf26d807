"""What wrote an artifact, to be recorded in it: the command line, the versions."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

# What begins with a ~ and has no folder stays as it is; to look whether it has one, at every ~, would take minutes.
_FROM_ROOT = re.compile(r"(?:(?<=[=,@])|^)(?:~|(?:file://)?/)[^,]*")
MAX_COMMAND = 4000  # characters of a command

CURVE = "training.png"  # the picture of an adapter's losses


def command() -> str | None:
    """The `lorasb` command line this process runs, with the last part of every absolute path; None for other programs.

    It is provenance: with the settings that are recorded beside it, how to make the same thing again. Of one that
    names thousands of tasks the first are kept: it lies in the folder of each of them.
    """
    program = Path(sys.argv[0])
    if program.name != "lorasb" and program.parent.name != "lorasb_cli":
        return None
    words = list(map(without_folders, sys.argv[1:]))
    text = shlex.join(["lorasb", *words])
    return text if len(text) <= MAX_COMMAND else f"{text[:MAX_COMMAND]} … ({len(words):,} words)"


def without_folders(word: str) -> str:
    """Of every path from the root or a home in `path`, `path=weight`, `name=path`, `@path`, `--option=path` or several
    with commas, the last part."""
    return _FROM_ROOT.sub(lambda found: os.path.basename(os.path.normpath(found[0])), word)


def versions() -> dict[str, str]:
    """Versions of what writes an artifact, for its provenance."""
    return {name: version(name) for name in ("lorasb", "torch", "transformers")}
