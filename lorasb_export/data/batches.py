"""Encoded rows → padded batches, the loss of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .encoding import IGNORE, Encoded


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
