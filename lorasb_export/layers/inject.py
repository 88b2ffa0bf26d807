"""The layers of an adapter put on a model, and taken off; what it may not carry beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..base.nf4 import keep_layout, state_of
from ..base.products import compute_in_float32, is_linear, shape_of, weight_of
from ..errors import ArtifactError, BaseModelError, SettingsError
from .factors import Factors
from .layer import LoRASBLinear, Route


class Live(Mapping[str, nn.Parameter]):
    """name → the parameter that is on the model now: FSDP2 puts another one in the place of the one it shards."""

    def __init__(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        """`places`: name → module, and what it calls the parameter."""
        self._places = places

    def module(self, name: str) -> nn.Module:
        """The one that holds the parameter."""
        return self._places[name][0]

    def __getitem__(self, name: str) -> nn.Parameter:
        module, leaf = self._places[name]
        parameter: nn.Parameter = getattr(module, leaf)
        return parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def inject(
    model: nn.Module,
    factors: Mapping[str, Factors],
    R: Mapping[str, torch.Tensor],
    scaling: float,
    route: Route | None = None,
) -> Live:
    """Wrap each named module of `model`; every parameter but the R is frozen. An adapter already there is replaced.

    Args:
        R: module name → (r, r), or (k, r, r) with a `route`.

    Returns:
        module name → its live R parameter.

    Raises:
        ArtifactError: the model lacks a module, or its shape differs from the basis's.
        BaseModelError: it carries PEFT layers; a module is neither Linear nor Conv1D, quantized (but for nf4),
            offloaded, or sharded.
    """
    remove(model)
    refuse_peft(model)
    found, fix = dict(model.named_modules()), "Use the base model of this basis"
    for name, module in factors.items():
        if name not in found:
            raise ArtifactError(f"the model has no module {name}", fix=fix)
        if not is_linear(found[name]):
            what = f"module {name} is a {type(found[name]).__name__}, not a Linear or Conv1D"
            raise BaseModelError(what, fix=fix)
        shape = shape_of(found[name])
        if shape != module.shape:
            raise ArtifactError(f"module {name} is {shape}, the basis was made for {module.shape}", fix=fix)
        weight = weight_of(found[name])
        if weight.is_meta:  # accelerate brings it in for the layer's own forward alone: ours would compute with nothing
            fix = "Load the model whole, or spread it over more GPUs"
            raise BaseModelError(f"the weight of {name} is not in memory (offloaded, or on `meta`)", fix=fix)
        if hasattr(weight, "device_mesh"):  # each process would train an R of its own
            raise BaseModelError(f"the weight of {name} is sharded already", fix="Attach first, and shard then")
        state_of(weight)
    model.requires_grad_(False)
    layers = {name: LoRASBLinear(found[name], module, R[name], scaling, route) for name, module in factors.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return Live({name: (layer, "R") for name, layer in layers.items()})


def remove(model: nn.Module) -> None:
    """Take every adapter off `model`: its modules are the base's own again, bit for bit, and stay frozen.

    A classifier's head is not put back: it stays as it was trained, and in fp32 where it was narrower. Layers in four
    bits keep their layout from then on (`nf4.keep_layout`), and those in 16 may be computed otherwise
    (`products.compute_in_float32`), which torch.func cannot differentiate.
    """
    keep_layout(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRASBLinear):
            model.set_submodule(name, module.base)
    compute_in_float32(model)


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the base; afterwards the very layers that lay on it are back, whose R may be in training."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRASBLinear)}
    remove(model)
    try:
        yield
    finally:
        remove(model)
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def refuse_rows(model: nn.Module) -> None:
    """Raise SettingsError where the adapters of a `Stack` were chosen row by row, for rows of another order."""
    routes = (module.route for module in model.modules() if isinstance(module, LoRASBLinear))
    if any(route is not None and route.rows is not None and len(route.rows) > 1 for route in routes):
        fix = "Choose one for all of them, and ask for each adapter's answers apart"
        raise SettingsError("prompts are sorted by length, and an adapter was chosen for each row", fix=fix)


def refuse_peft(model: nn.Module) -> None:
    """Raise BaseModelError when `model` carries PEFT layers: its weights, or what it computes, are not the base's."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise BaseModelError(
                "the model already carries PEFT layers",
                where=name,
                fix="Merge or unload them first, or load a plain base",
            )
