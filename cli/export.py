"""`lorasb export`: PEFT and ONNX."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorasb_export.choices import MAX_DROP, ExportFormat, Precision
from lorasb_export.errors import LoraSBError
from lorasb_export.files.storage import expanded, folder_bytes

from .verb import Run
from .words import FORMS, given, human_bytes, spelled_out


def run(
    run: Run,
    adapter: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER",
            help=f"Names, folders or Hub ids, {FORMS}. Default: the first task's; for onnx-adapters, all.",
        ),
    ] = None,
    format: Annotated[
        ExportFormat | None, typer.Option("--format", help="What to write.  [default: peft]", show_default=False)
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write; FORMAT/ by default.")] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Add to this onnx-adapters export; where none is named, what it lacks or has changed since.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Precision of an ONNX graph.  [default: fp32]"),
    ] = None,
    routed: Annotated[
        bool,
        typer.Option("--routed", help="For onnx-adapters: one batch may mix tasks, by the input adapter_ids."),
    ] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the adapter in torch: an ONNX graph, of many adapters the first 32 (not bf16); or "
            "PEFT's logits, which needs the base in fp32.  [default: yes for a graph, no for peft]",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Held-out rows to compare on, if not the task's own."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help=f"Points of the metric an ONNX graph may lose there.  [default: {MAX_DROP}]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder, or an adapter in --into.")
    ] = False,
) -> None:
    """Write adapters in another format."""
    if into is not None and (routed or out is not None or precision is not None):
        raise typer.BadParameter("--into goes without --out, --routed and --precision: the folder has its own")
    if into is not None and format not in (None, "onnx-adapters"):
        raise typer.BadParameter(f"--into adds to an export of onnx-adapters, not of {format}")
    format = format or "peft"
    to_peft = into is None and format == "peft"
    verify = not to_peft if verify is None else verify
    compared = data is not None or max_drop is not None  # on held-out rows, though the graph be fp32
    if compared and (to_peft or not verify or precision == "bf16"):
        what = "--data and --max-drop are for comparing an ONNX graph with torch"
        raise typer.BadParameter(f"{what}: not for peft, bf16 or --no-verify")
    if to_peft and precision is not None:
        raise typer.BadParameter("--precision is of an ONNX graph: add --format onnx or onnx-adapters")
    everything = not adapter and (into is not None or format == "onnx-adapters")
    words = spelled_out(adapter or (), run.project.adapter_names)
    folders = [] if everything else [run.project.find_adapter(word) for word in words or (None,)]
    from lorasb_export.exporting.onnx_adapters import add_onnx_adapters, exported_record  # only now: it brings torch
    from lorasb_export.project.base import find_base
    from lorasb_export.project.export import adapters_to_export, tasks_to_compare

    failed: dict[str, LoraSBError] = {}
    if everything:
        folders, failed = adapters_to_export(run.project, None if into is None else expanded(into))
    if into is not None and not folders:
        result = exported_record(expanded(into)) | {"out": into, "bytes": folder_bytes(expanded(into))}
        run.result(result, "" if failed else f"Nothing to add to {into}", failed)
        return
    unread = to_peft and not verify  # a LoRA is written without the base's weights
    base = model if unread else find_base(run.project, model, folders[0])
    options: dict[str, Any] = {"verify": verify} | given(max_drop=max_drop)
    precision = precision or ("fp32" if into is None else exported_record(expanded(into))["precision"])
    if verify and not to_peft and precision != "bf16" and (precision != "fp32" or compared):
        options["data"] = tasks_to_compare(run.project, folders, data)
    if into is None:
        from lorasb_export.exporting.export import export

        target, verb = out or format, f"Exported {format} to"
        options |= {"precision": precision, "routed": routed, "overwrite": overwrite}
        result = export(folders, target, format=format, base=base, **options)
    else:
        target, verb = into, "Added to"
        options["overwrite"] = overwrite or everything  # all that is asked for: what has changed too
        result = add_onnx_adapters(folders, into, base=base, **options)
    lines = [f"{verb} {target} ({human_bytes(result['bytes'])})", *_comparisons(result.get("verify", {}))]
    run.result(result, "\n".join(lines), failed)


def _comparisons(verify: dict[str, Any]) -> list[str]:
    """What the comparison with torch found, a line for each adapter."""
    if "relative_difference" in verify:
        on = f"{verify['rows']} rows of its task" if verify["rows"] else "built-in text"
        return [
            f"PEFT's logits differ from the adapter's by {verify['relative_difference']:.1g} of the largest, on {on}"
        ]
    results = {"": verify} if "prompts" in verify else verify
    lines = []
    for name, found in results.items():
        line = f"{name + ': ' if name else ''}"
        if "equal_prompts" in found:
            line += f"{found['equal_prompts']} of {found['prompts']} answers equal torch's"
        else:
            line += f"numbers differ from torch's by {found['gap']:.1g} at most"
        if "metric" in found:
            line += (
                f"; {found['metric']} on {found['rows']} held-out rows {found['onnx']:.1%}, torch {found['torch']:.1%}"
            )
        if found.get("rows_left_out"):
            reason = "they have no answer, or do not fit into the model's context"
            line += f"; {found['rows_left_out']} held-out rows left out: {reason}"
        lines.append(line)
    return lines
