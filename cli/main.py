"""The `lorasb` command: registers the verbs. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import sys
from typing import Any

import typer

import lorasb_export

from . import calibrate, evaluate, export, fit, generate, init, inspect, merge, push, quickstart, serve
from .verb import NOTHING_WRITTEN, as_command, print_error

_USAGE_ERROR: Any = typer.BadParameter.__base__  # which typer itself does not export

app = typer.Typer(
    name="lorasb",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for module in (init, calibrate, fit, evaluate, generate, merge, export, push, serve, inspect, quickstart):
    app.command(module.__name__.rpartition(".")[2])(as_command(module.run))


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """LoRA-SB: one frozen basis for a base model, a tiny adapter for every task."""
    if version:
        typer.echo(lorasb_export.__version__)
        raise typer.Exit()


def main() -> None:
    """Console entry point."""
    try:
        app()
    except KeyboardInterrupt:  # before a verb began
        typer.echo(f"Interrupted. {NOTHING_WRITTEN}", err=True)
        raise SystemExit(130) from None
    except SystemExit as end:
        wrong = end.__context__  # usage that typer has told of on stderr
        if "--json" in sys.argv and isinstance(wrong, _USAGE_ERROR):
            print_error(wrong, wrong.format_message())
        raise
