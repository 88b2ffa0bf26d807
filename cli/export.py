"""`lorasb export`: PEFT and ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import typer

from lorasb_export.choices import MAX_DROP, ExportFormat, Precision
from lorasb_export.errors import LoraSBError
from lorasb_export.files.storage import expanded, folder_bytes

from .verb import Run
from .words import FORMS, given, human_bytes, spelled_out

INTERRUPTED = (
    "What was being written is not there; with {name} in --out the folders before it are: name the adapters that are "
    "left."
)


def run(
    run: Run,
    adapter: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER",
            help=f"Names, folders or Hub ids, {FORMS}. Default: the first task's; for onnx-adapters, "
            "and with {name} in --out, all.",
        ),
    ] = None,
    format: Annotated[
        ExportFormat | None, typer.Option("--format", help="What to write.  [default: peft]", show_default=False)
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="The folder to write; FORMAT/ by default. With {name} in it one for each adapter."),
    ] = None,
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
    from lorasb_export.names import PLACE, ours_in

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
    each = out is not None and PLACE in out
    if each and format == "onnx-adapters":
        raise typer.BadParameter(f"{PLACE} in --out is for peft and onnx: a folder of onnx-adapters holds all of them")
    everything = not adapter and (each or into is not None or format == "onnx-adapters")
    words = spelled_out(adapter or (), partial(ours_in, run.project.adapters_folder))
    folders = [] if everything else [run.project.find_adapter(word) for word in words or (None,)]
    from lorasb_export.exporting.onnx_adapters import exported_record  # only now: it brings torch
    from lorasb_export.project.export import Export, adapters_to_export

    record = None if into is None else exported_record(expanded(into))
    asked = Export(
        run.project,
        format="peft" if to_peft else "onnx-adapters" if into is not None else format,
        precision=precision or (record["precision"] if record else "fp32"),
        model=model,
        verify=verify,
        data=data,
        compared=compared,
        overwrite=overwrite or (into is not None and everything),  # all that is asked for: what has changed too
        routed=routed,
        **given(max_drop=max_drop),
    )
    failed: dict[str, LoraSBError] = {}
    if out is not None and each:
        folders = folders or [str(run.project.adapter_folder(name)) for name in ours_in(run.project.adapters_folder)]
        if not folders:
            raise run.project.lacks("no adapter in this project", "Run lorasb fit, or name one")
        _each(run, asked.write_each(folders, out), failed)
        return
    if everything:
        folders, failed = adapters_to_export(run.project, None if into is None else expanded(into))
    if into is None:
        target, verb = out or format, f"Exported {format} to"
        result = asked.write(folders, target)
    elif folders:
        target, verb = into, "Added to"
        result = asked.add(folders, into)
    else:
        result = {**(record or {}), "out": into, "bytes": folder_bytes(expanded(into))}
        run.result(result, "" if failed else f"Nothing to add to {into}", failed)
        return
    run.result(result, "\n".join(_lines(f"{verb} {target}", result)), failed)


def _each(
    run: Run, exported: Iterator[tuple[str, dict[str, Any] | LoraSBError]], failed: dict[str, LoraSBError]
) -> None:
    results: dict[str, Any] = {}
    lines: list[str] = []
    for name, result in run.done_of(exported, {"exported": results}, lambda: "\n".join(lines), failed):
        results[name] = result
        lines.extend(_lines(f"{name}: exported to {result['out']}", result))
    run.result({"exported": results}, "\n".join(lines), failed)


def _lines(done: str, result: dict[str, Any]) -> list[str]:
    return [f"{done} ({human_bytes(result['bytes'])})", *_comparisons(result.get("verify", {}))]


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
