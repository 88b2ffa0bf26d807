"""`lorasb fit`: data + basis → adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasb_export.choices import Init, Keep, LoadedDtype, Metric, Optimizer, Schedule, Tracker
from lorasb_export.errors import LoraSBError

from .fit_text import adapter_lines, plan_lines, summary
from .verb import Run
from .words import FORMS, spelled_out

if TYPE_CHECKING:
    from lorasb_export.project.request import FitRequest

SHARES_WORK = True
SAVES_MEMORY = ("a smaller --batch-size", "a smaller --max-length", "--gradient-checkpointing", "--dtype bfloat16")
INTERRUPTED = "Go on with the same command and --resume."


def _refuse(option: typer.CallbackParam, value: str | None) -> None:
    """Users of LoRA look for these here: say where they are."""
    if value is not None:
        name = option.name
        raise typer.BadParameter(
            f"{name} belongs to the basis: set it in [basis] of lorasb.toml, and fit makes the basis with it; "
            f"without a project file: lorasb calibrate --{name} {value}"
        )


_OF_THE_BASIS = typer.Option(hidden=True, expose_value=False, callback=_refuse)


def run(
    run: Run,
    task: Annotated[list[str] | None, typer.Argument(metavar="TASK", help=f"Tasks, {FORMS}; all by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a Hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Data of TASK, in place of what lorasb.toml lists.")
    ] = None,
    basis: Annotated[
        str | None, typer.Option(metavar="DIR|own", help="Basis folder or Hub id; `own` calibrates on the task alone.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start-from",
            metavar="ADAPTER",
            help="Go on from this adapter's R, in its basis: name, folder or Hub id; {name} in it is the task's.",
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Train for this many optimizer steps, whatever --epochs says.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per forward pass.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes per optimizer step.")] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Optimizer of R; the paper's is adamw.")] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="Peak learning rate. Several, separated by commas: train at each and keep the best.",
        ),
    ] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of a classifier's head, if another.")
    ] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="Schedule of the learning rate.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps spent warming up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of R.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip the gradient's norm to this.")] = None,
    scaling: Annotated[float | None, typer.Option(help="The factor s of s·B·R·A.")] = None,
    init: Annotated[
        Init | None, typer.Option(help="What R starts as: svd as in the paper, zero to start at the base model.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Rows are cut after so many tokens.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    dtype: Annotated[
        LoadedDtype | None,
        typer.Option(help="Data type of the frozen base model; auto: the checkpoint's; nf4: four bits."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the row order, and of a classifier's new head.")] = None,
    group_by_length: Annotated[
        bool | None,
        typer.Option(
            "--group-by-length/--no-group-by-length", help="Put rows of like length into one batch: less padding."
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing", help="Use less memory and a third more time."
        ),
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations on the valid split.")] = None,
    metric: Annotated[Metric | None, typer.Option(help="Metric for choosing the best checkpoint.")] = None,
    keep: Annotated[Keep | None, typer.Option(help="The R to keep: the best on the valid split, or the last.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without a better one.")] = None,
    report_to: Annotated[Tracker | None, typer.Option(help="Also log to this tracker.")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train all tasks at once, in mixed batches, in one shared basis.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing adapters and interrupted runs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, resumed, kept or refused; train nothing.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Adapter folder; {name} in it is the task's.  [default: adapters/TASK]")
    ] = None,
    rank: Annotated[str | None, _OF_THE_BASIS] = None,
    targets: Annotated[str | None, _OF_THE_BASIS] = None,
    directions: Annotated[str | None, _OF_THE_BASIS] = None,
) -> None:
    """Train one adapter per task in a frozen basis."""
    if dry_run and together:
        raise typer.BadParameter("--dry-run looks at each task by itself: leave --together out")
    from lorasb_export.settings import FitSettings

    flags = run.given(FitSettings)
    if learning_rate:
        flags["learning_rate"] = _rates(learning_rate)
    settings = FitSettings(**{**run.project.fit, **flags})
    names = run.project.tasks_to_fit(spelled_out(task or (), lambda: run.project.tasks), data)
    from lorasb_export.project.request import FitRequest, own_settings  # only now: it brings torch and transformers

    request = FitRequest(
        run.project,
        names,
        settings,
        own=own_settings(run.project, names, flags, settings),
        model=model,
        data=data,
        basis=basis,
        start=start,
        out=out,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        _dry_run(run, request)
    else:
        _fit(run, request, together=together)


def _fit(run: Run, request: FitRequest, *, together: bool) -> None:
    """Train, and print what came of each task: in the order asked for, though they are trained network by network."""
    from lorasb_export.project.fit import fit_tasks

    adapters: dict[str, Any] = {}
    failed: dict[str, LoraSBError] = {}
    lines: dict[str, list[str]] = {}

    def in_order() -> list[str]:
        return [line for name in request.targets for line in lines.get(name, ())]

    fitted = fit_tasks(request, together=together)
    for name, adapter in run.done_of(fitted, {"adapters": adapters}, lambda: "\n".join(in_order()), failed):
        adapters[name] = summary(adapter)
        lines[name] = adapter_lines(name, adapter)
    _tell(run, {"adapters": {name: adapters[name] for name in request.targets if name in adapters}}, in_order(), failed)


def _dry_run(run: Run, request: FitRequest) -> None:
    """Print what a fit would do; the exit code is 1 where it would refuse a task or the whole."""
    from lorasb_export.project.fit_plan import plan_fit

    tasks = plan_fit(request)
    actions = {found["action"] for found in tasks.values()}
    _tell(run, {"tasks": tasks, "trains": not actions.isdisjoint({"train", "resume"})}, plan_lines(tasks))
    if "refuse" in actions:
        raise typer.Exit(1)


def _tell(run: Run, value: dict[str, Any], lines: list[str], failed: Mapping[str, LoraSBError] | None = None) -> None:
    """Print the outcome, and leave the other processes."""
    from lorasb_export import distributed

    try:
        run.result(value, "\n".join(lines), failed)
    finally:
        distributed.barrier()  # for the first process to print: torchrun ends it when another one exits with an error
        distributed.stop()


def _rates(words: str) -> float | tuple[float, ...]:
    try:
        first, *more = map(float, words.split(","))
    except ValueError:
        raise typer.BadParameter(f"{words!r} is no rate, nor several with commas") from None
    return (first, *more) if more else first
