"""Held-out rows → the loss and the prediction of every one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..bars import progress_bar
from ..base.borrowed import evaluating, without_cache
from ..data.batches import collate, row_losses
from ..data.encoding import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def row_scores(
    network: PreTrainedModel, encoded: Sequence[Encoded], pad_id: int, *, batch_size: int
) -> list[tuple[float, int, float]]:
    """For every row its summed loss, the number of labels behind it, and the prediction.

    The prediction is the class of a classifier, the number of a regression, and 0 for a causal language model.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))  # the most memory first
    found: dict[int, tuple[float, int, float]] = {}
    with evaluating(network), without_cache(network):
        for start in progress_bar(range(0, len(order), batch_size), desc="score", leave=False):
            places = order[start : start + batch_size]
            inputs = {key: v.to(network.device) for key, v in collate([encoded[i] for i in places], pad_id).items()}
            labels = inputs.pop("labels")
            with torch.inference_mode():
                logits = network(**inputs).logits
            # Row by row: a loss copies its logits in fp32, and those of a batch could take more than its training.
            of_rows = [row_losses(*row) for row in zip(logits.split(1), labels.split(1), strict=True)]
            losses, counts = map(torch.cat, zip(*of_rows, strict=True))
            if labels.dim() == 2:
                predicted = torch.zeros(len(places))
            else:
                predicted = logits[:, 0].float() if labels.is_floating_point() else logits.argmax(dim=-1)
            found |= zip(places, zip(losses.tolist(), counts.tolist(), predicted.tolist(), strict=True), strict=True)
    return [found[i] for i in range(len(encoded))]


def mean_loss(scores: Sequence[tuple[float, int, float]]) -> float:
    """The mean loss of a label; of a token, for a causal language model."""
    return sum(loss for loss, _, _ in scores) / sum(count for _, count, _ in scores)
