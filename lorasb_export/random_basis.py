"""A basis for which no data is needed: B and A orthonormal and drawn at random."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .format import ModuleBasis
from .layer import weight_of
from .settings import BLOCK, RANDOM


def random_factors(
    targets: Mapping[str, torch.nn.Module], rank: int, seed: int, dtype: torch.dtype, directions: str = RANDOM
) -> dict[str, ModuleBasis]:
    """Module → B (out, r) and A (r, in), and S = 0, so that R0 = 0 and training starts at W0.

    Args:
        directions: RANDOM, the Q of normal numbers; or BLOCK, the unit vectors of a block of W.
    """
    draw = _units if directions == BLOCK else _orthonormal
    generator, modules = torch.Generator().manual_seed(seed), {}
    for name, module in targets.items():
        B, A = (draw(n, rank, generator) for n in weight_of(module).shape)
        modules[name] = ModuleBasis(B.to(dtype), A.T.to(dtype).contiguous(), torch.zeros(rank))
    return modules


def _orthonormal(n: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, rank, generator=generator))[0]


def _units(n: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    start = rank * int(torch.randint(n // rank, (), generator=generator))
    factor = torch.zeros(n, rank)
    factor[start : start + rank] = torch.eye(rank)
    return factor
