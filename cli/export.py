"""`lorasb export`: PEFT and ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from .verb import Run, human_bytes


def run(
    run: Run,
    adapter: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Names, folders or Hub ids.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="peft, onnx or onnx-adapters.")] = "peft",
    out: Annotated[str | None, typer.Option(help="The folder to write; FORMAT/ by default.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where it is not where the adapter says.")] = None,
    precision: Annotated[str, typer.Option(help="Of an ONNX graph: fp32, fp16, bf16, int8 or int4.")] = "fp32",
    verify: Annotated[bool, typer.Option("--verify", help="Compare with the adapter in torch.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Write adapters in another format."""
    from lorasb_export.export import export

    words = adapter or (run.project.adapter_names() if format == "onnx-adapters" else [])
    folders = [run.project.find_adapter(word) for word in words] or [run.project.find_adapter(None)]
    target = out or format
    result = export(folders, target, format=format, base=model, precision=precision, verify=verify, overwrite=overwrite)
    run.result(result, f"Exported {format} to {target} ({human_bytes(result['bytes'])})")
