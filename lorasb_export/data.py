"""Task data: rows from JSONL files or the Hub, checked one by one, turned into token batches.

A row is {"prompt", "completion"} for a causal language model, or {"text"[, "text_pair"], "label"} for a
sequence classifier. With a chat template the prompt is one user message; the loss is on the completion alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from .base import CAUSAL_LM, SEQ_CLS
from .errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
SPLITS = ("train", "valid", "test")
_FIELDS = {CAUSAL_LM: ("prompt", "completion"), SEQ_CLS: ("text", "label")}

Row = dict[str, Any]
Encoded = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """The rows of one task, by split; only `train` is always there."""

    name: str
    source: str
    task_type: str
    splits: Mapping[str, Sequence[Row]]
    sha256: str

    @property
    def labels(self) -> list[Any]:
        """The distinct training labels, sorted; empty for CAUSAL_LM."""
        return sorted({row["label"] for row in self.splits["train"]}) if self.task_type == SEQ_CLS else []

    def rows(self, split: str) -> Sequence[Row]:
        """Rows of `split`. Raises DataError when the task has none."""
        if not self.splits.get(split):
            raise DataError(f"task {self.name} has no {split} rows", where=self.source, fix=f"Add {split}.jsonl")
        return self.splits[split]

    def held_out(self) -> str:
        """The split to report on: `test` where there is one, else `valid`."""
        return "test" if self.splits.get("test") else "valid"


def load_task(name: str, source: str | Path) -> TaskData:
    """Read a task from a folder of train/valid/test.jsonl, one .jsonl file, or a Hub dataset id.

    Raises:
        DataError: nothing there, a broken line (file and line are named), a missing or empty field.
    """
    path = Path(source).expanduser()
    if path.is_file():
        placed = {"train": read_rows(path)}
    elif path.is_dir():
        placed = {split: read_rows(path / f"{split}.jsonl") for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        if "train" not in placed:
            raise DataError("no train.jsonl in the data folder", where=path, fix="Add it, one JSON object a line")
    else:
        placed = _rows_from_hub(str(source))
    if not placed["train"]:
        raise DataError("no training rows", where=source, fix="Add at least one JSON object, one a line")
    task_type = _task_type(placed["train"][0][1], source)
    for rows in placed.values():
        for place, row in rows:
            _check_row(row, task_type, place)
    if len({type(row.get("label")) for rows in placed.values() for _, row in rows}) > 1:
        raise DataError("some labels are names, some are numbers", where=source, fix="Use one kind")
    splits = {split: [row for _, row in rows] for split, rows in placed.items()}
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return TaskData(name, str(source), task_type, splits, digest)


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """The JSON objects of a JSONL file, each with its place, `file:line`. Raises DataError naming it."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the data: {error}", where=path, fix="Give a UTF-8 JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"broken JSON: {error}", where=place, fix="One JSON object a line") from None
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=place, fix="One JSON object a line")
        rows.append((place, row))
    return rows


def _rows_from_hub(name: str) -> dict[str, list[tuple[str, Row]]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name)
    except Exception as error:  # datasets raises a dozen unrelated types for "not there" and "not reachable"
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"no such file, folder or Hub dataset: {reason}", where=name, fix="Check the path") from None
    names = {"train": "train", "valid": "validation", "test": "test"}
    return {
        split: [(f"{name} {theirs} row {number}", row) for number, row in enumerate(dataset[theirs].to_list())]
        for split, theirs in names.items()
        if theirs in dataset
    }


def _task_type(row: Row, source: object) -> str:
    for task_type, fields in _FIELDS.items():
        if fields[0] in row:
            return task_type
    raise DataError(
        "rows have neither 'prompt' nor 'text'",
        where=source,
        fix='Use {"prompt": …, "completion": …} or {"text": …, "label": …}',
    )


def _check_row(row: Row, task_type: str, where: str) -> None:
    for field in _FIELDS[task_type]:
        if field not in row:
            raise DataError(f"the row lacks field {field!r}", where=where, fix="Every row needs it")
    for field in (f for f in ("prompt", "completion", "text", "text_pair") if f in row):
        if not isinstance(row[field], str):
            raise DataError(f"{field!r} is not a string", where=where)
    if task_type == CAUSAL_LM and not row["completion"].strip():
        raise DataError("the completion is empty", where=where, fix="Remove the row or fill it in")
    if task_type == SEQ_CLS and not isinstance(row["label"], str | int):
        raise DataError(
            f"label {row['label']!r} is neither a name nor a whole number",
            where=where,
            fix="Give classes; regression is not supported yet",
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model is asked it: one user message where there is a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt).input_ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, task_type: str, labels: Sequence[Any], max_length: int
) -> list[Encoded]:
    """Rows as token ids with labels: IGNORE on the prompt (CAUSAL_LM), or an index into `labels` (SEQ_CLS).

    A causal row is cut at `max_length`; one whose prompt alone fills it has nothing to learn and is left out.

    Raises:
        DataError: a label is not in `labels`, or no row is left.
    """
    encoded: list[Encoded] = []
    for number, row in enumerate(rows, 1):
        if task_type == SEQ_CLS:
            if row["label"] not in labels:
                raise DataError(f"label {row['label']!r} is not among the training labels", where=f"row {number}")
            text = (row["text"], row["text_pair"]) if "text_pair" in row else (row["text"],)
            ids = tokenizer(*text, truncation=True, max_length=max_length).input_ids
            encoded.append({"input_ids": ids, "labels": labels.index(row["label"])})
            continue
        prompt = prompt_ids(tokenizer, row["prompt"])
        completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(prompt) < max_length:
            encoded.append(
                {
                    "input_ids": (prompt + completion)[:max_length],
                    "labels": ([IGNORE] * len(prompt) + completion)[:max_length],
                }
            )
    if not encoded:
        raise DataError(
            f"every prompt is {max_length} tokens or longer: nothing to learn", fix="Raise max_length or shorten them"
        )
    return encoded


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """Right-padded CPU tensors: input_ids, attention_mask (n, t), labels (n, t) or (n,).

    For a causal model also `logits_to_keep`: logits are needed only from the last prompt token on, and before
    it they cost time and teach nothing. Known here on the host, so that the training step need not ask the device.
    """
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(values: Sequence[int], fill: int) -> list[int]:
        return list(values) + [fill] * (longest - len(values))

    tensors: dict[str, Any] = {
        "input_ids": torch.tensor([pad(row["input_ids"], pad_id) for row in batch]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch]),
    }
    if isinstance(batch[0]["labels"], int):
        return tensors | {"labels": torch.tensor([row["labels"] for row in batch])}
    first = min(next(i for i, label in enumerate(row["labels"]) if label != IGNORE) for row in batch)
    tensors["labels"] = torch.tensor([pad(row["labels"], IGNORE) for row in batch])
    return tensors | {"logits_to_keep": longest - max(first, 1) + 1}


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of every row and the number of labels behind it: shapes (n,), (n,).

    Args:
        logits: (n, classes) for SEQ_CLS; (n, kept, vocabulary) for CAUSAL_LM, the last `kept` positions.
        labels: (n,) or (n, t).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)
    targets = labels[:, 1 - logits.shape[1] :]  # position i predicts token i + 1
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return losses.sum(dim=1), (targets != IGNORE).sum(dim=1)
