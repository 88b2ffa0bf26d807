"""`lorasb export`: PEFT and ONNX."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .verb import Run, human_bytes


def run(
    run: Run,
    adapter: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Names, folders or Hub ids.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="peft, onnx or onnx-adapters.")] = "peft",
    out: Annotated[str | None, typer.Option(help="The folder to write; FORMAT/ by default.")] = None,
    into: Annotated[str | None, typer.Option(metavar="DIR", help="Add to this onnx-adapters export.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where it is not where the adapter says.")] = None,
    precision: Annotated[str, typer.Option(help="Of an ONNX graph: fp32, fp16, bf16, int8 or int4.")] = "fp32",
    routed: Annotated[
        bool, typer.Option("--routed", help="onnx-adapters: one batch may mix tasks, chosen by the input adapter_ids.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Compare an ONNX graph with the adapter in torch.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder, or an adapter in --into.")] = False,
) -> None:
    """Write adapters in another format."""
    from lorasb_export.export import export

    if into is not None:
        if out is not None or routed:
            raise typer.BadParameter("--into goes without --out and --routed")
        from lorasb_export.export.onnx_adapters import add_onnx_adapters

        folders = [run.project.find_adapter(word) for word in adapter or []] or [run.project.find_adapter(None)]
        result = add_onnx_adapters(folders, into, base=model, verify=verify, overwrite=overwrite)
        run.result(result, f"Added to {into}, now {len(result['adapters'])} adapters ({human_bytes(result['bytes'])})")
        return
    words = adapter or (run.project.adapter_names() if format == "onnx-adapters" else [])
    folders = [run.project.find_adapter(word) for word in words] or [run.project.find_adapter(None)]
    target = out or format
    options: dict[str, Any] = {"precision": precision, "routed": routed, "verify": verify, "overwrite": overwrite}
    result = export(folders, target, format=format, base=model, **options)
    run.result(result, f"Exported {format} to {target} ({human_bytes(result['bytes'])})")
