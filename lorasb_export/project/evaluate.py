"""The adapters of a project scored one after another, those of one network together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, load_basis_once
from ..bars import progress_bar
from ..base.loaded import LastLoaded
from ..base.model import BaseModel, BaseRef
from ..choices import NF4
from ..data.source import TaskSource
from ..data.task import TaskData, load_held_out, load_task
from ..errors import PER_ITEM_ERRORS, ArtifactError, DataError, LoraSBError, Problems, SettingsError
from ..evaluation.evaluate import evaluate, metric_for, to_score, with_labels_of
from ..evaluation.predictions import PredictionsFile
from ..evaluation.record import record_evaluation
from ..hub.fetch import is_blob
from .project import Project

if TYPE_CHECKING:
    from ..basis import Basis

logger = logging.getLogger(__name__)


def evaluate_adapters(
    project: Project,
    adapters: Mapping[str, str],
    *,
    all_there_are: bool = False,
    data: str | None = None,
    model: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    metric: str | None = None,
    batch_size: int = 16,
    predictions: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[tuple[str, dict[str, Any] | LoraSBError]]:
    """Score adapters beside their bases. The figures of a whole held-out split go into the adapter's card, unless the
    base is in four bits, where they would be read as those of the base itself, or the rows may have been trained on.

    All of them are looked at before the first network runs; what is wrong, with up to ten of them, is told at once.
    But where the user named none, one that is damaged is an error of its own, and the others are scored.

    Args:
        adapters: word → folder or Hub id.
        all_there_are: the user named none: adapters whose data is unknown, or has no held-out rows, are skipped with a
            warning, and damaged ones do not keep the others from being scored.
        data: the rows to score on, if not the task's own; no card is changed then.
        model: the base, if it has moved since training.
        split, limit, dtype, metric, batch_size: as for `evaluate`.
        predictions: a JSON-lines file to write: what base and adapter predict of each row, as `evaluate` gives it, with
            the `name` (the word) and `split`.
        overwrite: replace that file.
        resume: take figures of the same data that are in a card from there.

    Yields:
        each word and what `evaluate` gives, with `recorded`, whether its card has the figures; or its error, where it
        alone is at fault: the next one is scored all the same. The error of a single one is raised.

    Raises:
        SettingsError: an adapter does not say what it was trained on; `resume` where no card would have the figures, or
            with `predictions`, which no card has.
        OutputError: the file of predictions is there already; nothing was scored.
        DataError: none has rows to be scored on; or as for `evaluate`.
        BaseModelError: the base of one is missing or another one; none was scored.
    """
    into_cards = data is None and limit is None and dtype != NF4 and split != "train"
    if resume and not into_cards:
        what = "--resume takes figures from the cards, where none are of --data, --limit, --split train or --dtype nf4"
        raise SettingsError(what, fix="Leave out either")
    if resume and predictions is not None:
        what = "--resume takes figures from the cards, where no predictions are"
        raise SettingsError(what, fix="Leave out either")
    file = None if predictions is None else PredictionsFile(predictions, overwrite=overwrite)
    load = load_task if data is None else load_held_out
    scored: dict[str, Any] = {"split": split, "limit": limit, "metric": metric, "predictions": file is not None}
    known: dict[str, dict[str, Any]] = {}
    damaged: dict[str, LoraSBError] = {}
    ready: list[_Ready] = []
    places: dict[str, int] = {}  # of the bases, by their sha256
    found: dict[tuple[BaseRef, frozenset[str]], BaseModel] = {}
    problems = Problems()
    for word, folder in progress_bar(adapters.items(), desc="check"):
        with problems:
            try:
                adapter = Adapter.load(folder)
                name, source = project.task_of(adapter, data)
            except ArtifactError as error:
                if not all_there_are or len(adapters) == 1:
                    raise
                logger.warning("%s is left out: %s", word, error)
                damaged[word] = error.alone()
                continue
            if source is None and not all_there_are:
                raise SettingsError("the adapter does not say what it was trained on", where=word, fix="Pass --data")
            if source is None:
                what = "it does not say what it was trained on (--data names its rows)"
                logger.warning("%s is passed over: %s", word, what)
                continue
            task = with_labels_of(adapter, load(name, source))
            if file is not None:
                file.refuse_rows_of(Path(str(source)))
            if all_there_are and (why := _passed_over(task, data, split, metric, file)):
                logger.warning("%s is passed over: %s (%s)", word, why, source)
                continue
            of_split, of_metric, _ = to_score(adapter, task, **scored)
            figures = adapter.training.get("evaluation", {}).get(of_split, {}).get(of_metric, {})
            if resume and figures.get("data_sha256") == task.sha256:
                of_rows = {key: figures[key] for key in ("rows", "base", "adapter")}
                known[word] = {"task": name, "split": of_split, "metric": of_metric, **of_rows, "recorded": True}
                continue
            into_card = into_cards
            if into_cards and not _was_held_out(adapter, task, of_split):
                what = f"{word}: `fit` did not have these rows, and some {of_split} rows may have been trained on"
                logger.warning("%s. The figures do not go into its card: fit it again", what)
                into_card = False
            of_base = adapter.base, frozenset(adapter.R)
            if of_base not in found:  # to look for the base and to read it for each of a thousand takes minutes
                found[of_base] = adapter.base.resolve(project.base_elsewhere(model, folder))
                found[of_base].verify(*of_base)
            place = places.setdefault(adapter.basis_sha256, len(places))
            order = str(found[of_base].folder), adapter.task_type, adapter.num_labels or 0, place
            # The rows are read again in their turn: all may be more than memory holds.
            ready.append(_Ready(word, name, source, found[of_base], order, into_card))
        if problems.is_full:
            break
    if problems.found:
        problems.found += damaged.values()
    problems.raise_all("nothing was scored")
    if known:
        logger.info("The figures of %d adapters are in their cards", len(known))
    yield from (known | damaged).items()
    if not ready and not known and not damaged:
        fix = "Add valid.jsonl to a task's data; or set hold_out in [data] or its table, and fit it again"
        raise DataError("no adapter has rows to be scored on", fix=fix)
    loaded = LastLoaded(dtype=dtype)
    bases: dict[str, Basis] = {}
    scored["said_by_base"] = {}
    if file is not None:
        file.require_writable()
    for one in sorted(ready, key=lambda one: one.order):
        outcome: dict[str, Any] | LoraSBError
        try:
            adapter, task = Adapter.load(adapters[one.word]), load(one.task, one.source)
            if adapter.basis_sha256 not in bases:
                bases.clear()  # or those that lie in their adapters would fill the memory, one after another
            load_basis_once(adapter, bases)
            kind = one.base, adapter.task_type, adapter.num_labels  # anew: it may have been fitted again meanwhile
            options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, **scored}
            # No name for the network here: it would keep it beside the next one.
            outcome = evaluate(adapter, task, base=one.base, network=loaded.get(*kind), **options)
        except PER_ITEM_ERRORS as error:
            if len(ready) + len(known) + len(damaged) == 1:
                raise
            logger.warning("%s is left out: %s", one.word, error)
            outcome = error.alone()
        else:
            if file is not None:
                file.append(one.word, outcome)
            data_sha256 = {"data_sha256": task.sha256}
            outcome["recorded"] = one.into_card and _record(one.word, adapter, outcome | data_sha256)
        yield one.word, outcome


@dataclass(frozen=True)
class _Ready:
    """An adapter that has been looked at: its task and rows, its base, and whether its card is written.

    By `order` adapters of one network, and of one basis, come one after another.
    """

    word: str
    task: str
    source: TaskSource
    base: BaseModel
    order: tuple[str, str, int, int]
    into_card: bool


def _passed_over(
    task: TaskData, data: str | None, split: str | None, metric: str | None, file: PredictionsFile | None
) -> str | None:
    """Why an adapter that nobody named is passed over; None of one that can be scored."""
    if not data and not task.splits.get(split or task.held_out()):
        return f"its task has no {split or 'held-out'} rows"
    if file is not None and metric is None and metric_for(task, None) == "loss":
        return "the loss predicts nothing"
    return None


def _record(word: str, adapter: Adapter, result: Mapping[str, Any]) -> bool:
    """Put the figures into the adapter's card, if it lies in a folder of the user's; returns whether they are there."""
    if adapter.folder is None or adapter.hub_source is not None:
        return False
    config = adapter.folder / "adapter_config.json"
    if config.is_symlink() and is_blob(config.resolve()):  # a folder of the Hub's cache may be named too
        return False
    try:
        record_evaluation(adapter, result)
    except (OSError, ArtifactError) as error:
        logger.warning("The card of %s stays as it was: %s", word, error)
        return False
    return True


def _was_held_out(adapter: Adapter, task: TaskData, split: str) -> bool:
    """Whether the training passed over these rows, as far as it is recorded: they, or the training rows, are the same
    as then. Of rows divided anew, or moved between files, some may have been trained on."""
    then = adapter.training.get("splits_sha256")
    return not then or any(then.get(part) == task.split_sha256(part) for part in (split, "train"))
