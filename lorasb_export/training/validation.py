"""The loss and the metrics of held-out rows, while training and afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .. import distributed
from ..bars import no_bar
from ..batches import Encoded, collate, row_losses
from ..metrics import accuracy, exact_match, mcc, pearson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def row_scores(
    network: PreTrainedModel, encoded: Sequence[Encoded], pad_id: int, *, batch_size: int = 16
) -> list[tuple[float, int, float]]:
    """For every row its summed loss, the number of labels behind it, and the prediction.

    The prediction is the class of a classifier, the number of a regression, and 0 for a causal language model.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    found: dict[int, tuple[float, int, float]] = {}
    for start in tqdm(range(0, len(order), batch_size), desc="score", disable=no_bar(), leave=False):
        places = order[start : start + batch_size]
        batch = collate([encoded[i] for i in places], pad_id)
        labels = batch.pop("labels").to(network.device)
        inputs = {key: v.to(network.device) if torch.is_tensor(v) else v for key, v in batch.items()}
        with torch.inference_mode():
            logits = network(**inputs).logits
        losses, counts = row_losses(logits, labels)
        if labels.dim() == 2:
            predicted = torch.zeros(len(places))
        else:
            predicted = logits[:, 0].float() if labels.is_floating_point() else logits.argmax(dim=-1)
        found |= zip(places, zip(losses.tolist(), counts.tolist(), predicted.tolist(), strict=True), strict=True)
    return [found[i] for i in range(len(encoded))]


def mean_loss(scores: Sequence[tuple[float, int, float]]) -> float:
    """The mean loss of a label; of a token, for a causal language model."""
    return sum(loss for loss, _, _ in scores) / sum(count for _, count, _ in scores)


def of_predictions(predicted: Sequence[float], expected: Sequence[float], *, regression: bool) -> dict[str, float]:
    """Pearson's correlation for regression; accuracy and Matthews' correlation for classes."""
    if regression:
        return {"pearson": pearson(predicted, expected)}
    return {"accuracy": accuracy(predicted, expected), "mcc": mcc(predicted, expected)}


@dataclass(frozen=True)
class Validation:
    """How one task is validated while it trains.

    Attributes:
        rows: the encoded rows of the valid split.
        asked: prompts (`inference.question_ids`) and expected answers, to answer them too (`exact_match`); empty
            otherwise.
        every: optimizer steps between evaluations; None leaves it to the length of the run.
    """

    rows: Sequence[Encoded]
    tokenizer: PreTrainedTokenizerBase
    asked: Sequence[tuple[Sequence[int], str]] = ()
    max_tokens: int = 0
    every: int | None = None

    def run(self, network: PreTrainedModel, batch_size: int) -> dict[str, float]:
        """`loss`, and the metrics that apply. Every process scores its share of the rows."""
        from ..inference import answers_to_ids

        network.eval()
        share = slice(distributed.rank(), None, distributed.world())
        mine, pad_id = self.rows[share], self.tokenizer.pad_token_id
        scored = row_scores(network, mine, pad_id, batch_size=batch_size) if mine else []
        expected: list[Any] = distributed.gather([row["labels"] for row in mine])
        scored = distributed.gather(scored)
        found = {"loss": mean_loss(scored)}
        if not isinstance(expected[0], list):
            predicted = [prediction for _, _, prediction in scored]
            found |= of_predictions(predicted, expected, regression=isinstance(expected[0], float))
        if self.asked:
            asked = self.asked[share]
            given = answers_to_ids(network, self.tokenizer, [ids for ids, _ in asked], max_tokens=self.max_tokens)
            pairs = distributed.gather(list(zip(given, (answer for _, answer in asked), strict=True)))
            found["exact_match"] = exact_match([a for a, _ in pairs], [b for _, b in pairs])
        return found


def better(metric: str, value: float, than: float) -> bool:
    """Whether `value` beats `than`: lower for the loss, higher for all else. NaN beats nothing, and all beat NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if metric == "loss" else value > than
