"""`lorasb inspect`: what is this folder?"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from .verb import Run, human_bytes

_MAX_LINES = 40  # lines of one part, as there may be of adapters or modules


def run(
    run: Run,
    path: Annotated[str, typer.Argument(help="Any folder, an adapter of the project by name, or a Hub id.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="TASK|PATH", help="For a basis: measure how much of this task's gradient it captures."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model for --data, if it has moved since the basis was made.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with SHA256SUMS, which a push publishes beside them.")
    ] = False,
) -> None:
    """Say what a folder is. Kind, rank, modules, sizes, hashes, spectrum, basis match."""
    if model is not None and data is None:
        raise typer.BadParameter("--model is for --data: nothing else loads the base")
    folder = run.project.find_folder(path)
    if data is not None and data in run.project.tasks and Path(data).exists():
        run.say(f"{data} is taken for the task: ./{data} names the path")
    source = run.project.task_source(data) if data is not None and data in run.project.tasks else data
    from lorasb_export.inspection import inspect_folder  # only now: it brings torch

    found = inspect_folder(folder, data=source, base=model, verify=verify)
    shown = {**found, **({"bytes": human_bytes(found["bytes"])} if "bytes" in found else {})}
    if data is not None:
        from lorasb_export.calibration.capture import one_line

        shown["capture"] = f"{one_line(found['capture'])}; --json lists every module"
    run.result(found, "\n".join(_lines(shown)))


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, entry in islice(value.items(), _MAX_LINES):
        if isinstance(entry, dict):
            lines += [f"{indent}{key}:", *_lines(entry, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {f'{entry:.4g}' if isinstance(entry, float) else entry}")
    if len(value) > _MAX_LINES:
        lines.append(f"{indent}… and {len(value) - _MAX_LINES:,} more (--json lists all)")
    return lines
