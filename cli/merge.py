"""`lorasb merge`: a plain model folder with s·B·R·A added, or the sum of adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasb_export.choices import Dtype, MergedOnto
from lorasb_export.files.storage import real

from .merge_text import combined_text, merged_text, plan_text
from .verb import Run

MODEL, MAX_SHARD = "model", "5GB"
INTERRUPTED = "Nothing was written to --out; the same command again goes on after the last finished shard of a model."


def run(
    run: Run,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]",
            help="Name, folder or Hub id; the first task's by default. Several are added up.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="The folder to write.")] = MODEL,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write the sum as an adapter of their one basis, not as a model.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    base_dtype: Annotated[
        MergedOnto, typer.Option(help="nf4: round the base as `fit --dtype nf4` holds it; auto: take it as it is.")
    ] = "auto",
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Data type of the weights written; auto: as in the base's checkpoint.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest file.")] = MAX_SHARD,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the logits with those of base + adapter.")] = False,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="Write how much of its update each module keeps, and a plot beside it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder, and the report's files.")
    ] = False,
) -> None:
    """Merge adapters into a plain model folder. It is the base with s·B·R·A added to its weights."""
    if dry_run and (verify or report is not None):
        raise typer.BadParameter("--dry-run writes no model that --verify or --report could look at")
    if as_adapter:
        of_a_model = (model is not None, base_dtype != "auto", dtype != "auto", max_shard_size != MAX_SHARD)
        if any((*of_a_model, verify, dry_run, report is not None)):
            raise typer.BadParameter("--as-adapter goes with --out and --overwrite alone: it writes no model")
        if out == MODEL:
            raise typer.BadParameter("--as-adapter needs --out, such as adapters/mixed")
        _combine(run, adapters or [], out, overwrite=overwrite)
        return
    chosen = _adapters(run, adapters or [])
    first = chosen if isinstance(chosen, str) else next(iter(chosen))
    from lorasb_export.merging.merge import merge  # only now: it brings torch
    from lorasb_export.project.base import find_base

    result = merge(
        chosen,
        out,
        base=find_base(run.project, model, first),
        base_dtype=base_dtype,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        overwrite=overwrite,
        dry_run=dry_run,
        report=report,
    )
    run.result(result, plan_text(result) if dry_run else merged_text(result))


def _combine(run: Run, words: list[str], out: str, *, overwrite: bool) -> None:
    chosen = _adapters(run, words)
    from lorasb_export.merging.combine import combine_into  # only now: it brings torch

    weights: dict[str | Path, float] = {chosen: 1.0} if isinstance(chosen, str) else chosen
    result = combine_into(weights, out, overwrite=overwrite)
    run.result(result, combined_text(result))


def _adapters(run: Run, words: list[str]) -> str | dict[str | Path, float]:
    """One adapter as it is named, or {folder or Hub id: weight}."""
    if len(words) < 2 and not any(map(_weight, words)):
        return run.project.find_adapter(words[0] if words else None)
    weights: dict[str | Path, float] = {}
    seen: set[Path] = set()  # one folder has many names
    for name, weight in map(_parse, words):
        found = run.project.find_adapter(name)
        if real(found) in seen:
            raise typer.BadParameter(f"{name!r} is given twice")
        seen.add(real(found))
        weights[found] = weight
    return weights


def _weight(word: str) -> str:
    """The text after the last `=`; none in the name of an existing folder."""
    if "=" not in word or Path(word).is_dir():
        return ""
    return word.rpartition("=")[2]


def _parse(word: str) -> tuple[str, float]:
    text = _weight(word)
    if not text:
        return word, 1.0
    try:
        return word.rpartition("=")[0], float(text)
    except ValueError:
        raise typer.BadParameter(f"{word!r}: {text!r} is not a number") from None
