"""Scores of a task's held-out rows, and what `evaluate` says of an adapter beside its base."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from ..base.borrowed import flags_kept
from ..base.given import refuse_several_devices, require_loaded
from ..base.model import AnyBase
from ..choices import CAUSAL_LM, SEQ_CLS, Split, require_choice
from ..data.encoding import Encoded, encode_split
from ..data.rows import CHAT, COMPLETION, LABELLED, TEXT, Row, question_and_answer
from ..data.source import AnySource
from ..data.task import TaskData, load_held_out
from ..errors import DataError, SettingsError
from ..layers.head import head_kept
from ..layers.inject import taken_off
from ..names import name_of
from ..other_base import warn_of_another_template
from ..settings import FitSettings
from .inference import Asked, answers_of_ids, asked_of
from .metrics import exact_match, gained_and_lost, prediction_metrics
from .scores import mean_loss, row_scores

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of each kind of row, the metrics that fit; the first is the default.
_METRICS = {
    COMPLETION: ("exact_match", "loss"),
    CHAT: ("exact_match", "loss"),
    TEXT: ("loss",),
    LABELLED: ("accuracy", "mcc", "f1"),
}
_OF_NUMBERS = ("pearson", "rmse")

_Score = tuple[float, Sequence[Any]]  # the metric, and what is said of each row


def evaluate(
    adapter: str | Path | Adapter,
    task: AnySource | TaskData,
    *,
    base: AnyBase | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    metric: str | None = None,
    batch_size: int = 16,
    predictions: bool = False,
    network: PreTrainedModel | None = None,
    said_by_base: dict[Any, tuple[float, Sequence[Any]]] | None = None,
) -> dict[str, Any]:
    """A metric on held-out rows, for the base and for the adapter. The adapter's folder and card stay as they are.

    Args:
        adapter: a folder, a Hub id, or a loaded Adapter.
        task: folder, file (all of whose rows are held out), Hub dataset id, or loaded task.
        base: the base model, where it is not where the adapter says.
        split: `valid`, `test` or `train`; the task's held-out split when None.
        limit: only the first so many rows, at least 1.
        dtype: as `BaseModel.load` takes it.
        metric: for rows with an answer `exact_match` of the greedy answer (white space at the ends aside) or `loss`,
            the mean over their tokens; for plain text `loss`; for classes `accuracy`, `mcc` or `f1`
            (the mean over classes); for regression `pearson` or `rmse`. The first of these when None.
        batch_size: rows at once; it changes nothing beyond rounding.
        predictions: also return what is said of each row; not for the metric `loss`.
        network: the loaded base, where the caller already has it. Restored afterwards: any adapter on it (even one in
            training), the classifier's head, and `requires_grad`.
        said_by_base: cache of the base's scores: pass the same, initially empty, dict for every adapter.

    Returns:
        `task`, `split`, `rows` (those that count), `metric`, and its value, not in percent, for `adapter` and for
        `base`: None where the adapter brings the head, which the base lacks. Of `exact_match` also `gained` and `lost`:
        the rows that the adapter alone, or the base alone, has right. With `predictions` also these, a dict for
        each row in order: its `number` from 1, the `row`, and the answer, class or number that is `expected` and that
        `base` (or None) and `adapter` give.

    Raises:
        DataError: the split is empty, or of another task type than the adapter; an answer is missing; the base cannot
            answer a prompt: it is empty, too long for it, or refused by the chat template; or the loss is not finite.
        SettingsError: the metric does not fit the data, or predicts nothing; `limit` or `batch_size` below 1.
        BaseModelError, ArtifactError: the base is missing or another one; the adapter or its basis is bad.
    """
    adapter = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    task = task if isinstance(task, TaskData) else load_held_out(name_of(Path(str(task))), task)
    task = with_labels_of(adapter, task)
    split, metric, rows = to_score(adapter, task, split=split, limit=limit, metric=metric, predictions=predictions)
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}", fix="Give at least 1")
    base = adapter.base.resolve(base)
    base.verify(adapter.base, adapter.R)
    warn_of_another_template([adapter], base.folder)
    tokenizer, length, encoded = base.tokenizer, trained_length(adapter), list[Encoded]()
    if metric != "exact_match":
        encoded = encode_split(base, task, split, adapter.labels, length, limit=limit)
    if network is None:
        network = base.load(adapter.task_type, dtype=dtype, num_labels=adapter.num_labels)
    else:
        require_loaded(network, tokenizer, dtype, adapter.num_labels)
        if metric != "exact_match":
            refuse_several_devices(network)
    with taken_off(network), flags_kept(network):  # what is on it must not count as the base
        scorer: _Answers | _Predictions
        if metric == "exact_match":
            scorer = _Answers(asked_of(network, tokenizer, rows, task.unit(split)), tokenizer, batch_size)
        else:
            scorer = _Predictions(encoded, tokenizer.pad_token_id, batch_size, metric, task.regression, adapter.labels)
        of_base: tuple[float | None, Sequence[Any]] = None, [None] * len(rows)
        if task.task_type == CAUSAL_LM:
            kept = {} if said_by_base is None else said_by_base
            asked_for = base.folder, dtype, task.sha256, split, limit, metric, length if metric == "loss" else 0
            of_base = _score_of_base(scorer, network, asked_for, kept)
        with head_kept(network, adapter.head):
            adapter.inject(network)
            of_adapter = scorer.score(network)
    _check_values(task, metric, of_base[0], of_adapter[0])
    of_rows = {"task": task.name, "split": split, "rows": len(scorer.expected), "metric": metric}
    result: dict[str, Any] = {**of_rows, "base": of_base[0], "adapter": of_adapter[0]}
    if metric == "exact_match":
        result["gained"], result["lost"] = gained_and_lost(of_base[1], of_adapter[1], scorer.expected)
    if predictions:
        expected = [row["label"] for row in rows] if task.task_type == SEQ_CLS else scorer.expected
        result["predictions"] = _of_each_row(rows, expected, of_base[1], of_adapter[1])
    return result


def _score_of_base(
    scorer: _Answers | _Predictions, network: PreTrainedModel, asked_for: tuple[Any, ...], kept: dict[Any, _Score]
) -> _Score:
    """The base's score, from `kept` where it was last asked for the same, in a network of the same dtype."""
    key = network.dtype, *asked_for
    if key not in kept:
        kept.clear()  # only the last is kept: what is said of all tasks may be more than memory holds
        kept[key] = scorer.score(network)
    return kept[key]


