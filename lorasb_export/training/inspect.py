"""What the rows of a task are to the model that is trained on them: counted, and the first one as it is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from ..base.given import require_positions
from ..base.model import AnyBase, BaseModel
from ..base.supported import refuse_merged
from ..choices import CAUSAL_LM
from ..data.encoding import IGNORE, Encoded, encode_all, without_left_out
from ..data.rows import Row
from ..data.source import AnySource
from ..data.task import TaskData, load_task
from ..errors import Problems
from ..evaluation.inference import asked_of
from ..settings import FitSettings
from .requirements import check_rows
from .row_warnings import warn_of_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect_data(data: AnySource | TaskData, base: AnyBase, settings: FitSettings | None = None) -> dict[str, Any]:
    """What `fit` would train on: rows are encoded as it encodes them, and warned of as it warns. Of the base the config
    and the tokenizer are read, no weights.

    Args:
        data: folder, file, Hub dataset id, or loaded task.
        base: folder, Hub id, or a resolved BaseModel.
        settings: those of `fit`: rows are cut at its `max_length`.

    Returns:
        `path` of the data; `kind`, which is `data`; `base_model`; `task_type`; `row_kind`; `max_length`; `splits`; and
        `first_row`. Each split has `rows` (those that are learnt), `rows_left_out`, `rows_cut`, and `tokens`: `min`,
        `median`, `p95` and `max` of all its rows, before the cut. Of a causal model also `tokens_learnt`, those with a
        label in all of its rows; of classes `classes`, {label: rows}; of numbers `numbers`: `min`, `median` and `max`.
        `first_row` is the first training row that is learnt: `row`, its number, from 1; `tokens`, before the cut;
        `cut`; `segments`, its text with all special tokens in parts that are `learnt` or not; and a classifier's
        `label`.

    Raises:
        DataError, SettingsError, BaseModelError: what `fit` would refuse of data, tokenizer, chat template or
            `max_length`, or what the chat template refuses of test rows; what is wrong with any split is told at once.
    """
    settings = settings or FitSettings()
    task = data if isinstance(data, TaskData) else load_task("data", data)
    base = BaseModel.resolve(base, weights=False)
    refuse_merged(base.folder)
    base.require_task(task.task_type)
    task = replace(task, label_order=base.head_labels)
    tokenizer, network = base.tokenizer, base.load_empty(task.task_type, num_labels=task.num_labels)
    problems, kept, splits = Problems(), dict[str, list[Encoded]](), dict[str, dict[str, Any]]()
    with problems:
        check_rows(task, settings)
    with problems:
        require_positions(network, settings.max_length)
    for split in filter(task.splits.get, task.splits):
        with problems:
            rows, length, unit = task.rows(split), settings.max_length, task.unit(split)
            encoded = encode_all(rows, tokenizer, task.task_type, task.labels, length, unit, embeddings=base.embeddings)
            if split == "test":  # which `fit` does not encode
                kept[split] = [row for row in encoded if row["left_out"] is None]
            else:
                kept[split] = without_left_out(encoded, length, unit)
            splits[split] = _counts(encoded, kept[split]) | _labels(task, rows)
    if settings.metric == "exact_match" and "valid" in kept and not problems.found:
        with problems:
            asked_of(network, tokenizer, task.rows("valid"), task.unit("valid"))
    problems.raise_all("nothing can be trained")
    warn_of_rows(task, kept["train"], tokenizer, network)
    return {
        "path": task.source,
        "kind": "data",
        "base_model": base.name_or_path,
        "task_type": task.task_type,
        "row_kind": task.kind,
        "max_length": settings.max_length,
        "splits": splits,
        "first_row": _as_read(kept["train"][0], task, tokenizer),
    }


def _counts(encoded: Sequence[Encoded], kept: Sequence[Encoded]) -> dict[str, Any]:
    lengths = sorted(row["length"] for row in encoded)
    found = {
        "rows": len(kept),
        "rows_left_out": len(encoded) - len(kept),
        "rows_cut": sum(row["cut"] for row in kept),
        "tokens": {
            "min": lengths[0],
            "median": lengths[(len(lengths) - 1) // 2],
            "p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "max": lengths[-1],
        },
    }
    if isinstance(encoded[0]["labels"], list):
        found["tokens_learnt"] = sum(label != IGNORE for row in kept for label in row["labels"])
    return found


def _labels(task: TaskData, rows: Sequence[Row]) -> dict[str, Any]:
    """What a classifier's rows are labelled with; nothing for those of a causal model."""
    if task.task_type == CAUSAL_LM:
        return {}
    labels = [row["label"] for row in rows]
    if task.regression:
        return {"numbers": {"min": min(labels), "median": median(labels), "max": max(labels)}}
    counted = Counter(labels)
    return {"classes": {str(label): counted[label] for label in task.labels}}


def _as_read(encoded: Encoded, task: TaskData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    found = {"row": encoded["row"], "tokens": encoded["length"], "cut": encoded["cut"]}
    ids, labels = encoded["input_ids"], encoded["labels"]
    if not isinstance(labels, list):
        label = task.rows("train")[encoded["row"] - 1]["label"]
        return found | {"segments": [{"text": _text(tokenizer, ids), "learnt": False}], "label": label}
    learnt = [label != IGNORE for label in labels]
    bounds = [0, *(i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]), len(ids)]
    segments = []
    for start, end in pairwise(bounds):
        # As it goes on after what is before it: by itself a tokenizer may leave out the space it begins with.
        before, both = _text(tokenizer, ids[:start]), _text(tokenizer, ids[:end])
        text = both.removeprefix(before) if both.startswith(before) else _text(tokenizer, ids[start:end])
        segments.append({"text": text, "learnt": learnt[start]})
    return found | {"segments": segments}


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
