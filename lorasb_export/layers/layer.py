"""The one formula, y = x·W0ᵀ + bias + s·((x·Aᵀ)·Rᵀ)·Bᵀ, as a layer that trains R alone.

Shapes: x (…, in), W0 (out, in), B (out, r), R (r, r), A (r, in), y (…, out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..base.nf4 import dequantize, dtype_of, state_of
from ..base.products import compute_dtype, in_autocast, product, product_of_gradient, weight_of, without_autocast
from ..errors import SettingsError
from .factors import Factors

Factor = torch.Tensor | slice  # Bᵀ or A, (r, n); or the places in which it is the unit matrix, where the rest is zero


class Route:
    """Which R of a stack each row of the next batch goes through; shared by all layers of a model.

    Attributes:
        rows: (n,) long, an index into the stack for every row, -1 for the base alone.
    """

    rows: torch.Tensor | None = None


class _LoRASBFunction(torch.autograd.Function):
    """Saves u = x·Aᵀ (tokens, r) for the backward pass and nothing of size (tokens, in).

    R is (r, r) with `rows` None; or a stack (k, r, r), of which row i of x (n, t, in) goes through R[rows[i]]. y is
    (tokens, out): given the shape of x in here it would be a view, which a model could not change in place (DeBERTa).
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
        given, dtype = x.dtype, compute_dtype(x)
        x = x.to(dtype)  # frozen tensors of another dtype are cast here: their casts must not be saved
        state = state_of(weight)
        y = product(x.reshape(-1, x.shape[-1]), dequantize(weight, state), bias)
        u = _onto(x, A)
        v = u.to(R.dtype) @ _of_rows(R, rows).mT
        _add(y, v.to(dtype).view(-1, v.shape[-1]), _transposed(B), scaling)
        ctx.save_for_backward(u, weight, R, rows)
        ctx.B, ctx.A, ctx.scaling, ctx.state, ctx.rows = B, A, scaling, state, rows
        return y.to(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, weight, R, rows = ctx.saved_tensors
        if rows is not ctx.rows and not torch.equal(rows, ctx.rows):  # saved anew, by non-reentrant checkpointing
            what = "another adapter was chosen between a forward pass and its backward pass, which computes it again"
            raise SettingsError(what, fix="With gradient checkpointing call backward before the next `use`")
        dtype = u.dtype
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(dtype)  # once: a gradient out of attention is not contiguous
        with without_autocast(grad.device.type):
            v = (ctx.scaling * _onto(grad, _transposed(ctx.B)).to(R.dtype)).view(u.shape)
            grad_x = grad_R = None
            if ctx.needs_input_grad[4]:  # Lemma 2: dL/dR = s·Bᵀ·g·Aᵀ, with g = gradᵀ·x and u = x·Aᵀ
                grad_R = _gradient_of_R(v, u.to(R.dtype), R, rows)
            if ctx.needs_input_grad[0]:
                grad_u = (v @ _of_rows(R, rows)).to(dtype).view(-1, u.shape[-1])
                of_tokens = _add(product_of_gradient(grad, dequantize(weight, ctx.state)), grad_u, ctx.A)
                grad_x = of_tokens.view(*u.shape[:-1], of_tokens.shape[-1])
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


def _of_rows(R: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The matrix of every row, (n, r, r): zero for -1; R itself where there is no stack."""
    return R if rows is None else R[rows.clamp(min=0)].masked_fill((rows < 0).view(-1, 1, 1), 0)


def _gradient_of_R(v: torch.Tensor, u: torch.Tensor, R: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Σ over tokens of vᵀ·u; where R is a stack, for each adapter over its rows.

    By a matrix product, which unlike `index_add` adds in the same order every time; but 0·NaN is NaN: what is not
    finite is put into its own adapter's sum by itself, or one that diverges would end all.
    """
    if rows is None:
        return v.reshape(-1, v.shape[-1]).T @ u.reshape(-1, u.shape[-1])
    chosen = rows == torch.arange(len(R), device=rows.device).view(-1, 1)  # (k, n)
    of_rows = (v.mT @ u).flatten(1)
    bad = ~of_rows.sum(1).isfinite()
    sums = chosen.to(R.dtype) @ of_rows.masked_fill_(bad.view(-1, 1), 0)
    return sums.masked_fill_((chosen & bad).any(1, keepdim=True), torch.nan).view(R.shape)


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
        dtype = dtype_of(weight)
        self.base = base
        self.scaling = scaling
        self.route = route
        self.block = factors.block
        if self.block is None:
            for name, factor in (("A", factors.A), ("B", factors.B)):
                # Detached, a tensor of its own: FSDP2 moves a buffer in place, and would move the basis with it.
                self.register_buffer(name, factor.detach().to(weight.device, dtype), persistent=False)
        self.R = nn.Parameter(R.detach().to(weight.device, torch.promote_types(dtype, torch.float32), copy=True))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What casts the model moves R, and its gradient, and leaves them fp32 at least."""

        def of(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            narrower = made.is_floating_point() and made.dtype.itemsize < tensor.dtype.itemsize
            if narrower and (tensor is R or tensor is grad):
                return tensor.to(made.device, torch.promote_types(made.dtype, torch.float32))
            return made

        R, grad = self.R, self.R.grad  # torch may take it off R before it asks
        return super()._apply(of, recurse)

    @property
    def weight(self) -> torch.Tensor:
        """W0 + s·B·R·A, stored as the base's is: some layers (Mamba's) read it, and do not call their projections."""
        if self.R.dim() > 2:
            what = "this model's layers read whole weights, of which every row would need another"
            raise SettingsError(what, fix="Train or use one adapter at a time, without --together")
        weight = dequantize(weight_of(self.base))
        if self.block is not None:
            update = torch.zeros_like(weight, dtype=self.R.dtype)
            update[self.block] = self.scaling * self.R
        else:
            update = self.scaling * (self.B.to(self.R.dtype) @ self.R @ self.A.to(self.R.dtype))
        changed = (weight + update).to(weight.dtype)
        return changed.T if isinstance(self.base, Conv1D) else changed

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.route is None or self.route.rows is None:
            return self._forward(x, None)
        rows, width = self.route.rows, x.shape[-1]
        n = len(rows)  # 1 for all rows of the batch
        if n > 1 and (len(x) != n if x.dim() > 2 else len(x) % n):
            what = f"{n} adapters were chosen, which does not fit a batch of shape {tuple(x.shape)}"
            raise SettingsError(what, fix="Choose one for each row")
        # Some models flatten (n, t, in) to (n·t, in) before a layer; one row after another all the same.
        y = self._forward(x.reshape(n, -1, width), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _forward(self, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        x = in_autocast(x)
        with without_autocast(x.device.type):  # in-place products do not autocast
            B, A = self.block or (self.B, self.A)
            y: torch.Tensor = _LoRASBFunction.apply(
                x, weight_of(self.base), self.base.bias, B, self.R, A, self.scaling, rows
            )
        return y.view(*x.shape[:-1], y.shape[-1])  # not -1: x may be empty, as that of an expert without tokens