def _check_values(task: TaskData, metric: str, of_base: float | None, of_adapter: float) -> None:
    """Raise DataError for a value that is not finite; warn where no answer is right."""
    if not all(value is None or math.isfinite(value) for value in (of_base, of_adapter)):
        fix = "Score in another dtype: float16 overflows where others do not"
        raise DataError(f"the {metric} is not finite", where=task.source, fix=fix)
    if metric == "exact_match" and of_base == of_adapter == 0:
        what = "no answer is the expected text, the base's or the adapter's"
        logger.warning(
            "%s: %s. Of free text compare the metric loss, or score predictions your own way", task.name, what
        )


def _of_each_row(
    rows: Sequence[Row], expected: Sequence[Any], of_base: Sequence[Any], of_adapter: Sequence[Any]
) -> list[dict[str, Any]]:
    """What `evaluate` returns as `predictions`."""
    numbered = enumerate(zip(rows, expected, of_base, of_adapter, strict=True), 1)
    return [
        {"number": number, "row": row, "expected": wanted, "base": base_said, "adapter": adapter_said}
        for number, (row, wanted, base_said, adapter_said) in numbered
    ]


@dataclass(frozen=True)
class _Answers:
    """Exact match of greedy answers to rows."""

    asked: Sequence[Asked]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def expected(self) -> list[str]:
        return [one.expected for one in self.asked]

    def score(self, network: PreTrainedModel) -> _Score:
        """The metric, and the answer to each row."""
        ids, max_tokens = [one.ids for one in self.asked], [one.max_tokens for one in self.asked]
        said = answers_of_ids(network, self.tokenizer, ids, max_tokens, batch_size=self.batch_size)
        return exact_match(said, self.expected), said


