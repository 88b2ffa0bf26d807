"""`lorasb merge`: a plain model folder with s·B·R·A added."""

from __future__ import annotations

from typing import Annotated

import typer

from .verb import Run, human_bytes


def run(
    run: Run,
    adapter: Annotated[
        str | None, typer.Argument(help="Name, folder or Hub id; may be left out when the project has one.")
    ] = None,
    out: Annotated[str, typer.Option(help="The folder to write.")] = "model",
    model: Annotated[str | None, typer.Option(help="The base, where it is not where the adapter says.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="Compare logits with base + adapter.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Add s·B·R·A to the base's weights and write a plain model folder."""
    from lorasb_export.merge import merge

    result = merge(
        run.project.find_adapter(adapter),
        out,
        base=model,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    what = f"{result['modules']} modules, {human_bytes(result['bytes'])} in {result['shards']} file(s)"
    text = f"Would merge {what} into {out}" if dry_run else f"Merged {what} into {out} in {result['seconds']:.1f} s"
    if "verify" in result:
        text += f"\nLogits agree: largest difference {result['verify']['max_difference']:.1e}"
    run.result(result, text)
