"""`lorasb evaluate`: the task's metric on held-out rows, base beside adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasb_export.choices import LoadedDtype, Metric, Split
from lorasb_export.errors import LoraSBError
from lorasb_export.files.kind import ADAPTER_CONFIG

from .verb import Run
from .words import FORMS, low_scores, score, spelled_out

INTERRUPTED = (
    "Finished adapters have their scores in their cards: continue with --resume. (With --data, --limit, --split train "
    "or --dtype nf4 no card is written. With --predictions, the rows of finished adapters are in its file: name the "
    "remaining adapters and another file.)"
)

SAVES_MEMORY = ("a smaller --batch-size", "--dtype bfloat16")


def run(
    run: Run,
    adapter: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER", help=f"Names, folders or Hub ids, {FORMS}; all by default.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Data to score on, if not the task's own.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    split: Annotated[Split | None, typer.Option(help="Split to score on; the held-out one by default.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only this many rows; the card stays as it was.")
    ] = None,
    dtype: Annotated[
        LoadedDtype,
        typer.Option(help="Data type of the model; auto: the checkpoint's; nf4: four bits, not for the card."),
    ] = "auto",
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="exact_match or loss of answers, loss of text, accuracy, mcc or f1 of classes, pearson or rmse of "
            "numbers; the first by default."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows at once; fewer need less memory, and the scores stay the same.")
    ] = 16,
    predictions: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write what base and adapter answer to each row, as JSON lines."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --predictions.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after an interruption: score only what its card has no figures of.")
    ] = False,
) -> None:
    """Score adapters beside the base on held-out rows. The figures go into each adapter's card."""
    if overwrite and predictions is None:
        raise typer.BadParameter("--overwrite is for the file of --predictions")
    from lorasb_export.names import ours_in

    all_there_are = partial(ours_in, run.project.adapters_folder)
    words = [word for word in spelled_out(adapter or (), all_there_are) if not _is_of_tensorboard(word)]
    words = words if adapter else all_there_are()
    if not words:
        raise run.project.lacks("no adapter to evaluate", "Run `lorasb fit`, or name one")
    found = {word: run.project.find_adapter(word) for word in words}
    from lorasb_export.project.evaluate import evaluate_adapters  # only now: it brings torch and transformers

    evaluated = evaluate_adapters(
        run.project,
        found,
        all_there_are=not adapter,
        data=data,
        model=model,
        split=split,
        limit=limit,
        dtype=dtype,
        metric=metric,
        batch_size=batch_size,
        predictions=predictions,
        overwrite=overwrite,
        resume=resume,
    )
    results: dict[str, Any] = {}
    failed: dict[str, LoraSBError] = {}
    head = f"{'adapter':20} {'split':6} {'rows':>5} {'metric':12} {'base':>6} {'adapter':>8}"
    lines = [f"{head} {'gained':>7} {'lost':>5}"]
    value = {"evaluation": results}

    def text() -> str:
        of_metric = {word: {result["metric"]: result} for word, result in results.items()}
        return "\n".join([*lines, *low_scores(of_metric)]) if results else ""

    for word, result in run.done_of(evaluated, value, text, failed):
        results[word] = result
        base, after = (score(result["metric"], result[which]) for which in ("base", "adapter"))
        gained, lost = (result.get(which, "-") for which in ("gained", "lost"))
        row = f"{word:20} {result['split']:6} {result['rows']:5} {result['metric']:12} {base:>6} {after:>8}"
        lines.append(f"{row} {gained:>7} {lost:>5}")
    run.result(value, text(), failed)


def _is_of_tensorboard(word: str) -> bool:
    """Whether a word is the folder of its files, which lies beside adapters and so comes with `candidates/*`."""
    path = Path(word)
    return "/" in word and path.name == "runs" and path.is_dir() and not (path / ADAPTER_CONFIG).exists()
