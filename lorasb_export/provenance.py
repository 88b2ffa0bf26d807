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
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["lorasb", *words])


def versions() -> dict[str, str]:
    """Versions of what writes an artifact, for its provenance."""
    return {name: version(name) for name in ("lorasb", "torch", "transformers")}
