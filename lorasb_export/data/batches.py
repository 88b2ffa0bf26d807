"""Encoded rows → padded batches, forward passes over them, the loss of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ..bars import progress_bar
from ..base.given import evaluating, without_cache
from .encoding import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """Right-padded CPU tensors: input_ids and, if the rows have them, token_type_ids (n, t).

    For SEQ_CLS also attention_mask (n, t) and labels (n,). For a causal model `logits_to_keep` (kept,), the positions
    from which any row predicts a label, and labels (n, kept), the token after each of them, or IGNORE: all other logits
    would cost time and memory and teach nothing. Known here on the host, so that nothing of ours waits for the device
    in a training step. It gets no mask: padding comes after the labels, where none of them looks, and torch's attention
    is faster without one. (transformers then looks whether rows are packed, and waits for the device once.)
    """
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(values: Sequence[int], fill: int) -> list[int]:
        return list(values) + [fill] * (longest - len(values))

    tensors: dict[str, Any] = {"input_ids": torch.tensor([pad(row["input_ids"], pad_id) for row in batch])}
    if "token_type_ids" in batch[0]:
        tensors["token_type_ids"] = torch.tensor([pad(row["token_type_ids"], 0) for row in batch])
    if isinstance(batch[0]["labels"], int | float):
        mask = torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch])
        return tensors | {"attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}
    after = torch.tensor([pad(row["labels"], IGNORE) for row in batch])[:, 1:]  # the first token is never predicted
    kept = (after != IGNORE).any(dim=0).nonzero().flatten()
    return tensors | {"logits_to_keep": kept, "labels": after[:, kept]}


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of every row and the number of labels behind it: shapes (n,), (n,).

    Cross-entropy; for regression, which float labels mean, the squared error.

    Args:
        logits: (n, classes) for SEQ_CLS, (n, 1) for regression, (n, kept, vocabulary) for CAUSAL_LM.
        labels: (n,) or (n, kept), as `collate` makes them.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = label_counts(labels)
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square(), counts
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none"), counts
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(labels).sum(dim=1), counts


def label_counts(labels: torch.Tensor) -> torch.Tensor:
    """The number of labels of every row (n,), where `labels` lie, which are as `collate` makes them."""
    return torch.ones_like(labels, dtype=torch.long) if labels.dim() == 1 else (labels != IGNORE).sum(dim=1)


def row_scores(
    network: PreTrainedModel, encoded: Sequence[Encoded], pad_id: int, *, batch_size: int = 16
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
