"""Greedy answers of a model in torch, and a metric of a task on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .adapter import Adapter, load_basis_once
from .bars import no_bar
from .base import CAUSAL_LM, BaseModel
from .basis import Basis
from .batches import encode, prompt_ids
from .data import CHAT, COMPLETION, LABELLED, TEXT, Prompt, Row, TaskData, question_and_answer
from .errors import ArtifactError, DataError, SettingsError
from .layer import remove
from .metrics import exact_match
from .network import positions
from .settings import FitSettings
from .training.validation import mean_loss, of_predictions, row_scores

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Of each kind of row, the metrics that fit; the first is the default.
_METRICS = {
    COMPLETION: ("exact_match", "loss"),
    CHAT: ("exact_match", "loss"),
    TEXT: ("loss",),
    LABELLED: ("accuracy", "mcc"),
}


def generate_ids(
    network: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy continuations of token-id prompts, up to and without `eos_id`, in the order given.

    The likeliest token and nothing else: penalties in the base's generation_config.json, made for chats, are left out.
    """
    from transformers import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos_id, pad_token_id=pad_id)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=no_bar(), leave=False):
        rows = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in rows])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        with torch.inference_mode(), _generation_config(network, greedy):
            output = network.generate(ids.to(network.device), attention_mask=mask.to(network.device))  # type: ignore[operator]
        for i, row in zip(rows, output[:, longest:].tolist(), strict=True):
            answers[i] = row[: row.index(eos_id)] if eos_id in row else row
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def _generation_config(network: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """What is passed to `generate` only adds to the network's own; so it is put in place of it."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


def question_ids(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    unit: str = "prompt",
) -> list[list[int]]:
    """Token ids of prompts, asked as in training (`batches.prompt_ids`), that `network` can answer.

    Args:
        unit: what errors call one of them; its number, from 1, follows.

    Raises:
        DataError: the chat template refuses a prompt, it has no tokens, or learned positions end before its answer.
    """
    reach = positions(network)
    questions = []
    for number, prompt in enumerate(prompts, 1):
        where = f"{unit} {number}"
        ids = prompt_ids(tokenizer, prompt, where)
        if not ids:
            raise DataError("the prompt has no tokens, so there is nothing to answer", where=where, fix="Fill it in")
        if len(ids) + max_tokens > reach:
            what = f"a prompt of {len(ids)} tokens and an answer of {max_tokens}; the base's positions end at {reach}"
            raise DataError(what, where=where, fix="Shorten one of them")
        questions.append(ids)
    return questions


def answers(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 128,
    batch_size: int = 16,
    unit: str = "prompt",
) -> list[str]:
    """Greedy answers to prompts; args and errors as of `question_ids`."""
    questions = question_ids(network, tokenizer, prompts, max_tokens=max_tokens, unit=unit)
    return answers_to_ids(network, tokenizer, questions, max_tokens=max_tokens, batch_size=batch_size)


def answers_to_ids(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to what `question_ids` gave."""
    if not questions:  # of which batch_decode makes one empty answer
        return []
    ids = generate_ids(
        network,
        questions,
        max_tokens=max_tokens,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        batch_size=batch_size,
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def evaluate(
    adapter: Adapter,
    task: TaskData,
    *,
    base: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    metric: str | None = None,
    networks: dict[str, PreTrainedModel] | None = None,
) -> dict[str, Any]:
    """A metric on held-out rows, for the base and for the adapter.

    Args:
        base: the base model, where it is not where the adapter says.
        split: `valid`, `test` or `train`; the task's held-out split when None.
        limit: only the first so many rows.
        metric: for rows with an answer `exact_match` of the greedy answer (white space at the ends aside) or `loss`,
            the mean over their tokens; for plain text `loss`; for classes `accuracy` or `mcc`; for regression
            `pearson`. The first of these when None.
        networks: fingerprint → loaded base that generates: one that is there is used, another is put there, and all
            are left as they were. For many adapters of one base.

    Returns:
        `task`, `split`, `rows` (those that count), `metric`, and its value for `adapter` and for `base`: None where
        the adapter brings the head, which the base lacks.

    Raises:
        DataError: the split is empty, or of another task type than the adapter; an answer is missing, or a prompt is
            none that the base can answer (`question_ids`).
        SettingsError: the metric does not fit the data.
    """
    split, metric, rows = to_score(adapter, task, split=split, limit=limit, metric=metric)
    asked = [question_and_answer(row) for row in rows] if metric == "exact_match" else []
    model = adapter.base.resolve(base)
    model.verify(adapter.base, adapter.R)
    tokenizer = model.load_tokenizer()
    encoded = []
    if metric != "exact_match":
        length = trained_length(adapter)
        encoded = encode(rows, tokenizer, task.task_type, adapter.labels, length, unit=f"{split} row")
    networks = {} if networks is None or task.task_type != CAUSAL_LM else networks
    network = networks.get(adapter.base.fingerprint)
    if network is None:
        network = model.load(adapter.task_type, dtype=dtype, num_labels=adapter.num_labels)
        networks[adapter.base.fingerprint] = network

    def score() -> float:
        if metric == "exact_match":
            limit_tokens = max_answer_tokens(tokenizer, rows)
            questions = [question for question, _ in asked]
            found = answers(network, tokenizer, questions, max_tokens=limit_tokens, unit=f"{split} row")
            return exact_match(found, [answer for _, answer in asked])
        scores = row_scores(network, encoded, tokenizer.pad_token_id)
        if metric == "loss":
            return mean_loss(scores)
        predicted, expected = [prediction for _, _, prediction in scores], [row["labels"] for row in encoded]
        return of_predictions(predicted, expected, regression=task.regression)[metric]

    result = {"task": task.name, "split": split, "rows": len(asked or encoded), "metric": metric}
    before = score() if task.task_type == CAUSAL_LM else None
    adapter.inject(network)
    try:
        return result | {"base": before, "adapter": score()}
    finally:
        remove(network)


def to_score(
    adapter: Adapter, task: TaskData, *, split: str | None = None, limit: int | None = None, metric: str | None = None
) -> tuple[str, str, Sequence[Row]]:
    """The split, the metric and the rows that `evaluate` would take, checked as far as that needs no model.

    Args and errors: as for `evaluate`.
    """
    require_same_kind(adapter, task)
    metric = fitting_metric(task, metric)
    split = split or task.held_out()
    rows = task.rows(split)[:limit]
    if metric == "exact_match":
        for number, row in enumerate(rows, 1):
            question_and_answer(row, f"{split} row {number}")
    return split, metric, rows


def require_same_kind(adapter: Adapter, task: TaskData) -> None:
    """Raise DataError when `task` is not of the task type that `adapter` was trained for."""
    if (task.task_type, task.regression) != (adapter.task_type, adapter.regression):
        ours, theirs = (f"{t.task_type}{' (regression)' if t.regression else ''}" for t in (task, adapter))
        raise DataError(f"the data is {ours}, the adapter {theirs}", where=task.source)


def trained_length(adapter: Adapter) -> int:
    """Tokens at which the rows that `adapter` was trained on were cut."""
    return int(adapter.training.get("settings", {}).get("max_length", FitSettings.max_length))


def fitting_metric(task: TaskData, metric: str | None) -> str:
    """`metric`, or the default of the task's kind of rows. Raises SettingsError when it does not fit them."""
    fitting = ("pearson",) if task.regression else _METRICS[task.kind]
    if metric is not None and metric not in fitting:
        kind = "regression" if task.regression else task.kind
        raise SettingsError(f"metric {metric!r} does not fit {kind} rows", fix=f"Use {' or '.join(fitting)}")
    return metric or fitting[0]


def side_by_side(
    prompt: str,
    adapters: Mapping[str, str],
    *,
    base: str | None = None,
    revision: str | None = None,
    max_tokens: int = 128,
    dtype: str = "auto",
) -> dict[str, str]:
    """The base's answer to one prompt, then each adapter's, on one loaded base.

    Args:
        adapters: name → adapter folder or Hub id, all of one base.
        base: the base, where the adapters do not find it; needed when there are none, and then at this `revision`.

    Raises:
        ArtifactError: an adapter is a classifier.
        BaseModelError: an adapter belongs to another base.
    """
    loaded = {name: Adapter.load(source) for name, source in adapters.items()}
    for name, adapter in loaded.items():
        if adapter.task_type != CAUSAL_LM:
            fix = "Leave it out, and score it with `lorasb evaluate`"
            raise ArtifactError(f"adapter {name} is a classifier, which answers nothing", where=adapter.folder, fix=fix)
    first = next(iter(loaded.values()), None)
    model = BaseModel.resolve(base or "", revision) if first is None else first.base.resolve(base)
    bases: dict[str, Basis] = {}
    for adapter in loaded.values():
        model.verify(adapter.base, adapter.R)
        load_basis_once(adapter, bases)
    tokenizer = model.load_tokenizer()
    network = model.load(dtype=dtype)
    found = {"base": answers(network, tokenizer, [prompt], max_tokens=max_tokens)[0]}
    for name, adapter in loaded.items():
        adapter.inject(network)
        found[name] = answers(network, tokenizer, [prompt], max_tokens=max_tokens)[0]
    return found


def max_answer_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> int:
    """Tokens to allow an answer: those of the longest reference and its end token, and a few more."""
    expected = [question_and_answer(row)[1] for row in rows]
    return max(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in expected) + 8


def record_evaluation(folder: Path, result: Mapping[str, Any]) -> None:
    """Put an evaluation's figures into an adapter's config and card, replacing those of the same split and metric."""
    from .format import sealed
    from .output import replaced_file
    from .publishing import card
    from .storage import read_json, write_json

    path = folder / "adapter_config.json"
    config = read_json(path)
    split = config["training"].setdefault("evaluation", {}).setdefault(result["split"], {})
    split[result["metric"]] = {key: result[key] for key in ("base", "adapter", "rows")}
    with replaced_file(path) as temporary:
        write_json(temporary, sealed(config))
    card.write(folder, card.adapter_card(config))
