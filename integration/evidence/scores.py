"""A task's metric on its first test rows, by a library where the field has a standard one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorasb_export.base.model import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.encoding import encode
from lorasb_export.data.rows import Row
from lorasb_export.data.task import TaskData
from lorasb_export.evaluation.inference import answers, question_of
from lorasb_export.evaluation.metrics import exact_match, prediction_metrics
from lorasb_export.evaluation.scores import row_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512
BATCH_SIZE = 64  # prompts, answered together


def score(model: Any, base: BaseModel, task: TaskData, limit: int) -> tuple[str, float]:
    """The metric's name and its value over `limit` test rows (for `e2e`, prompts with all their references)."""
    tokenizer = base.tokenizer
    if task.task_type == SEQ_CLS:
        of_task = task.task_type, task.labels, MAX_LENGTH
        rows = encode(some(task.rows("test"), limit), tokenizer, *of_task, embeddings=base.embeddings)
        scored = row_scores(model, rows, tokenizer.pad_token_id, batch_size=16)
        predicted, labels = [prediction for _, _, prediction in scored], [row["labels"] for row in rows]
        found = prediction_metrics(predicted, labels, regression=False)
        metric = "mcc" if task.name == "cola" else "accuracy"
        return metric, found[metric]
    if task.name == "e2e":
        return "bleu", _bleu(model, tokenizer, task.rows("test"), limit)
    rows = some(task.rows("test"), limit)
    longest = max(question_of(tokenizer, row, "a row", ()).max_tokens for row in rows)
    given = answers(model, tokenizer, [row["prompt"] for row in rows], max_tokens=longest, batch_size=BATCH_SIZE)
    return "exact_match", exact_match(given, [row["completion"] for row in rows])


def _bleu(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], limit: int) -> float:
    """Corpus BLEU, 0 to 1, of the answers to `limit` different prompts, each with all of its references."""
    import sacrebleu

    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["prompt"], []).append(row["completion"])
    prompts = some(list(references), limit)
    given = answers(model, tokenizer, prompts, max_tokens=64, batch_size=BATCH_SIZE)
    streams = itertools.zip_longest(*(references[prompt] for prompt in prompts))  # None where a prompt has fewer
    return sacrebleu.corpus_bleu([text.strip() for text in given], list(map(list, streams))).score / 100


def some(rows: Sequence[Any], limit: int) -> list[Any]:
    """`limit` rows, the same every time: the files are sorted, banking77's by its classes."""
    return random.Random(0).sample(list(rows), min(limit, len(rows)))
