"""Does a merged folder answer as base + adapter does?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .artifact import Adapter
from .base import BaseModel
from .errors import ArtifactError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "On 24 November 2026 the order of 12 blue chairs was shipped to Utrecht.",
)
# Relative to the largest logit. bf16 keeps 8 bits of every weight, fp16 keeps 11; fp32 is limited by the
# order of summation.
_TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-2, "BF16": 1.5e-1}


def compare_logits(base: BaseModel, adapter: Adapter, merged: Path) -> dict[str, float]:
    """Compare logits of base + adapter with those of `merged` on built-in text, both computed in fp32.

    Returns:
        `max_difference`, `relative_difference` (to the largest logit), and the `tolerance` it was held to.

    Raises:
        ArtifactError: the relative difference exceeds the tolerance of the dtype the weights are stored in.
    """
    tokenizer = base.load_tokenizer()
    batch = tokenizer(list(_TEXTS), return_tensors="pt", padding=True)
    network = base.load(adapter.task_type, dtype="float32", num_labels=adapter.num_labels)
    adapter.inject(network)
    expected = _logits(network, batch)
    merged_base = BaseModel.resolve(merged)
    found = _logits(merged_base.load(adapter.task_type, dtype="float32"), batch)
    stored = merged_base.tensors[merged_base.weight_key(next(iter(adapter.R)))][1].dtype
    difference = float((expected - found).abs().max())
    relative = difference / float(expected.abs().max())
    if relative > _TOLERANCE[stored]:
        raise ArtifactError(
            f"the merged logits differ by {relative:.1e} of the largest, more than {_TOLERANCE[stored]:.0e}",
            where=merged,
            fix="Nothing was written; merge with --dtype float32, or serve the adapter unmerged",
        )
    return {"max_difference": difference, "relative_difference": relative, "tolerance": _TOLERANCE[stored]}


def _logits(network: PreTrainedModel, batch: BatchEncoding) -> torch.Tensor:
    """Logits at real tokens: (tokens, vocabulary), or (rows, classes)."""
    with torch.inference_mode():
        logits: torch.Tensor = network(**batch.to(network.device)).logits.float().cpu()
    return logits[batch["attention_mask"].cpu().bool()] if logits.dim() == 3 else logits
