"""A model whose weights stay on the disk: every module reads its own when it is called and forgets them afterwards.

Memory holds one module's weights in fp32 and the hidden states, so that a forward pass of any checkpoint fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files.storage import TensorInfo
from ..tensors import TORCH_DTYPES, read_tensor
from .model import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Read = Callable[[Path, TensorInfo], torch.Tensor]  # a tensor of a checkpoint


def streamed_model(
    base: BaseModel,
    task_type: str,
    *,
    device: torch.device,
    num_labels: int | None = None,
    head: Mapping[str, torch.Tensor] | None = None,
    read: Read = read_tensor,
) -> PreTrainedModel | None:
    """The model of `base`, computing in fp32 on `device`.

    Args:
        num_labels, head: of a classifier whose head the checkpoint lacks.
        read: takes a tensor from its file.

    Returns:
        None where the checkpoint does not hold the model's parameters one by one under their names: fused experts,
        renamed modules.
    """
    network = base.load_empty(task_type, num_labels=num_labels)
    sources = _sources(network, base, head or {})
    if sources is None:
        return None
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        own = {name: sources[id(p)] for name, p in module.named_parameters(recurse=False)}
        if own:
            _Reader(module, own, device, read)
    return network


def _sources(network: nn.Module, base: BaseModel, head: Mapping[str, torch.Tensor]) -> dict[int, Any] | None:
    """id of a parameter → where its values are; a tied one has several names, of which the checkpoint knows one."""
    found: dict[int, Any] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        key = base.tensor_key(name)
        if name in head:
            found[id(parameter)] = head[name]
        elif key is not None and base.tensors[key][1].dtype in TORCH_DTYPES:
            found.setdefault(id(parameter), base.tensors[key])
    whole = all(_fits(found.get(id(parameter)), parameter) for parameter in network.parameters())
    return found if whole else None


def _fits(source: Any, parameter: torch.Tensor) -> bool:
    if source is None:
        return False
    return parameter.shape == (source.shape if isinstance(source, torch.Tensor) else source[1].shape)


class _Reader:
    """Reads a module's parameters before it computes, and forgets them afterwards."""

    def __init__(self, module: nn.Module, sources: Mapping[str, Any], device: torch.device, read: Read) -> None:
        self._sources, self._device, self._read = sources, device, read
        self._empty = dict(module._parameters)
        self.was_called = False
        module.register_forward_pre_hook(self)
        module.register_forward_hook(self._forget)

    def __call__(self, module: nn.Module, _: Any) -> None:
        self.was_called = True
        for name, source in self._sources.items():
            value = source if isinstance(source, torch.Tensor) else self._read(*source)
            module._parameters[name] = nn.Parameter(value.to(self._device, torch.float32), requires_grad=False)

    def _forget(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self._empty)


def was_read(network: nn.Module) -> bool:
    """Whether a `streamed_model` that has run has read all its weights.

    Where not, what it returned says nothing: some layers (Mamba's) take the weight of another without calling it.
    """
    hooks = (hook for module in network.modules() for hook in module._forward_pre_hooks.values())
    return all(hook.was_called for hook in hooks if isinstance(hook, _Reader))
