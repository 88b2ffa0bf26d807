"""A basis for which no data is needed: B and A orthonormal and drawn at random."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..base.products import shape_of
from ..layers.factors import BlockBasis, Factors, ModuleBasis
from ..settings import BLOCK


def random_factors(
    targets: Mapping[str, torch.nn.Module], rank: int, seed: int, dtype: torch.dtype, directions: str
) -> dict[str, Factors]:
    """Module → B (out, r) and A (r, in), and S = 0, so that R0 = 0 and training starts at W0.

    Args:
        directions: RANDOM, the Q of normal numbers; or BLOCK, the unit vectors of a block of W.
    """
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, Factors] = {}
    for name, module in targets.items():
        rows, columns = shape_of(module)
        if directions == BLOCK:
            modules[name] = BlockBasis((rows, columns), *(_span(n, rank, generator) for n in (rows, columns)))
        else:
            B, A = (_orthonormal(n, rank, generator) for n in (rows, columns))
            modules[name] = ModuleBasis(B.to(dtype), A.T.to(dtype).contiguous(), torch.zeros(rank, dtype=torch.float32))
    return modules


def _orthonormal(n: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float32))[0]


def _span(n: int, rank: int, generator: torch.Generator) -> slice:
    start = rank * int(torch.randint(n // rank, (), generator=generator))
    return slice(start, start + rank)