@dataclass(frozen=True)
class _Predictions:
    """The loss of rows, or a metric of the classes or numbers that are predicted of them."""

    encoded: Sequence[Encoded]
    pad_id: int
    batch_size: int
    metric: str
    regression: bool
    labels: Sequence[Any]

    @property
    def expected(self) -> list[Any]:
        return [row["labels"] for row in self.encoded]

    def score(self, network: PreTrainedModel) -> _Score:
        """The metric, and what is predicted of each row: nothing where the metric is the loss."""
        scores = row_scores(network, self.encoded, self.pad_id, batch_size=self.batch_size)
        if self.metric == "loss":
            return mean_loss(scores), []
        predicted = [prediction for _, _, prediction in scores]
        value = prediction_metrics(predicted, self.expected, regression=self.regression)[self.metric]
        return value, predicted if self.regression else [self.labels[int(index)] for index in predicted]


def with_labels_of(adapter: Adapter, task: TaskData) -> TaskData:
    """`task` with its labels as the adapter has them: of a few rows alone another kind may be told.

    Whole numbers are numbers of a regression; and a number may be the name that was learnt, as `1` in a column of CSV
    that had other names too.
    """
    if task.task_type != SEQ_CLS or adapter.task_type != SEQ_CLS or task.regression:
        return task
    labels = {row["label"] for rows in task.splits.values() for row in rows}
    learnt: dict[Any, Any]
    if adapter.regression:
        learnt = {label: float(label) for label in labels if not isinstance(label, str)}
    else:
        learnt = {x: str(x) for x in labels if x not in adapter.labels and str(x) in adapter.labels}
    if not learnt:
        return task
    splits = {
        split: [{**row, "label": learnt.get(row["label"], row["label"])} for row in rows]
        for split, rows in task.splits.items()
    }
    return replace(task, splits=splits)


def to_score(
    adapter: Adapter,
    task: TaskData,
    *,
    split: str | None,
    limit: int | None,
    metric: str | None,
    predictions: bool = False,
) -> tuple[str, str, Sequence[Row]]:
    """The split, the metric and the rows that `evaluate` would take, checked as far as that needs no model.

    Args and errors: as for `evaluate`.
    """
    require_same_kind(adapter, task)
    if limit is not None and limit < 1:
        raise SettingsError(f"limit is {limit}", fix="Give at least 1, or leave it out for all rows")
    if split is not None:
        require_choice("split", split, Split)
    metric = metric_for(task, metric)
    if predictions and metric == "loss":
        fix = "Leave predictions out, or take another metric"
        raise SettingsError("the metric loss predicts nothing", where=task.source, fix=fix)
    split = split or task.held_out()
    rows = task.rows(split)[:limit]
    if metric == "exact_match":
        for number, row in enumerate(rows, 1):
            question_and_answer(row, f"{task.unit(split)} {number}")
    return split, metric, rows


def require_same_kind(adapter: Adapter, task: TaskData) -> None:
    """Raise DataError when `task` is not of the task type that `adapter` was trained for."""
    if (task.task_type, task.regression) != (adapter.task_type, adapter.regression):
        ours, theirs = (f"{t.task_type}{' (regression)' if t.regression else ''}" for t in (task, adapter))
        raise DataError(f"the data is {ours}, the adapter {theirs}", where=task.source, fix="Give data of its kind")


def trained_length(adapter: Adapter) -> int:
    """Tokens at which the rows that `adapter` was trained on were cut."""
    return int(adapter.training.get("settings", {}).get("max_length", FitSettings.max_length))


def metric_for(task: TaskData, metric: str | None) -> str:
    """`metric`, or the default of the task's kind of rows. Raises SettingsError when it does not fit them."""
    fitting = _OF_NUMBERS if task.regression else _METRICS[task.kind]
    if metric is not None and metric not in fitting:
        kind = "regression" if task.regression else task.kind
        fix = f"Use {' or '.join(fitting)}"
        raise SettingsError(f"metric {metric!r} does not fit {kind} rows", where=task.source, fix=fix)
    return metric or fitting[0]
