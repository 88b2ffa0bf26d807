"""Write docs/reference/cli.md from the verbs' --help, or with --check say whether it is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "reference" / "cli.md"
VERBS = "init calibrate fit evaluate generate merge export push serve inspect quickstart".split()
INTRODUCTION = """# Command line

Generated from `--help` by `make docs`; do not edit. Every verb prints its result on stdout and everything else on
stderr, and exits with 0 (done), 1 (an expected failure, explained in one line), 2 (wrong usage), 130 or 143
(interrupted by Ctrl-C or SIGTERM), or 141 (nobody reads its output any longer).
Paths written in `lorasb.toml` are relative to that file, paths on the command line to the working folder.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for verb in VERBS:
        text = subprocess.run(
            [sys.executable, "-m", "lorasb_cli", verb, "--help"],
            env={**os.environ, "COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.replace("python -m lorasb_cli", "lorasb")
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## lorasb {verb}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/reference/cli.md is out of date: run make docs")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
