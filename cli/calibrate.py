"""`lorasb calibrate`: data → basis folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .verb import Run, given, parse_pairs


def run(
    run: Run,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a Hub id.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A task to calibrate on; repeatable. All of the project's by default."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank r of the basis.")] = None,
    samples: Annotated[float | None, typer.Option(help="Rows of each task: a count, or a fraction below 1.")] = None,
    targets: Annotated[str | None, typer.Option(help="all-linear, or module name endings with commas.")] = None,
    reduction: Annotated[str | None, typer.Option(help="sign (the paper) or raw.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the rows.")] = None,
    out: Annotated[str | None, typer.Option(help="Where the basis goes; basis/ by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Calibrate one frozen basis (B, A) over one task or a mixture."""
    from lorasb_export.calibrate import calibrate
    from lorasb_export.settings import CalibrationSettings
    from lorasb_export.storage import refuse_existing

    project = run.project
    flags = given(rank=rank, samples=samples, targets=targets, reduction=reduction, dtype=dtype, seed=seed)
    settings = CalibrationSettings(**{**project.calibration, **flags})
    target = Path(out) if out else project.path(project.basis_path)
    refuse_existing(target, overwrite)
    sources = parse_pairs(data) or {name: project.task_source(name) for name in project.shared_tasks()}
    basis = calibrate(model or project.require_model(), sources, settings)
    basis.save(target, overwrite=overwrite)
    energy = basis.calibration["energy"].values()
    result = {
        "basis": str(target),
        "sha256": basis.sha256,
        "rank": basis.rank,
        "modules": len(basis.modules),
        "samples": basis.calibration["samples"],
        "energy_mean": sum(energy) / len(energy),
    }
    run.result(
        result,
        f"Basis of rank {basis.rank} for {result['modules']} modules from {result['samples']} rows: {target}\n"
        f"It keeps {result['energy_mean']:.0%} of the first step's energy (mean over modules).",
    )
