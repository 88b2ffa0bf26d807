"""The head of a sequence classifier, which is trained beside R."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..base.structure import body_of
from ..errors import ArtifactError
from .inject import Live


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a sequence classifier's head: all that lie outside its body."""
    body = f"{body_of(model)}."
    return {name: p for name, p in model.named_parameters() if not name.startswith(body)}


@contextmanager
def head_kept(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Afterwards the head's parameters of these names have what they had before, whatever head was put on the model."""
    kept = {parameter: parameter.data for name, parameter in head_parameters(model).items() if name in names}
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def train_head(model: nn.Module) -> Live:
    """A sequence classifier's `head_parameters`, made trainable, and cast to fp32 where narrower, as R is."""
    places = {
        name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in head_parameters(model)
    }
    for module in dict.fromkeys(module for module, _ in places.values()):
        _widen(module)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    return Live(places)


def labels_of(config: Any) -> dict[str, Any]:
    """What `Adapter.training` says of the labels of a classifier with this config: their names, or 0, 1, …"""
    if config.num_labels == 1:
        return {"labels": [], "regression": True}
    names = [config.id2label[i] for i in range(config.num_labels)]
    unnamed = names == [f"LABEL_{i}" for i in range(len(names))]  # as transformers does: rows have numbers
    return {"labels": list(range(len(names))) if unnamed else names}


def _widen(module: nn.Module) -> None:
    """Make parameters narrower than fp32 that, and what comes into the module with them."""
    narrow = [p for p in module.parameters(recurse=False) if p.dtype != torch.promote_types(p.dtype, torch.float32)]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow and _widened not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_widened)


def _widened(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def load_head(model: nn.Module, head: Mapping[str, torch.Tensor]) -> None:
    """Put copies of a trained head on `model`, in fp32 where it was narrower: it is what was trained, and validated.

    Raises ArtifactError when a name or shape does not fit.
    """
    parameters = head_parameters(model) if head else {}
    for name, tensor in head.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            what = f"the model has no head parameter {name} of shape {list(tensor.shape)}"
            raise ArtifactError(what, fix="Load the base with the adapter's number of labels")
        _widen(model.get_submodule(name.rpartition(".")[0]))
        parameters[name].data = tensor.detach().to(parameters[name].device, parameters[name].dtype, copy=True)
