"""Greedy answers of a model in torch, and the metric of a task on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .artifact import Adapter
from .base import SEQ_CLS, BaseModel
from .data import TaskData, prompt_ids
from .errors import DataError
from .layer import remove

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = Callable[[Sequence[str]], list[str]]


def generate_ids(
    network: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy continuations of token-id prompts, up to and without `eos_id`, in the order given."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=None, leave=False):
        rows = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in rows])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        with torch.inference_mode():
            output = network.generate(  # type: ignore[operator]
                ids.to(network.device),
                attention_mask=mask.to(network.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=eos_id,
                pad_token_id=pad_id,
            )
        for i, row in zip(rows, output[:, longest:].tolist(), strict=True):
            answers[i] = row[: row.index(eos_id)] if eos_id in row else row
    return [answers[i] for i in range(len(prompts))]


def answers(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_tokens: int = 128
) -> list[str]:
    """Greedy answers to text prompts, asked as in training (`data.prompt_ids`)."""
    ids = generate_ids(
        network,
        [prompt_ids(tokenizer, prompt) for prompt in prompts],
        max_tokens=max_tokens,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def labels_of(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 32,
) -> list[int]:
    """The most likely class of each row of a sequence classifier."""
    found: list[int] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="classify", disable=None, leave=False):
        batch = rows[start : start + batch_size]
        pairs = [row["text_pair"] for row in batch] if "text_pair" in batch[0] else None
        inputs = tokenizer([row["text"] for row in batch], pairs, return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            found += network(**inputs.to(network.device)).logits.argmax(dim=-1).tolist()
    return found


def evaluate(
    adapter: Adapter,
    task: TaskData,
    *,
    base: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """The task's metric on held-out rows, for the base and for the adapter.

    Exact match of the greedy answer (white space at the ends aside) for CAUSAL_LM; accuracy for SEQ_CLS, where
    the base has no trained head and is left out.

    Args:
        base: the base model, where it is not where the adapter says.
        split: `valid`, `test` or `train`; the task's held-out split when None.
        limit: only the first so many rows.

    Raises:
        DataError: the split is empty, or of another task type than the adapter.
    """
    if task.task_type != adapter.task_type:
        raise DataError(f"the data is {task.task_type}, the adapter {adapter.task_type}", where=task.source)
    split = split or task.held_out()
    rows = list(task.rows(split))[:limit]
    model = adapter.base.resolve(base)
    model.verify(adapter.base, adapter.R)
    tokenizer = model.load_tokenizer()
    network = model.load(adapter.task_type, dtype=dtype, num_labels=len(adapter.labels) or None)
    result: dict[str, Any] = {"task": task.name, "split": split, "rows": len(rows)}
    if adapter.task_type == SEQ_CLS:
        adapter.inject(network)
        predicted = [adapter.labels[i] for i in labels_of(network, tokenizer, rows)]
        hits = [p == row["label"] for p, row in zip(predicted, rows, strict=True)]
        return result | {"metric": "accuracy", "base": None, "adapter": sum(hits) / len(rows)}
    limit_tokens = max_answer_tokens(tokenizer, rows)
    prompts = [row["prompt"] for row in rows]
    scores = {}
    for name in ("base", "adapter"):
        if name == "adapter":
            adapter.inject(network)
        scores[name] = exact_match(answers(network, tokenizer, prompts, max_tokens=limit_tokens), rows)
    remove(network)
    return result | {"metric": "exact_match", **scores}


def side_by_side(
    prompt: str, adapters: Mapping[str, str], *, base: str | None = None, max_tokens: int = 128, dtype: str = "auto"
) -> dict[str, str]:
    """The base's answer to one prompt, then each adapter's, on one loaded base.

    Args:
        adapters: name → adapter folder or Hub id, all of one base.
        base: the base, where the adapters do not find it; needed when there are none.

    Raises:
        BaseModelError: an adapter belongs to another base.
    """
    loaded = {name: Adapter.load(source) for name, source in adapters.items()}
    first = next(iter(loaded.values()), None)
    model = BaseModel.resolve(base or "") if first is None else first.base.resolve(base)
    for adapter in loaded.values():
        model.verify(adapter.base, adapter.R)
        adapter.load_basis()
    tokenizer = model.load_tokenizer()
    network = model.load(dtype=dtype)
    found = {"base": answers(network, tokenizer, [prompt], max_tokens=max_tokens)[0]}
    for name, adapter in loaded.items():
        adapter.inject(network)
        found[name] = answers(network, tokenizer, [prompt], max_tokens=max_tokens)[0]
    return found


def exact_match(found: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of answers equal to the row's completion, white space at the ends aside."""
    return sum(a.strip() == row["completion"].strip() for a, row in zip(found, rows, strict=True)) / len(rows)


def max_answer_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens to allow an answer: those of the longest reference and its end token, and a few more."""
    return max(len(tokenizer(row["completion"], add_special_tokens=False).input_ids) for row in rows) + 8


def record_evaluation(folder: Path, result: Mapping[str, Any]) -> None:
    """Put an evaluation's figures into an adapter's config and card, replacing those of the same split and metric."""
    from . import card
    from .storage import read_json, write_json

    path = folder / "adapter_config.json"
    config = read_json(path)
    split = config["training"].setdefault("evaluation", {}).setdefault(result["split"], {})
    split[result["metric"]] = {key: result[key] for key in ("base", "adapter", "rows")}
    temporary = path.with_suffix(".tmp")
    write_json(temporary, config)
    temporary.replace(path)
    card.write(folder, card.adapter_card(config))
