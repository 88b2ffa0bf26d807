"""`lorasb calibrate`: data → basis folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorasb_export.choices import Directions, LoadedDtype, LossMean, Reduction

from .calibrate_text import basis_lines, summary
from .verb import Run
from .words import given, parse_pairs

if TYPE_CHECKING:
    from lorasb_export.data.source import AnySource

SHARES_WORK = True
SAVES_MEMORY = ("a smaller --batch-size", "a smaller --max-length", "--dtype bfloat16")


def run(
    run: Run,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a Hub id.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A task to calibrate on; repeatable. All of the project's by default."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Multiply a task's losses by this; repeatable.  [default: 1]"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank r of the basis.")] = None,
    directions: Annotated[
        Directions | None,
        typer.Option(help="What B and A span: gradient as in the paper; random and block need no data."),
    ] = None,
    samples: Annotated[float | None, typer.Option(help="Rows of each task: a count, or a fraction below 1.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Layers: all-linear, mlp-output, comma-separated name endings, or a regular expression."),
    ] = None,
    reduction: Annotated[
        Reduction | None, typer.Option(help="The gradient's signs, as in the paper, or the gradient itself.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="The size of the simulated first step; scales R0 alone.")] = None,
    loss: Annotated[LossMean | None, typer.Option(help="What is weighted equally: every row, or every token.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of a backward pass: fewer take less memory.  [default: 8, or that of [fit] if less]"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Rows are cut after so many tokens.  [default: that of [fit], or 512]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Take less memory, and a quarter more time.  [default: yes]",
        ),
    ] = None,
    capture: Annotated[
        bool | None,
        typer.Option(
            "--capture/--no-capture",
            help="Measure how much of each task's gradient the basis of several tasks captures.  [default: yes]",
        ),
    ] = None,
    dtype: Annotated[
        LoadedDtype | None,
        typer.Option(help="Data type of the base model; auto: the checkpoint's; nf4: four bits."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the rows drawn, or of a random basis.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write the basis to.  [default: the project's]")] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing folder, unless adapters of the project were trained in it."
        ),
    ] = False,
) -> None:
    """Calibrate one frozen basis (B, A) over one task or a mixture."""
    given_data, given_weights = parse_pairs("--data", "NAME=PATH", data), _weights(weight)
    from lorasb_export.files.storage import expanded
    from lorasb_export.project.basis import calibrate_into, is_shared, shared_folder  # only now: it brings torch
    from lorasb_export.settings import DRAWN, CalibrationSettings, FitSettings

    project = run.project
    flags = run.given(CalibrationSettings)
    settings = project.calibration_settings(FitSettings(**project.fit), flags)
    target = expanded(out) if out else shared_folder(project)
    sources: dict[str, AnySource] = {name: project.other_source(name, of) for name, of in given_data.items()}
    unused = given(data=data, weight=weight, samples=samples, reduction=reduction, eta=eta, loss=loss)
    if settings.directions in DRAWN and unused:
        flags_given = ", ".join(f"--{name}" for name in unused)
        raise typer.BadParameter(f"{flags_given}: a basis whose directions are {settings.directions!r} needs no data")
    basis = calibrate_into(
        project, target, settings, model=model, tasks=sources, weights=given_weights, overwrite=overwrite
    )
    result = summary(basis, target)
    run.result(result, "\n".join(basis_lines(result)))
    if is_shared(project, target) and (differing := basis.differences(project.calibration)):
        where = project.file
        run.say(f"fit will refuse this basis: {', '.join(differing)}, says [basis] in {where}. Write there what it is")


def _weights(words: list[str] | None) -> dict[str, float]:
    weights = {}
    for name, word in parse_pairs("--weight", "NAME=NUMBER", words).items():
        try:
            weights[name] = float(word)
        except ValueError:
            raise typer.BadParameter(f"--weight: of {name} {word!r} is not a number") from None
    return weights
