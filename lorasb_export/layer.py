"""The one formula, y = x·W0ᵀ + bias + s·((x·Aᵀ)·Rᵀ)·Bᵀ, as a layer that trains R alone.

Shapes: x (…, in), W0 (out, in), B (out, r), R (r, r), A (r, in), y (…, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from .errors import ArtifactError, BaseModelError, SettingsError
from .factors import Factors

LINEAR_TYPES = (nn.Linear, Conv1D)
Factor = torch.Tensor | slice  # Bᵀ or A, (r, n); or the places in which it is the unit matrix, where the rest is zero


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a Linear or Conv1D as (out, in); a view, Conv1D stores it transposed."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


class Route:
    """Which R of a stack each row of the next batch goes through; shared by all layers of a model.

    Attributes:
        rows: (n,) long, an index into the stack for every row, -1 for the base alone.
    """

    rows: torch.Tensor | None = None


class _LoRASBFunction(torch.autograd.Function):
    """Saves u = x·Aᵀ (tokens, r) for the backward pass and nothing of size (tokens, in).

    R is (r, r) with `rows` None; or a stack (k, r, r), of which row i of x (n, t, in) goes through R[rows[i]].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        B: Factor,
        R: torch.Tensor,
        A: Factor,
        scaling: float,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype = x.dtype  # frozen tensors of another dtype are cast here: their casts must not be saved
        y = linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        u = _onto(x, A)
        v = u.to(R.dtype) @ _of_rows(R, rows).mT
        _add(y.view(-1, y.shape[-1]), v.to(dtype).view(-1, v.shape[-1]), _transposed(B), scaling)
        ctx.save_for_backward(u, weight, R, rows)
        ctx.B, ctx.A, ctx.scaling = B, A, scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, weight, R, rows = ctx.saved_tensors
        dtype = u.dtype
        grad = grads[0].reshape(-1, weight.shape[0])  # once: a gradient out of attention is not contiguous
        with _without_autocast(grad.device.type):
            v = (ctx.scaling * _onto(grad, _transposed(ctx.B)).to(R.dtype)).view(u.shape)
            grad_x = grad_R = None
            if ctx.needs_input_grad[4]:  # Lemma 2: dL/dR = s·Bᵀ·g·Aᵀ, with g = gradᵀ·x and u = x·Aᵀ
                grad_R = _gradient_of_R(v, u.to(R.dtype), R, rows)
            if ctx.needs_input_grad[0]:
                grad_u = (v @ _of_rows(R, rows)).to(dtype).view(-1, u.shape[-1])
                grad_x = _add(grad @ weight.to(dtype), grad_u, ctx.A).view(*u.shape[:-1], -1)
        return grad_x, None, None, None, grad_R, None, None, None


def _onto(x: torch.Tensor, factor: Factor) -> torch.Tensor:
    """x·Fᵀ (…, r), of F (r, n)."""
    if isinstance(factor, slice):
        return x[..., factor].contiguous()  # a view would keep all of x
    return linear(x, factor.to(x.dtype))


def _add(y: torch.Tensor, v: torch.Tensor, factor: Factor, scaling: float = 1.0) -> torch.Tensor:
    """y (tokens, n) += s·v·F in place, of F (r, n)."""
    if isinstance(factor, slice):
        y[:, factor].add_(v, alpha=scaling)
        return y
    return y.addmm_(v, factor.to(y.dtype), alpha=scaling)


def _transposed(factor: Factor) -> Factor:
    return factor if isinstance(factor, slice) else factor.T


