"""`lorasb serve`: an OpenAI-compatible vLLM server."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from .verb import Run, human_bytes


def run(
    run: Run,
    flags: Annotated[list[str] | None, typer.Argument(metavar="[-- VLLM FLAGS]", help="Passed to vLLM.")] = None,
    adapters: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names, folders, Hub ids or name=path; all by default.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A merged folder to serve alone, or the adapters' base.")] = None,
    mode: Annotated[str, typer.Option(help="folded: each adapter as an ordinary LoRA.")] = "folded",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the vLLM command, start nothing.")] = False,
) -> None:
    """Serve the base and its adapters by name, until Ctrl-C."""
    from lorasb_export.names import resolve_adapters
    from lorasb_export.serve import serve

    project = run.project
    words = adapters.split(",") if adapters is not None else project.adapter_names()
    alone = adapters is None and model is not None
    named = {} if alone else resolve_adapters([word.strip() for word in words], project.folder / "adapters")
    options: dict[str, Any] = {"model": model, "mode": mode, "host": host, "port": port, "dtype": dtype}

    def ready(server: dict[str, Any]) -> None:
        run.result(server, f"Serving {', '.join(server['models'])} on {server['url']}/v1  (Ctrl-C stops)")

    if dry_run:
        plan = serve(named, **options, extra=flags or [], dry_run=True)
        assert isinstance(plan, dict)
        taken = human_bytes(plan["memory"]["slots_bytes"])
        run.result(plan, f"{shlex.join(plan['command'])}\n# adapters take {taken} in vLLM")
        return
    run.say("Starting vLLM; this takes a minute on a CPU")
    code = serve(named, **options, extra=flags or [], on_ready=ready)
    raise typer.Exit(int(code))  # type: ignore[arg-type]
