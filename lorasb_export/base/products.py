"""Linear layers and their products: in float32, and rounded once, where a CPU cannot multiply numbers of 16 bits.

torch imitates such products there, number by number, which takes ten to twenty times as long. The weights stay in 16
bits, or packed in four: they are cast for every product, in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from .device import cpu_multiplies
from .nf4 import dequantize, dtype_of, is_packed, state_of

_ALIKE = ("FalconLinear", "Linear4bit")  # have a forward of their own, which computes the same
_FEW = 4  # rows below that are multiplied as vectors, which torch does well in any dtype
_PIECE = 1 << 20  # numbers of a weight: to allocate all of a head anew takes longer than to multiply by it


def is_linear(module: nn.Module) -> bool:
    """Whether it computes what Linear and Conv1D do: of their subclasses some route tokens to experts (PhiMoE).

    One whose weight is packed is counted: `state_of` refuses it, and nobody passes it over.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    kind = type(module)
    alike = kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in _ALIKE
    return alike or is_packed(module.weight) or isinstance(module, InFloat32)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or Conv1D."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)  # type: ignore[return-value]


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a Linear or Conv1D as (out, in); a view, Conv1D stores it transposed. A packed one as it is."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype x (…, n) is to be multiplied by a weight, for a result to be rounded to its own.

    A graph that is being recorded, to be compiled or exported, is of the numbers as they are.
    """
    if not _runs_on_cpu(x) or cpu_multiplies(x.dtype) or x.numel() < _FEW * x.shape[-1]:
        return x.dtype
    return torch.float32


def _runs_on_cpu(x: torch.Tensor) -> bool:
    """Whether what is done with x is done here and now, and not recorded."""
    if x.device.type != "cpu":
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + bias (tokens, out), of x (tokens, in) and W (out, in) of any dtype; computed in x's."""
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype == x.dtype or not _runs_on_cpu(x):
        return linear(x, weight.to(x.dtype), bias)
    y = x.new_empty(len(x), len(weight))
    for part in _pieces(weight):
        y[:, part] = linear(x, weight[part].to(x.dtype), None if bias is None else bias[part])
    return y


def product_of_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad·W (tokens, in), of grad (tokens, out) and W (out, in) of any dtype; computed in grad's."""
    if weight.dtype == grad.dtype or not _runs_on_cpu(grad):
        return grad @ weight.to(grad.dtype)
    total = grad.new_zeros(len(grad), weight.shape[1])
    for part in _pieces(weight):
        total.addmm_(grad[:, part], weight[part].to(grad.dtype))
    return total


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    rows = max(_PIECE // weight.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def in_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that autocast has products in, where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Products within are computed in the dtypes that they are given."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Product(torch.autograd.Function):
    """x·Wᵀ + bias in `compute_dtype`, which saves no copy of the weight.

    It is (tokens, out): given the shape of x in here it would be a view, which a model could not change in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        keep: Callable[[torch.Tensor], None] | None,
        _: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if keep or ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.dtype, ctx.state, ctx.keep = x.shape, compute_dtype(x), state_of(weight), keep
        with without_autocast(x.device.type):
            flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            return product(flat, dequantize(weight, ctx.state), bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(ctx.dtype)  # torch rounds what is returned to the inputs' dtypes
        to_x, _, to_bias, *_ = ctx.needs_input_grad
        with without_autocast(grad.device.type):
            of_weight = None if x is None else grad.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            if ctx.keep:
                ctx.keep(of_weight)
                of_weight = None  # freed before the next product
            return (
                product_of_gradient(grad, dequantize(weight, ctx.state)).view(ctx.shape) if to_x else None,
                of_weight,
                grad.sum(0) if to_bias else None,
                None,
                None,
            )


def apply_linear(
    module: nn.Module,
    x: torch.Tensor,
    keep: Callable[[torch.Tensor], None] | None = None,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a Linear or Conv1D makes of x (…, in), as `compute_dtype` has it, whatever its class would.

    Args:
        keep: of a packed weight; is given its gradient (out, in) in the backward pass.
        wanted: a tensor that asks for gradients, where x may not: for `keep` to be called all the same.
    """
    y: torch.Tensor = _Product.apply(x, weight_of(module), module.bias, keep, wanted)
    return y.view(*x.shape[:-1], y.shape[-1])


# The class of a linear layer is changed and not its `forward`, which would hold the layer in a cycle.
if TYPE_CHECKING:
    _Base = nn.Linear
else:
    _Base = object


class InFloat32(_Base):
    """What is put before the class of a linear layer in 16 bits, or in four."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = in_autocast(x)
        if compute_dtype(x) == x.dtype or not (is_packed(self.weight) or self.weight.dtype == x.dtype):
            return super().forward(x)
        return apply_linear(self, x)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Its class has no name by which pickle would find it."""
        return _blank, (type(self).__bases__[1],), self.__getstate__()


@cache
def _in_float32(kind: Any) -> Any:
    return type(f"{kind.__name__}InFloat32", (InFloat32, kind), {})


def _blank(kind: Any) -> Any:
    made = _in_float32(kind)
    return made.__new__(made)


def compute_in_float32(network: nn.Module) -> None:
    """Have the linear layers of a network in 16 bits that lies on such a CPU, and torch's attention, computed so.

    Layers that accelerate's hooks have given another `forward` are left as they are.
    """
    found = False
    for module in network.modules():
        kind: Any = type(module)
        if not is_linear(module) or issubclass(kind, InFloat32) or "forward" in vars(module):
            continue
        weight = weight_of(module)
        if weight.device.type == "cpu" and not cpu_multiplies(dtype_of(weight)):
            found = True
            module.__class__ = _in_float32(kind)
    if found:
        from .attention import attend_in_float32

        attend_in_float32()
