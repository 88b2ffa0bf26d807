"""`lorasb generate`: answers of the base and of adapters side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from .verb import Run, base_elsewhere


def run(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapters: Annotated[
        str | None, typer.Option(help="Names, folders or Hub ids, with commas; all by default.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, to ask it alone.")] = None,
    onnx: Annotated[
        str | None, typer.Option(metavar="DIR", help="Ask an ONNX export instead, by ONNX Runtime.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Ask the base and the adapters the same thing, here, without a server."""
    from lorasb_export.inference import side_by_side

    if onnx is not None:
        from pathlib import Path

        from lorasb_export.export.onnx_run import answers

        chosen = adapters.split(",") if adapters is not None else None
        _print(run, prompt, answers(Path(onnx), prompt, chosen, max_tokens=max_tokens))
        return
    names = adapters.split(",") if adapters is not None else ([] if model else run.project.adapter_names())
    folders = {name.strip(): run.project.find_adapter(name.strip()) for name in names}
    first = next(iter(folders.values()), None)
    base = base_elsewhere(run, model, first) if first else model or run.project.require_model()
    revision = None if model else run.project.revision
    found = side_by_side(prompt, folders, base=base, revision=revision, max_tokens=max_tokens, dtype=dtype)
    _print(run, prompt, found)


def _print(run: Run, prompt: str, found: dict[str, str]) -> None:
    run.result({"prompt": prompt, "answers": found}, "\n".join(f"[{name}] {answer}" for name, answer in found.items()))
