"""`lorasb evaluate`: the task's metric on held-out rows, base beside adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .verb import Dtype, Run, base_elsewhere


def run(
    run: Run,
    adapter: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Names, folders or Hub ids; all by default.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Data to score on, if not the task's own.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    split: Annotated[
        Literal["test", "valid", "train"] | None, typer.Option(help="Split to score on; the held-out one by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only this many rows; the card stays as it was.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Data type of the model; auto: as in its checkpoint.")] = "auto",
    metric: Annotated[
        str | None,
        typer.Option(help="exact_match or loss, accuracy or mcc, pearson: what fits the data; the first by default."),
    ] = None,
) -> None:
    """Score adapters beside the base on held-out rows. The figures go into each adapter's card."""
    from lorasb_export.errors import OF_ONE_ITEM, DataError, LoraSBError, SettingsError

    words = adapter or run.project.adapter_names()
    if not words:
        raise run.project.lacks("no adapter to evaluate", "Run `lorasb fit`, or name one")
    folders = {word: run.project.find_adapter(word) for word in words}
    from lorasb_export.adapter import Adapter, load_basis_once  # only now: it brings torch
    from lorasb_export.base import CAUSAL_LM
    from lorasb_export.data import load_task
    from lorasb_export.evaluation import evaluate, record_evaluation, to_score

    ready: dict[str, tuple[str, str]] = {}
    for word, folder in folders.items():  # all are looked at before the first network runs
        loaded = Adapter.load(folder)
        name, source = run.project.task_of(loaded, data)
        if source is None and not adapter:
            run.say(f"{word} is passed over: it does not say what it was trained on (--data names its rows)")
            continue
        if source is None:
            raise SettingsError("the adapter does not say what it was trained on", where=word, fix="Pass --data")
        task = load_task(name, source)
        if not adapter and not data and not task.splits.get(split or task.held_out()):
            run.say(f"{word} is passed over: its task has no {split or 'held-out'} rows ({source})")
            continue
        to_score(loaded, task, split=split, limit=limit, metric=metric)
        ready[word] = name, source  # read again when it is its turn: all of them may be more than memory holds
    if not ready:
        raise DataError("no adapter has rows to be scored on", fix="Add valid.jsonl to a task's data, or pass --data")
    results: dict[str, Any] = {}
    failed: dict[str, LoraSBError] = {}
    networks: dict[Path, Any] = {}  # by the base's folder, and bases by their hash: adapters share them
    bases: dict[str, Any] = {}
    lines = [f"{'adapter':20} {'split':6} {'rows':>5} {'metric':12} {'base':>6} {'adapter':>8}"]
    for word, (name, source) in ready.items():
        loaded, task = Adapter.load(folders[word]), load_task(name, source)
        where = loaded.base.resolve(base_elsewhere(run, model, folders[word]))
        network = None
        if task.task_type == CAUSAL_LM:  # of classifiers each has its own number of outputs
            if where.folder not in networks:
                where.verify(loaded.base, loaded.R)  # before all of it is read
                networks[where.folder] = where.load(dtype=dtype)
            network = networks[where.folder]
        options: dict[str, Any] = {"split": split, "limit": limit, "dtype": dtype, "metric": metric}
        try:
            load_basis_once(loaded, bases)
            result = evaluate(loaded, task, base=where, network=network, **options)
        except OF_ONE_ITEM as error:
            if len(ready) == 1:
                raise
            failed[word] = error.alone()
            run.say(f"{word} is left out: {error}")
            continue
        whole = data is None and limit is None and result["split"] != "train"  # not a figure of other or fewer rows
        if whole and loaded.folder is not None and loaded.hub_source is None:
            try:
                record_evaluation(loaded.folder, result)
            except OSError as error:
                run.say(f"The card of {word} stays as it was: {error}")
        results[word] = result
        digits = ".1%" if result["metric"] in ("exact_match", "accuracy") else ".4f"
        base = "-" if result["base"] is None else format(result["base"], digits)
        scores = f"{base:>6} {result['adapter']:>8{digits}}"
        lines.append(f"{word:20} {result['split']:6} {result['rows']:5} {result['metric']:12} {scores}")
    run.result({"evaluation": results}, "\n".join(lines) if results else "", failed)
