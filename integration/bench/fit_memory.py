"""What a training step keeps for its backward pass, and the process's memory at its peak."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .fit_models import Variant, of_all, ours, peft
from .measure import forget_peak, memory


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """What the transformer's body keeps for its backward pass, weights aside, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    body = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    with saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = body(input_ids=ids).last_hidden_state  # kept alive, and so is what it saved
    del hidden
    return sum(kept.values())


def peak(name: str, ids: torch.Tensor, found: Any) -> None:
    """In a fresh process: the highest memory of two steps, above that before the first."""
    variant = Variant({"ours": ours, "peft": peft}[name](torch.float32), of_all(ids))
    forget_peak()  # of loading
    before = memory("VmRSS")
    for _ in range(2):
        variant.step()
    found.put(memory("VmHWM") - before)


def peaks(ids: torch.Tensor) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in ("ours", "peft"):
        queue = context.Queue()
        child = context.Process(target=peak, args=(name, ids, queue))
        child.start()
        found[name] = queue.get()
        child.join()
    return found
