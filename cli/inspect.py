"""`lorasb inspect`: what is this folder, what does this project have, or what would this data teach?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasb_export.errors import SettingsError

from .inspect_text import data_lines, lines_of, project_lines, repository_lines
from .verb import Run
from .words import human_bytes


def run(
    run: Run,
    path: Annotated[
        str | None,
        typer.Argument(help="Any folder, an adapter of the project by name, or a Hub id. Default: the project itself."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TASK|PATH",
            help="Show these rows as they would be trained on. Of a basis: how much of their gradient it captures.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model for --data: a folder or a Hub id.  [default: the project's, or the basis's]"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Rows of --data are cut after so many tokens.  [default: as fit would]")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with SHA256SUMS, which a push publishes beside them.")
    ] = False,
) -> None:
    """Describe a folder, a project, or how rows are tokenized. Kind, rank, modules, hashes; token counts."""
    if path is None and verify:
        raise typer.BadParameter("--verify is for one folder: name it")
    if model is not None and data is None:
        raise typer.BadParameter("--model is for --data: nothing else reads the base")
    if max_length is not None and (data is None or path is not None):
        raise typer.BadParameter("--max-length is for the rows of --data, without a folder")
    if path is None and data is not None:
        from lorasb_export.project.inspect import inspect_rows
        from lorasb_export.settings import FitSettings

        rows = inspect_rows(run.project, data, model, run.given(FitSettings))
        run.result(rows, "\n".join(data_lines(rows)))
        return
    if path is None:
        from lorasb_export.project.inspect import inspect_project

        project = inspect_project(run.project)
        run.result(project, "\n".join(project_lines(project)))
        return
    folder = _folder(run, path)
    source = None if data is None else run.project.find_data(data)
    from lorasb_export.inspection import inspect_folder  # only now: it brings torch

    found = inspect_folder(folder, data=source, base=model, verify=verify)
    shown = {**found, **({"bytes": human_bytes(found["bytes"])} if "bytes" in found else {})}
    if data is not None:
        from lorasb_export.calibration.capture import one_line

        shown["capture"] = f"{one_line(found['capture'])}; --json lists every module"
    run.result(found, "\n".join(repository_lines(found) if found["kind"] == "project" else lines_of(shown)))


def _folder(run: Run, path: str) -> str:
    if Path(path).is_file():
        raise SettingsError("a file, not a folder", where=path, fix=f"To see rows: lorasb inspect --data {path}")
    try:
        return run.project.find_folder(path)
    except SettingsError as error:
        if path not in run.project.tasks:
            raise
        fix = f"{error.fix}; what it would be trained on: lorasb inspect --data {path}"
        raise SettingsError(error.what, where=error.where, fix=fix) from None
