"""`lorasb export`: PEFT and ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import typer

from lorasb_export.choices import MAX_DROP, ExportFormat, Precision
from lorasb_export.errors import LoraSBError

from .export_text import export_lines
from .verb import Run
from .words import FORMS, spelled_out

INTERRUPTED = (
    "Nothing unfinished is left; what was there before is as it was. With {name} in --out, earlier folders are "
    "complete: run again with the remaining adapters."
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
            help="Add to this onnx-adapters export. Without ADAPTER: all that are new or changed.",
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
            help="Compare with torch: an ONNX graph (at most 32 adapters; not bf16), or PEFT's logits (loads the base "
            "in fp32).  [default: yes for a graph, no for peft]",
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
    _refuse_contradictions(
        format=format,
        out=out,
        into=into,
        precision=precision,
        routed=routed,
        verify=verify,
        with_rows=data is not None or max_drop is not None,
    )
    from lorasb_export.names import ours_in

    words = spelled_out(adapter or (), partial(ours_in, run.project.adapters_folder))
    named = [run.project.find_adapter(word) for word in words]
    format = "onnx-adapters" if into is not None else format or "peft"
    from lorasb_export.project.export import Export  # only now: it brings torch

    asked = Export(
        run.project,
        into or out or format,
        format=format,
        adds=into is not None,
        precision=precision,
        model=model,
        verify=verify,
        data=data,
        max_drop=max_drop,
        overwrite=overwrite or (into is not None and not named),  # all that is asked for: what has changed too
        routed=routed,
    )
    folders, failed = (named, {}) if named else asked.adapters()
    if asked.is_one_each:
        _each(run, asked.write_each(folders), failed)
        return
    result = asked.write(folders)
    if folders:
        done = f"Added to {into}" if into is not None else f"Exported {format} to {asked.out}"
        run.result(result, "\n".join(export_lines(done, result)), failed)
    else:
        run.result(result, "" if failed else f"Nothing to add to {into}", failed)


def _refuse_contradictions(
    *,
    format: str | None,
    out: str | None,
    into: str | None,
    precision: str | None,
    routed: bool,
    verify: bool | None,
    with_rows: bool,
) -> None:
    """Raise typer.BadParameter for options that do not go together.

    Args:
        with_rows: it is to be compared on held-out rows.
    """
    from lorasb_export.names import PLACE

    if into is not None and (routed or out is not None or precision is not None):
        raise typer.BadParameter("--into goes without --out, --routed and --precision: the folder has its own")
    if into is not None and format not in (None, "onnx-adapters"):
        raise typer.BadParameter(f"--into adds to an export of onnx-adapters, not of {format}")
    to_peft = into is None and format in (None, "peft")
    if with_rows and (to_peft or verify is False or precision == "bf16"):
        what = "--data and --max-drop are for comparing an ONNX graph with torch"
        raise typer.BadParameter(f"{what}: not for peft, bf16 or --no-verify")
    if to_peft and precision is not None:
        raise typer.BadParameter("--precision is of an ONNX graph: add --format onnx or onnx-adapters")
    if out is not None and PLACE in out and format == "onnx-adapters":
        raise typer.BadParameter(f"{PLACE} in --out is for peft and onnx: a folder of onnx-adapters holds all of them")


def _each(
    run: Run, exported: Iterator[tuple[str, dict[str, Any] | LoraSBError]], failed: dict[str, LoraSBError]
) -> None:
    results: dict[str, Any] = {}
    lines: list[str] = []
    for name, result in run.done_of(exported, {"exported": results}, lambda: "\n".join(lines), failed):
        results[name] = result
        lines.extend(export_lines(f"{name}: exported to {result['out']}", result))
    run.result({"exported": results}, "\n".join(lines), failed)
