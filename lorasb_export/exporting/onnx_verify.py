"""Does an exported ONNX folder answer as torch does?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapter import Adapter
from ..base.device import where_there_is_room
from ..base.model import BaseModel
from ..base.streamed import streamed_model
from ..basis import Basis
from ..belonging import load_basis_once
from ..choices import CAUSAL_LM, SEQ_CLS
from ..data.batches import collate
from ..data.encoding import encode_split, prompt_ids
from ..data.rows import TEXT, has_answer
from ..data.task import TaskData
from ..errors import ArtifactError
from ..evaluation.answer_end import before_end, ends_of
from ..evaluation.evaluate import metric_for, trained_length
from ..evaluation.inference import answers_of_ids, asked_row
from ..evaluation.metrics import exact_match, prediction_metrics
from ..layers.exact import exact_products
from ..layers.inject import remove
from .onnx_run import OnnxDecoder, open_session, run_classifier

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a brick.",
)
if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 32  # of an answer
_METRIC_ROWS, _BATCH_ROWS = 128, 16
_TIE = 0.01  # logits: fp32 in another order of summation differs by about 1e-4


@exact_products()
def verify_folder(
    out: Path,
    base: BaseModel,
    adapters: Mapping[str, Adapter | None],
    asked: Mapping[str, HeldOut] = {},
) -> dict[str, dict[str, Any]]:
    """Ask an exported decoder for answers, and torch in fp32 whether it would have said the same.

    One pass of torch over prompt and answer gives its choice at every step, so an answer without a difference is the
    one that torch's own greedy loop gives.

    Args:
        out: what an ONNX export wrote.
        base: what torch loads: the merged folder; or the adapters' own base, to which torch adds each of them.
        adapters: name of an adapter of `out` → what torch adds; "" → None for the graph's own weights.
        asked: of those of `adapters` whose metric on held-out rows is wanted too (`held_out_rows`).

    Returns:
        for each of `adapters` the `prompts`, `equal_prompts` (whole answers equal), `tokens` (of the answers),
        `equal_tokens` (before the first of an answer that differs), and `gap`: by how much torch's logits prefer its
        own token there, the largest over the prompts; 0 when all are equal. Of `asked` also `rows_left_out`, which are
        too long for the model's context, and where others are left `metric`, `rows`, its value in `torch` and in
        `onnx`, and `drop`, the points (hundredths) the graph loses.
    """
    tokenizer = base.tokenizer
    decoder = OnnxDecoder(out)
    limit = min(_TOKENS, decoder.context // 2)
    encoded = [prompt_ids(tokenizer, prompt)[: decoder.context - limit] for prompt in PROMPTS]
    answered = {}
    for name in adapters:
        decoder.use(name or None)
        answered[name] = decoder.generate(encoded, limit)
        if name in asked:
            asked[name].ask(decoder)
    del decoder  # before torch loads the same weights
    bases: dict[str, Basis] = {}
    is_base_alone = not asked and all(adapter is None for adapter in adapters.values())

    def compared(device: torch.device) -> dict[str, dict[str, Any]]:
        network, device = _in_torch(base, device, few_passes=is_base_alone)
        results = {}
        for name, adapter in adapters.items():
            if adapter is not None:
                load_basis_once(adapter, bases)
                adapter.inject(network)
            results[name] = _compare(network, encoded, answered[name], device)
            if name in asked:
                results[name] |= asked[name].compare(network)
            if adapter is not None:
                remove(network)
        return results

    return where_there_is_room(compared, "answer the prompts") if is_base_alone else compared(torch.device("cpu"))


@exact_products()
def verify_classifier(out: Path, base: BaseModel, adapter: Adapter, data: TaskData | None) -> dict[str, Any]:
    """Ask an exported classifier and torch in fp32 for the same logits.

    Args:
        out: what `export_onnx` wrote.
        base: what torch loads: the merged folder.
        adapter: what was merged: its labels are the head's outputs, its rows were cut at its length.
        data: its task, whose metric on held-out rows is wanted too.

    Returns:
        `prompts`, `equal_prompts` (the same class; not for regression) and `gap`, the largest difference of one of
        their logits; of a regression's numbers, where they are beyond 1, relative to the largest. With data also
        `metric` (the first that `evaluate` has for it), `rows`, its value in `torch` and in `onnx`, and `drop`.
    """
    tokenizer = base.tokenizer
    rows = []
    if data is not None:
        length = trained_length(adapter)
        rows = encode_split(base, data, data.held_out(), adapter.labels, length, limit=_METRIC_ROWS)
    batches = [dict(tokenizer(list(PROMPTS), padding=True, return_tensors="pt"))]
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = collate(rows[start : start + _BATCH_ROWS], tokenizer.pad_token_id)
        del batch["labels"]
        batches.append(batch)
    session = open_session(out)
    arrays = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]
    found = [torch.from_numpy(run_classifier(session, batch)).float() for batch in arrays]
    del session  # before torch loads the same weights
    network = base.load(SEQ_CLS, dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = [network(**batch).logits for batch in batches]
    result: dict[str, Any] = {"prompts": len(PROMPTS), "gap": float((found[0] - expected[0]).abs().max())}
    if adapter.regression:
        result["gap"] /= max(1.0, float(expected[0].abs().max()))  # prices or years differ by as many digits as others
    else:
        result["equal_prompts"] = int((found[0].argmax(-1) == expected[0].argmax(-1)).sum())
    if data is None:
        return result
    metric, labels = metric_for(data, None), [row["labels"] for row in rows]

    def score(logits: Sequence[torch.Tensor]) -> float:
        every = torch.cat(list(logits))
        predicted = every[:, 0] if adapter.regression else every.argmax(-1)
        return prediction_metrics(predicted.tolist(), labels, regression=adapter.regression)[metric]

    return result | _both(metric, len(rows), score(expected[1:]), score(found[1:]))


def _both(metric: str, rows: int, in_torch: float, in_onnx: float) -> dict[str, Any]:
    drop = round(100 * (in_torch - in_onnx), 2)
    return {"metric": metric, "rows": rows, "torch": in_torch, "onnx": in_onnx, "drop": drop}


def held_out_rows(data: Mapping[str, TaskData], base: BaseModel) -> dict[str, HeldOut]:
    """What there is to ask of each task; nothing of plain text. Raises DataError for a row that cannot be asked."""
    ends = ends_of(base.folder, base.tokenizer)
    return {name: HeldOut(task, base, ends) for name, task in data.items() if task.kind != TEXT}


class HeldOut:
    """Exact match of greedy answers on a task's held-out rows, in the graph and then in torch."""

    def __init__(self, task: TaskData, base: BaseModel, ends: Collection[int]) -> None:
        rows, unit = task.rows(task.held_out())[:_METRIC_ROWS], task.unit(task.held_out())
        answered = {number: row for number, row in enumerate(rows, 1) if has_answer(row)}
        self._tokenizer, self._rows = base.tokenizer, len(rows)
        self._asked = [
            asked_row(base.tokenizer, row, f"{unit} {number}", ends, base.embeddings)
            for number, row in answered.items()
        ]

    def ask(self, decoder: OnnxDecoder) -> None:
        """The graph, of the rows that fit with their answers; torch is asked the same."""
        self._asked = [one for one in self._asked if len(one.ids) + one.max_tokens <= decoder.context]
        if not self._asked:
            return
        self._prompts, self._expected = [one.ids for one in self._asked], [one.expected for one in self._asked]
        self._limit = min(max(one.max_tokens for one in self._asked), decoder.context - max(map(len, self._prompts)))
        found = [before_end(ids, decoder.eos_ids) for ids in decoder.generate(self._prompts, self._limit)]
        self._in_onnx = exact_match(self._tokenizer.batch_decode(found, skip_special_tokens=True), self._expected)

    def compare(self, network: PreTrainedModel) -> dict[str, Any]:
        result: dict[str, Any] = {"rows_left_out": self._rows - len(self._asked)}
        if not self._asked:
            return result
        given = answers_of_ids(network, self._tokenizer, self._prompts, [self._limit] * len(self._prompts))
        return result | _both("exact_match", len(given), exact_match(given, self._expected), self._in_onnx)