def _without_autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _of_rows(R: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The matrix of every row, (n, r, r): zero for -1; R itself where there is no stack."""
    return R if rows is None else R[rows.clamp(min=0)] * (rows >= 0).to(R.dtype).view(-1, 1, 1)


def _gradient_of_R(v: torch.Tensor, u: torch.Tensor, R: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Σ over tokens of vᵀ·u; where R is a stack, for each adapter over its rows.

    By a matrix product, which unlike `index_add` adds in the same order every time.
    """
    if rows is None:
        return v.reshape(-1, v.shape[-1]).T @ u.reshape(-1, u.shape[-1])
    chosen = rows == torch.arange(len(R), device=rows.device).view(-1, 1)  # (k, n)
    return (chosen.to(R.dtype) @ (v.mT @ u).flatten(1)).view(R.shape)


class LoRASBLinear(nn.Module):
    """A frozen Linear or Conv1D with one trainable R between frozen B and A, or a stack of R (k, r, r) and a route.

    R is fp32 whatever the base's dtype (float64 under a float64 base): updates of size lr would vanish in bf16. Of a
    basis of blocks neither B nor A is held.
    """

    A: torch.Tensor
    B: torch.Tensor

    def __init__(
        self, base: nn.Module, factors: Factors, R: torch.Tensor, scaling: float, route: Route | None = None
    ) -> None:
        super().__init__()
        weight = weight_of(base)
        self.base = base
        self.scaling = scaling
        self.route = route
        self.block = factors.block
        if self.block is None:
            for name, factor in (("A", factors.A), ("B", factors.B)):
                # Detached, a tensor of its own: FSDP2 moves a buffer in place, and would move the basis with it.
                self.register_buffer(name, factor.detach().to(weight.device, weight.dtype), persistent=False)
        self.R = nn.Parameter(R.detach().to(weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.route is None or self.route.rows is None:
            return self._forward(x, None)
        rows, width = self.route.rows, x.shape[-1]
        n = len(rows)  # 1 for all rows of the batch
        if n > 1 and (len(x) != n if x.dim() > 2 else len(x) % n):
            what = f"{n} adapters were chosen, which does not fit a batch of shape {tuple(x.shape)}"
            raise SettingsError(what, fix="Choose one for each row")
        # Some models flatten (n, t, in) to (n·t, in) before a layer; one row after another all the same.
        return self._forward(x.reshape(n, -1, width), rows).view(*x.shape[:-1], -1)

    def _forward(self, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with _without_autocast(device):  # in-place products do not autocast
            B, A = self.block or (self.B, self.A)
            y: torch.Tensor = _LoRASBFunction.apply(
                x.to(dtype), weight_of(self.base), self.base.bias, B, self.R, A, self.scaling, rows
            )
        return y


class Live(Mapping[str, nn.Parameter]):
    """name → the parameter that is on the model now: FSDP2 puts another one in the place of the one it shards."""

    def __init__(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        """`places`: name → module, and what it calls the parameter."""
        self._places = places

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
        BaseModelError: the model carries PEFT layers, or a module is neither Linear nor Conv1D.
    """
    remove(model)
    refuse_peft(model)
    found, fix = dict(model.named_modules()), "Use the base model of this basis"
    for name, module in factors.items():
        if name not in found:
            raise ArtifactError(f"the model has no module {name}", fix=fix)
        if not isinstance(found[name], LINEAR_TYPES):
            what = f"module {name} is a {type(found[name]).__name__}, not a Linear or Conv1D"
            raise BaseModelError(what, fix=fix)
        shape = tuple(weight_of(found[name]).shape)
        if shape != module.shape:
            raise ArtifactError(f"module {name} is {shape}, the basis was made for {module.shape}", fix=fix)
    model.requires_grad_(False)
    layers = {}
    for name, module in factors.items():
        wrapped = LoRASBLinear(found[name], module, R[name], scaling, route)
        _replace(model, name, wrapped)
        layers[name] = wrapped
    return Live({name: (module, "R") for name, module in layers.items()})


def remove(model: nn.Module) -> None:
    """Take every adapter off `model`: its modules are the base's own again, bit for bit, and stay frozen.

    A classifier's head is not put back: it stays as it was trained, and in fp32 where it was narrower.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRASBLinear):
            _replace(model, name, module.base)


def refuse_rows(model: nn.Module) -> None:
    """Raise SettingsError where the adapters of a `Stack` were chosen row by row, for rows of another order."""
    routes = (module.route for module in model.modules() if isinstance(module, LoRASBLinear))
    if any(route is not None and route.rows is not None and len(route.rows) > 1 for route in routes):
        fix = "Choose one for all of them, and ask for each adapter's answers apart"
        raise SettingsError("prompts are sorted by length, and an adapter was chosen for each row", fix=fix)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a sequence classifier's head: all that lie outside its body (`base_model_prefix`)."""
    body = f"{model.base_model_prefix}."
    return {name: p for name, p in model.named_parameters() if not name.startswith(body)}


def train_head(model: nn.Module) -> Live:
    """A sequence classifier's `head_parameters`, made trainable, and cast to fp32 where narrower, as R is."""
    places = {
        name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in head_parameters(model)
    }
    for module in dict.fromkeys(module for module, _ in places.values()):
        narrow = [p for p in module.parameters(recurse=False) if p.dtype != torch.promote_types(p.dtype, torch.float32)]
        for parameter in narrow:
            parameter.data = parameter.data.float()
        if narrow:
            module.register_forward_pre_hook(_widened)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    return Live(places)


def _widened(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def load_head(model: nn.Module, head: Mapping[str, torch.Tensor]) -> None:
    """Copy a trained head into `model`. Raises ArtifactError when a name or shape does not fit."""
    parameters = head_parameters(model) if head else {}
    for name, tensor in head.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            what = f"the model has no head parameter {name} of shape {list(tensor.shape)}"
            raise ArtifactError(what, fix="Load the base with the adapter's number of labels")
        parameters[name].data.copy_(tensor)


def refuse_peft(model: nn.Module) -> None:
    """Raise BaseModelError when `model` carries PEFT layers: its weights, or what it computes, are not the base's."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise BaseModelError(
                "the model already carries PEFT layers",
                where=name,
                fix="Merge or unload them first, or load a plain base",
            )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
