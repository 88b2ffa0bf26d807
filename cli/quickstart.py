"""`lorasb quickstart`: the whole line on a small real model."""

from __future__ import annotations

from typing import Annotated

import typer

from .verb import Run

INTERRUPTED = (
    "What was made so far, if anything, is in its folder: remove it before you start again, or pass --overwrite."
)


def run(
    run: Run,
    out: Annotated[str, typer.Option(help="Project folder to make.")] = "quickstart",
    serve: Annotated[bool, typer.Option(help="Start vLLM too, where it is installed.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Two tasks on one basis: fit, merge, export, serve and compare. A few minutes on two cores."""
    from lorasb_export.quickstart.line import quickstart

    result, text = quickstart(out, serve=serve, overwrite=overwrite, say=run.say)
    run.result(result, text)
