"""Does what was made from a base and an adapter answer as they do? Logits of the same rows, and how close they are."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapter import Adapter
from ..base.model import BaseModel
from ..data.encoding import encode_split
from ..data.source import TaskSource
from ..data.task import TaskData, load_task
from ..errors import ArtifactError, DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Inputs = Mapping[str, torch.Tensor]  # of a model: (rows, tokens) each
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "On 24 November 2026 the order of 12 blue chairs was shipped to Utrecht.",
)
_ROWS, _TOKENS = 4, 256  # of the task, and of each row
_WHOLE = 1 << 20  # tokens: no row is left out for its length
# Relative to the largest logit. bf16 keeps 8 bits of every weight, fp16 keeps 11; fp32 is limited by the
# order of summation.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-2, "BF16": 1.5e-1}


def rows_of(base: BaseModel, adapter: Adapter) -> tuple[Inputs, int]:
    """What the model is given, and how many rows are the task's."""
    tokenizer = base.tokenizer
    task = _task(adapter)
    if task is None:
        return tokenizer(list(_TEXTS), return_tensors="pt", padding=True), 0
    split = task.held_out() if task.has_held_out else "train"
    encoded = encode_split(base, task, split, adapter.labels, _WHOLE, limit=_ROWS)
    ends = (base.config.get(key) for key in ("max_position_embeddings", "n_positions"))
    most = min([_TOKENS, *filter(None, ends)])  # learned positions may end before
    inputs = [{key: row[key][:most] for key in tokenizer.model_input_names if key in row} for row in encoded]
    return tokenizer.pad(inputs, return_tensors="pt"), len(inputs)


def _task(adapter: Adapter) -> TaskData | None:
    """The task it was trained on, where that is still there and what it was."""
    source = Path(adapter.training.get("data") or "")
    if not (source.is_absolute() and source.exists()):
        return None
    try:
        task = load_task(source.name, TaskSource.of(str(source), adapter.training.get("data_read") or {}))
    except (DataError, SettingsError) as error:
        logger.info("built-in text is used to compare logits: %s", error)
        return None
    return task if task.sha256 == adapter.training.get("data_sha256") else None


def logits_of(network: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """Logits at real tokens, on the CPU: (tokens, vocabulary), or (rows, classes)."""
    with torch.inference_mode():
        logits: torch.Tensor = network(**inputs).logits.float().cpu()
    return logits[inputs["attention_mask"].bool().cpu()] if logits.dim() == 3 else logits


def require_close(
    expected: torch.Tensor, found: torch.Tensor, tolerance: float, whose: str, where: Path, fix: str
) -> dict[str, float]:
    """`max_difference`, `relative_difference` (to the largest logit that was expected) and the `tolerance` for that.

    Raises:
        ArtifactError: the relative difference exceeds the tolerance.
    """
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    relative = difference / largest if largest else math.inf if difference else 0.0
    if not relative <= tolerance:  # nor NaN
        what = f"{whose} differ by {relative:.1e} of the largest, more than {tolerance:.0e}"
        raise ArtifactError(what, where=where, fix=fix)
    return {"max_difference": difference, "relative_difference": relative, "tolerance": tolerance}
