"""The adapters of a project scored one after another, those of one network together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from ..bars import in_turn, progress_bar
from ..base.loaded import LastLoaded
from ..base.model import BaseModel, BaseRef
from ..belonging import load_basis_once
from ..choices import NF4
from ..data.hold_out import warn_of_twins
from ..data.source import TaskSource
from ..data.task import TaskData, load_held_out, load_task
from ..errors import PER_ITEM_ERRORS, ArtifactError, DataError, LoraSBError, Problems, SettingsError, some
from ..evaluation.evaluate import evaluate, metric_for, to_score, trained_length, with_labels_of
from ..evaluation.predictions import PredictionsFile
from ..evaluation.record import record_evaluation
from ..files.kind import ADAPTER_CONFIG
from ..hub.cache import is_blob
from .base import find_base
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
    But where the user named none, one that is damaged, or whose own data is gone or broken, is an error of its own, and
    the others are scored; unless ten have such data before any could be scored: a cause may be common to all.

    Args:
        adapters: word → folder or Hub id.
        all_there_are: the user named none: adapters whose data is unknown, or has no held-out rows, are skipped with a
            warning, and damaged ones, or those of broken data, do not keep the others from being scored.
        data: the rows to score on, if not the task's own; no card is changed then.
        model: the base, if it has moved since training.
        split, limit, dtype, metric, batch_size: as for `evaluate`.
        predictions: a JSON-lines file to write: what base and adapter predict of each row, as `evaluate` gives it, with
            the `name` (the word) and `split`.
        overwrite: replace that file.
        resume: take figures of the same data, in the same dtype, that are in a card from there.

    Yields:
        each word and what `evaluate` gives, with `recorded`, whether its card has the figures; or its error, where it
        alone is at fault: the next one is scored all the same. The error of a single one is raised.

    Raises:
        SettingsError: an adapter does not say what it was trained on; `resume` where no card would have the figures, or
            with `predictions`, which no card has.
        OutputError: the file of predictions is there already; nothing was scored.
        DataError: none has rows to be scored on; the first ten that were looked at cannot be read, though the user
            named none; or as for `evaluate`.
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
    scored: dict[str, Any] = {"split": split, "limit": limit, "metric": metric, "predictions": file is not None}
    from_cards = dtype if resume else None
    look = _Look(project, data, model, file, scored, from_cards, all_there_are=all_there_are, into_cards=into_cards)
    look.at_all(adapters)
    if look.known:
        logger.info("The figures of %d adapters are in their cards", len(look.known))
    yield from (look.known | look.left_out).items()
    count = len(look.ready) + len(look.known) + len(look.left_out)
    if not count:
        fix = "Add valid.jsonl to a task's data; or set hold_out in [data] or its table, and fit it again"
        raise DataError("no adapter has rows to be scored on", fix=fix)
    yield from _scored(look.ready, file, is_one=count == 1, dtype=dtype, batch_size=batch_size, **scored)


@dataclass(frozen=True)
class _Ready:
    """An adapter that has been looked at: its rows, its base, and whether its card is written.

    By `order` adapters of one network, and of one basis, come one after another.
    """

    word: str
    folder: str
    load_task: Callable[[], TaskData]  # in its turn, again: the rows of all may be more than memory holds
    base: BaseModel
    order: tuple[str, str, int, int]
    into_card: bool


@dataclass
class _Look:
    """A look at adapters before the first is scored: which are `ready`, of which the figures are `known` from their
    cards, and which are `left_out`, since they or their data are damaged, with their errors.

    Args:
        file: of predictions.
        scored: the options of `to_score`.
        from_cards: figures of this dtype are taken from cards; none without one.
        into_cards: figures of these rows may go into cards; the others are those of `evaluate_adapters`.
    """

    project: Project
    data: str | None
    model: str | None
    file: PredictionsFile | None
    scored: Mapping[str, Any]
    from_cards: str | None
    all_there_are: bool
    into_cards: bool
    ready: list[_Ready] = field(default_factory=list)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, LoraSBError] = field(default_factory=dict)
    _bases: dict[tuple[BaseRef, frozenset[str]], BaseModel] = field(default_factory=dict)
    _reads_none: bool = True  # of the adapters' data
    _cut_at: dict[str, dict[int, list[str]]] = field(default_factory=dict)  # task → length of rows → words, of losses
    _places: dict[str, int] = field(default_factory=dict)  # of the bases, by their sha256
    _lacking: int = 0  # adapters of the project's tasks whose data is gone or broken, before any could be read

    def at_all(self, adapters: Mapping[str, str]) -> None:
        """Look at each. Raises all that is wrong at once, but for what is left out of several that nobody named."""
        problems = Problems()
        for word, folder in progress_bar(adapters.items(), desc="check"):
            with problems:
                try:
                    adapter = Adapter.load(folder)
                    name, source = self.project.task_of(adapter, self.data)
                except ArtifactError as error:
                    self._leave_out(word, error, among=adapters)
                    continue
                try:
                    self._at(word, folder, adapter, name, source)
                except DataError as error:
                    if self.data is not None:  # the rows of all, whose fault it is
                        raise
                    self._leave_out(word, error, among=adapters)
                    self._lacking += self._reads_none and name in self.project.tasks
            if problems.is_full or self._lacks_all_data:
                break
        if problems.found or self._lacks_all_data:
            problems.found += self.left_out.values()
        problems.raise_all("nothing was scored")
        for words in (of_length for of_length in self._cut_at.values() if len(of_length) > 1):
            told = "; ".join(f"{some(of_one)} at {length} tokens" for length, of_one in sorted(words.items()))
            logger.warning("These losses cannot be compared where rows are longer than one of the cuts: %s", told)
        for word, one in islice(self.left_out.items(), 10):  # at the end all are counted
            logger.warning("%s is left out: %s", word, one)

    @property
    def _lacks_all_data(self) -> bool:
        """Whether a disk may not be mounted, or the Hub be down, and each of the others be waited for as long."""
        return self._reads_none and self._lacking >= 10

    def _leave_out(self, word: str, error: LoraSBError, *, among: Collection[str]) -> None:
        """Keep the error of one adapter for the end; raise it where it is the only one, or was named."""
        if not self.all_there_are or len(among) == 1:
            raise error
        self.left_out[word] = error.alone()

    def _at(self, word: str, folder: str, adapter: Adapter, name: str, source: TaskSource | None) -> None:
        if source is None:
            if not self.all_there_are:
                raise SettingsError("the adapter does not say what it was trained on", where=word, fix="Pass --data")
            logger.warning("%s is passed over: it does not say what it was trained on (--data names its rows)", word)
            return
        load = partial(load_task if self.data is None else load_held_out, name, source)
        task = with_labels_of(adapter, load())
        self._reads_none = False
        if self.file is not None:
            self.file.refuse_rows_of(Path(str(source)))
        if self.all_there_are and (why := self._passed_over(task)):
            logger.warning("%s is passed over: %s (%s)", word, why, source)
            return
        split, metric, _ = to_score(adapter, task, **self.scored)
        if metric == "loss":
            self._cut_at.setdefault(name, {}).setdefault(trained_length(adapter), []).append(word)
        if self.data is None:  # a file of rows to be scored on has no other split
            warn_of_twins(task)
        figures = adapter.training.get("evaluation", {}).get(split, {}).get(metric, {})
        its_own = figures.get("data_sha256"), figures.get("dtype")
        if its_own == (task.sha256, self.from_cards):
            of_rows = {key: figures[key] for key in ("rows", "base", "adapter")}
            self.known[word] = {"task": name, "split": split, "metric": metric, **of_rows, "recorded": True}
            return
        into_card = self.into_cards and _was_held_out(adapter, task, split)
        if self.into_cards and not into_card:
            what = f"{word}: `fit` did not have these rows, and some {split} rows may have been trained on"
            logger.warning("%s. The figures do not go into its card: fit it again", what)
        base = self._base(adapter, folder)
        place = self._places.setdefault(adapter.basis_sha256, len(self._places))
        order = str(base.folder), adapter.task_type, adapter.num_labels or 0, place
        self.ready.append(_Ready(word, folder, load, base, order, into_card))

    def _passed_over(self, task: TaskData) -> str | None:
        """Why an adapter that nobody named is passed over; None of one that can be scored."""
        split, metric = self.scored["split"], self.scored["metric"]
        if not self.data and not task.splits.get(split or task.held_out()):
            return f"its task has no {split or 'held-out'} rows"
        if self.file is not None and metric is None and metric_for(task, None) == "loss":
            return "the loss predicts nothing"
        return None

    def _base(self, adapter: Adapter, folder: str) -> BaseModel:
        """The base of an adapter, verified once for all with the same modules: a thousand times would take minutes."""
        of_base = adapter.base, frozenset(adapter.R)
        if of_base not in self._bases:
            self._bases[of_base] = adapter.base.resolve(find_base(self.project, self.model, folder))
            self._bases[of_base].verify(*of_base)
        return self._bases[of_base]


def _scored(
    ready: Sequence[_Ready], file: PredictionsFile | None, *, is_one: bool, dtype: str, **options: Any
) -> Iterator[tuple[str, dict[str, Any] | LoraSBError]]:
    """What `evaluate` gives of each, by these `options`; or its error, unless it `is_one` alone."""
    loaded = LastLoaded(dtype=dtype)
    bases: dict[str, Basis] = {}
    options |= {"dtype": dtype, "said_by_base": {}}
    if file is not None:
        file.require_writable()
    for one in in_turn(sorted(ready, key=lambda one: one.order), "evaluate", lambda one: one.word):
        outcome: dict[str, Any] | LoraSBError
        try:
            adapter, task = Adapter.load(one.folder), one.load_task()
            if adapter.basis_sha256 not in bases:
                bases.clear()  # or those that lie in their adapters would fill the memory, one after another
            load_basis_once(adapter, bases)
            kind = one.base, adapter.task_type, adapter.num_labels  # anew: it may have been fitted again meanwhile
            # No name for the network here: it would keep it beside the next one.
            outcome = evaluate(adapter, task, base=one.base, network=loaded.get(*kind), **options)
        except PER_ITEM_ERRORS as error:
            if is_one:
                raise
            logger.warning("%s is left out: %s", one.word, error)
            outcome = error.alone()
        else:
            if file is not None:
                file.append(one.word, outcome)
            how = {"data_sha256": task.sha256, "split_sha256": task.split_sha256(outcome["split"]), "dtype": dtype}
            outcome["recorded"] = one.into_card and _record(one.word, adapter, outcome | how)
        yield one.word, outcome


def _record(word: str, adapter: Adapter, result: Mapping[str, Any]) -> bool:
    """Put the figures into the adapter's card, if it lies in a folder of the user's; returns whether they are there."""
    if adapter.folder is None or adapter.hub_source is not None:
        return False
    config = adapter.folder / ADAPTER_CONFIG
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
