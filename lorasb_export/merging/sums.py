"""W0 + s·B·R·A for a block of rows, rounded once to the stored dtype.

Float64 does for every dtype. For bf16, whose ulp is 2¹⁶ times that of fp32, fp32 gives the same bits in all but
a few entries of 100,000, in a quarter of the time; entries so close to zero that an error of fp32 could reach an ulp of
theirs are summed again in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..layers.factors import Factors
from .direct import Buffers
from .retained import Retained

BLOCK = 1 << 19  # entries that are summed at a time: two fp32 copies and the bytes around them stay near the L2 cache


@dataclass(frozen=True)
class Update:
    """The factors of Δ as the checkpoint stores the weight: Δ = left @ right, (rows, r) @ (r, columns), float64."""

    left: torch.Tensor
    right: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor]  # both in the dtype the sum is made in: float64, or float32 with `small`
    small: int  # bit patterns of bf16 magnitudes below this are summed again; 0 for none

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[Factors, torch.Tensor, float]],
        *,
        transposed: bool,
        source: torch.dtype,
        stored: torch.dtype,
    ) -> Update:
        """Fold s·B·R: out·r² instead of out·r·in operations.

        Args:
            parts: the factors B (out, r) and A (r, in), R (r, r), and s of every update to be added.
            transposed: the checkpoint holds the weight as (in, out).
            source, stored: dtypes of the weight before and after.
        """
        # Basis and R may lie on a device; the checkpoint is on the host.
        left = torch.cat([s * (factors.B.cpu().double() @ R.detach().cpu().double()) for factors, R, s in parts], dim=1)
        right = torch.cat([factors.A.cpu().double() for factors, _, _ in parts])
        if transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        if stored != torch.bfloat16 or source == torch.float64:
            return cls(left, right, (left, right), 0)
        # Near zero an fp32 sum of r products errs by some 2⁻²⁴·√r·‖row of left‖·‖column of right‖ at most (its r + 1
        # roundings are a random walk; 4 times that is out of their reach). An ulp of bf16 at x is ≥ 2⁻⁸·|x|.
        bound = float(left.square().sum(dim=1).max() * right.square().sum(dim=0).max()) ** 0.5
        small = torch.tensor(2.0**-14 * left.shape[1] ** 0.5 * bound, dtype=torch.bfloat16)
        return cls(left, right, (left.float(), right.float()), int(small.view(torch.int16)) + 1)


_buffers = Buffers()  # kept: fresh memory for every block would cost more than the product


def add(weights: torch.Tensor, update: Update, rows: slice, out: torch.Tensor, *, measure: int) -> Retained:
    """Write the rounded sum of `weights` and rows `rows` of the update into `out`, which is other memory.

    Args:
        weights: (n, columns) as stored in the base.
        out: (n, columns) in the stored dtype.
        measure: one block of so many is measured, which is half as much work again for it.

    Returns:
        what is retained of the update, by the measured blocks; not finite when an entry overflowed `out`'s dtype.
    """
    (left, right), columns = update.factors, weights.shape[1]
    step = max(1, BLOCK // columns)
    found, rows_measured, small = Retained(), 0, []
    for first in range(0, len(weights), step):
        part = slice(first, min(first + step, len(weights)))
        start = rows.start + first
        of_update = left[start : rows.start + part.stop]
        measured = start // step % measure == 0
        found += _add_block(weights[part], of_update, right, out[part], measure=measured)
        rows_measured += measured * (part.stop - part.start)
        if not update.small:
            continue
        where = _small_entries(out[part], update.small)
        if len(where) > out[part].numel() // 64:
            of_update = update.left[start : rows.start + part.stop]
            out[part].copy_(weights[part].double().addmm_(of_update, update.right))
        else:
            small.append(where + first * columns)
    if small:
        _sum_again(weights, update, rows, out, np.concatenate(small))
    return found * (len(weights) / max(1, rows_measured))  # or a large module would count for less than a small one


def _add_block(
    weights: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, measure: bool
) -> Retained:
    total, delta, rounded = _buffers.take("sums", 3 * weights.numel(), left.dtype).view(3, *weights.shape)
    total.copy_(weights)
    if not measure:
        out.copy_(total.addmm_(left, right))
        return Retained()
    torch.mm(left, right, out=delta)
    out.copy_(total.add_(delta))
    error, changes = total.sub_(rounded.copy_(out)).view(-1), delta.view(-1)  # of the other sign
    return Retained(float(changes @ changes), float(error @ error), -float(error @ changes))


def _small_entries(out: torch.Tensor, small: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Where bf16 magnitudes lie below the one with the bits `small`, as indices into the flat block."""
    bits = out.view(-1).view(torch.int16).numpy()
    magnitudes = _buffers.take("magnitudes", len(bits), torch.int16).numpy()
    found = _buffers.take("found", len(bits), torch.bool).numpy()
    np.bitwise_and(bits, 0x7FFF, out=magnitudes)  # numpy: five times as fast as torch
    np.less(magnitudes, small, out=found)
    return np.fromiter(_ones(found.tobytes()), np.intp)


def _sum_again(
    weights: torch.Tensor,
    update: Update,
    rows: slice,
    out: torch.Tensor,
    where: np.ndarray[Any, np.dtype[np.intp]],
) -> None:
    i, j = (torch.from_numpy(index) for index in np.unravel_index(where, out.shape))
    delta = (update.left[rows][i] * update.right.T[j]).sum(dim=1)
    out[i, j] = (weights[i, j].double() + delta).to(out.dtype)


def _ones(found: bytes) -> Iterator[int]:
    """Where a byte is 1, lowest first: a tenth of the time of `flatnonzero` when there are few."""
    index = found.find(1)
    while index >= 0:
        yield index
        index = found.find(1, index + 1)