def _in_torch(base: BaseModel, device: torch.device, *, few_passes: bool) -> tuple[PreTrainedModel, torch.device]:
    """The network in fp32, and where it computes.

    Where it can, and `few_passes` are all that is wanted, it computes on `device`, and its weights are read as they are
    needed: beside what the exporter takes, the memory to hold them counts.
    """
    streamed = streamed_model(base, CAUSAL_LM, device=device) if few_passes else None
    if streamed is not None:
        return streamed, device
    cpu = torch.device("cpu")
    return base.load(CAUSAL_LM, dtype="float32", device=cpu), cpu


def _compare(
    network: PreTrainedModel, prompts: Sequence[list[int]], answered: Sequence[list[int]], device: torch.device
) -> dict[str, float]:
    result = {"prompts": len(prompts), "equal_prompts": 0, "tokens": 0, "equal_tokens": 0, "gap": 0.0}
    for prompt, answer in zip(prompts, answered, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt + answer[:-1]], device=device)
            logits = network(ids).logits[0, len(prompt) - 1 :]  # (tokens, vocabulary)
        preferred = logits.argmax(-1).tolist()
        equal = next((i for i, token in enumerate(answer) if token != preferred[i]), len(answer))
        result["equal_prompts"] += equal == len(answer)
        result["tokens"] += len(answer)
        result["equal_tokens"] += equal
        if equal < len(answer):
            gap = float(logits[equal, preferred[equal]] - logits[equal, answer[equal]])
            result["gap"] = max(result["gap"], gap) if math.isfinite(gap) else gap  # max(0.0, nan) is 0.0
    return result


def require_equal(result: dict[str, Any], precision: str, where: str | Path, max_drop: float) -> dict[str, Any]:
    """`result`, one of `verify_folder` or that of `verify_classifier`.

    Raises:
        ArtifactError: fp32 answers differ by more than a tie between tokens; in any precision, not one answer agrees
            with torch in its first token (or its class); a logit is not finite; or the metric drops by more than
            `max_drop` points.
    """
    if not result.get("drop", 0.0) <= max_drop:  # nor NaN
        raise ArtifactError(
            f"{precision} loses {result['drop']} points of {result['metric']} on {result['rows']} held-out rows "
            f"({result['torch']:.1%} in torch, {result['onnx']:.1%} in the graph)",
            where=where,
            fix="Nothing was written; allow it with --max-drop, or make a new export with --precision int8 or fp32",
        )
    agreeing = result.get("equal_tokens", result.get("equal_prompts"))  # neither for regression
    if agreeing == 0 or not math.isfinite(result["gap"]):
        what = "agrees with torch in even its first token" if "tokens" in result else "is torch's"
        raise ArtifactError(
            f"no answer of the {precision} graph {what}",
            where=where,
            fix="Nothing was written; try --precision fp32, and report it with the versions of the packages",
        )
    if precision == "fp32" and result["gap"] > _TIE:
        counts = f"{result['equal_tokens']} of {result['tokens']} tokens are equal, " if "tokens" in result else ""
        raise ArtifactError(
            f"the ONNX answers leave torch's: {counts}the logits differ by {result['gap']:.2g}",
            where=where,
            fix="Nothing was written; report it with the versions of torch, onnxruntime and onnxruntime-genai",
        )
    return result
