"""`lorasb serve`: an OpenAI-compatible vLLM server."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import typer

from lorasb_export.choices import ServingMode
from lorasb_export.errors import SettingsError

from .serve_text import plan_text, serving_line
from .verb import Run
from .words import listed, spelled_out

SAVES_MEMORY = ("--dtype bfloat16",)
INTERRUPTED = "No server is left running."


def run(
    run: Run,
    flags: Annotated[list[str] | None, typer.Argument(metavar="-- VLLM FLAGS", help="Passed to vLLM.")] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…|@FILE",
            help="Names, patterns of them, folders, Hub ids or name=path, or a file with one a line; all by default.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A merged folder to serve alone, or the adapters' base.")] = None,
    adapters_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the adapters, or owner/name/adapters on the Hub; without --adapters, all in it are served.",
        ),
    ] = None,
    mode: Annotated[
        ServingMode,
        typer.Option(help="shared: the basis once, one R per adapter; folded: each a LoRA; auto: shared if it can."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Data type of the model.")
    ] = "auto",
    allow_updates: Annotated[
        bool, typer.Option("--allow-updates", help="Let clients with the key load/unload adapters of --adapters-dir.")
    ] = False,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File with the key clients have to give (or several, one a line); else VLLM_API_KEY."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the vLLM command, start nothing.")] = False,
) -> None:
    """Serve the base and its adapters by name, until Ctrl-C."""
    from lorasb_export.hub.fetch import adapters_folder
    from lorasb_export.names import ours_in, resolve_adapters

    project = run.project
    folder = project.adapters_folder if adapters_dir is None else adapters_folder(adapters_dir)
    alone = adapters is None and adapters_dir is None and model is not None
    if adapters is not None:
        words = spelled_out(listed(adapters), partial(ours_in, folder))
    else:
        words = [] if alone else ours_in(folder)
    if not words and not alone:
        if adapters_dir is None:
            raise project.lacks("no adapter to serve", "Run lorasb fit, or give --model alone for a merged folder")
        raise SettingsError("no adapter in that folder", where=adapters_dir, fix="Check the path")
    everything = adapters is None  # then one that is damaged does not keep the others from being served
    tasks = project.tasks if adapters_dir is None else ()
    named = {} if alone else resolve_adapters(words, folder, tasks, pass_over=everything)
    from lorasb_export.project.base import find_base  # only now: it brings torch
    from lorasb_export.serving.api_keys import api_key
    from lorasb_export.serving.launcher import serve
    from lorasb_export.serving.plan import make_plan

    base = find_base(project, model, *named.values())
    options: dict[str, Any] = {"model": base, "mode": mode, "host": host, "port": port, "dtype": dtype}
    options |= {"extra": flags or [], "updates_from": folder if allow_updates else None}
    options |= {"pass_over": everything}

    def ready(server: dict[str, Any]) -> None:
        run.result(server, serving_line(server))

    if dry_run:
        plan = make_plan(named, **options, has_key=bool(api_key(api_key_file))).describe()
        run.result(plan, plan_text(plan))
        return
    options["echo"] = not run.quiet
    starting = partial(run.say, "Starting vLLM; this takes a minute on a CPU")
    raise typer.Exit(serve(named, **options, api_key_file=api_key_file, on_start=starting, on_ready=ready))
