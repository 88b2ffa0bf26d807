"""Does a merged folder answer as base + adapter does?

Both are run from the disk, one module's weights in memory at a time, so that it can be asked of a model that does not
fit in memory; only where checkpoint or model do not allow that (`streamed`), the whole model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..base.device import where_there_is_room
from ..base.model import BaseModel
from ..base.streamed import streamed_model, was_read
from ..evaluation.logits import TOLERANCE, Inputs, logits_of, require_close, rows_of
from ..layers.exact import exact_products
from ..out_of_memory import is_out_of_memory
from .rounding import Rounding

logger = logging.getLogger(__name__)

Logits = tuple[torch.Tensor, torch.Tensor]  # of base + adapters, and of what was merged


@exact_products()
def compare_logits(base: BaseModel, adapters: Sequence[Adapter], merged: Path, rounding: Rounding) -> dict[str, Any]:
    """Compare logits of base + adapters with those of `merged`, both computed in fp32; the base's after `rounding`.

    On the first rows of the first one's task where they still lie where `fit` read them, else on built-in text.

    Returns:
        `max_difference`, `relative_difference` (to the largest logit), the `tolerance` it was held to, `rows` of the
        task it was measured on (0: built-in text), and whether the weights stayed on the disk (`streamed`).

    Raises:
        ArtifactError: the relative difference exceeds the tolerance of the coarsest dtype of the adapted weights.
    """
    adapter = adapters[0]
    batch, rows = rows_of(base, adapter)
    merged_base = BaseModel.resolve(merged)
    inputs = base, merged_base, adapters, batch, rounding
    (expected, found), streamed = where_there_is_room(lambda device: _on(device, *inputs), "compare logits")
    modules = {name for one in adapters for name in one.R}
    tolerance = max(TOLERANCE[merged_base.tensors[merged_base.weight_key(name)][1].dtype] for name in modules)
    fix = "Nothing was written; merge with --dtype float32, or serve the adapter unmerged"
    close = require_close(expected, found, tolerance, "the merged logits", merged, fix)
    return {**close, "rows": rows, "streamed": streamed}


def _on(
    device: torch.device,
    base: BaseModel,
    merged: BaseModel,
    adapters: Sequence[Adapter],
    batch: Inputs,
    rounding: Rounding,
) -> tuple[Logits, bool]:
    """The logits, and whether the weights stayed on the disk."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    if streamed := _streamed(base, merged, adapters, inputs, rounding):
        return streamed, True
    return _whole(base, merged, adapters, inputs, rounding), False


def _streamed(
    base: BaseModel, merged: BaseModel, adapters: Sequence[Adapter], inputs: Inputs, rounding: Rounding
) -> Logits | None:
    """With the weights on the disk; None of a model that this is not possible with."""
    first, device = adapters[0], inputs["input_ids"].device
    options: dict[str, Any] = {"num_labels": first.num_labels, "head": first.head, "read": rounding.read}
    unmerged = streamed_model(base, first.task_type, device=device, **options)
    network = streamed_model(merged, first.task_type, device=device)
    if unmerged is None or network is None:
        return None
    add_updates(unmerged, adapters)
    try:
        logits = logits_of(unmerged, inputs), logits_of(network, inputs)
    except RuntimeError as error:
        if is_out_of_memory(error) or type(error) not in (RuntimeError, NotImplementedError):  # the device's
            raise
        return None  # a weight is not there, which a layer has read itself
    return logits if was_read(unmerged) and was_read(network) else None


def add_updates(network: torch.nn.Module, adapters: Sequence[Adapter]) -> None:
    """Let every module return s·B·R·A·x more, for each of `adapters`; their factors are read when needed."""
    for adapter in adapters:
        for name in adapter.R:
            network.get_submodule(name).register_forward_hook(_adding(adapter, name))


def _adding(adapter: Adapter, name: str) -> Any:
    def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        sBR, A = (factor.to(output.device) for factor in adapter.as_lora(name))
        return output + (args[0] @ A.T) @ sBR.T

    return add


def _whole(
    base: BaseModel, merged: BaseModel, adapters: Sequence[Adapter], inputs: Inputs, rounding: Rounding
) -> Logits:
    from ..base.products import weight_of
    from ..layers.head import load_head  # only now: Conv1D brings torch.distributed.tensor

    logger.info("the model cannot be run with its weights on the disk: it is loaded whole to compare logits")
    first, device = adapters[0], inputs["input_ids"].device
    network = base.load(first.task_type, dtype="float32", device=device, num_labels=first.num_labels)
    load_head(network, first.head)
    for name, parameter in network.named_parameters():
        if (source := base.tensors.get(base.tensor_key(name) or "")) and source in rounding.sources:
            parameter.data.copy_(rounding.read(*source))
    for adapter in adapters:
        for name in adapter.R:
            weight, (sBR, A) = weight_of(network.get_submodule(name)), adapter.as_lora(name)
            weight.data.addmm_(sBR.to(weight), A.to(weight))
    expected = logits_of(network, inputs)
    del network
    return expected, logits_of(merged.load(first.task_type, dtype="float32", device=device), inputs)
