"""The subspaces of a gradient sum, and how much of a gradient lies in a pair of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from ..distributed import all_gather_by_name
from ..layers.exact import exact_products

EXACT_UP_TO = 1024  # below this size the exact SVD costs no more than the randomized one
OVERSAMPLE = 16  # extra columns of the randomized SVD, cut afterwards: the last wanted directions come out better
POWER_ITERATIONS = 10  # as in the authors' code


def reduced(gradient: torch.Tensor, reduction: str) -> torch.Tensor:
    """The matrix whose subspaces are taken: `sign(G)`, AdamW's first step, or `G` itself."""
    return gradient.sign() if reduction == "sign" else gradient


def svd_device(model_device: torch.device) -> torch.device:
    """Where decompositions of a model's gradients are computed: on its CUDA device, else on the CPU."""
    return model_device if model_device.type == "cuda" else torch.device("cpu")


@exact_products()
def truncated_svd(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular triplets of `matrix` (m, n): U (m, r), S (r,) descending, Vh (r, n).

    Exact where that is as cheap, else randomized with its own seed; the global RNG is untouched. Signs are fixed:
    the largest entry of each column of U is positive.
    """
    width = rank + OVERSAMPLE
    if min(matrix.shape) <= max(EXACT_UP_TO, 2 * width):
        U, S, Vh = _exact_svd(matrix, rank)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.default_generator.manual_seed(seed)
            if matrix.is_cuda:
                with torch.cuda.device(matrix.device):  # the generator is the current device's
                    torch.cuda.manual_seed(seed)
            U, S, V = torch.svd_lowrank(matrix, width, POWER_ITERATIONS)
            Vh = V.T
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    return U * signs, S, Vh * signs.T


def _exact_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the eigenvectors of the smaller Gram matrix, in float64: two to three times as fast as an SVD, and for an
    fp32 matrix as exact."""
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = _exact_svd(matrix.T, rank)
        return Uh.T, S, V.T
    double = matrix.double()
    squares, vectors = torch.linalg.eigh(double @ double.T)
    U, S = vectors[:, -rank:].flip(1), squares[-rank:].flip(0).clamp(min=0).sqrt()
    # The columns of GᵀU are orthogonal, of lengths S. QR gives their directions, and some where S is zero.
    V, triangle = torch.linalg.qr(double.T @ U)
    V = torch.where(triangle.diagonal() < 0, -V, V)
    return U.to(matrix.dtype), S.to(matrix.dtype), V.T.to(matrix.dtype)


class CaptureRatios:
    """Capture ratios ‖Bᵀ·g·Aᵀ‖_F / ‖g‖_F of a gradient g, gathered module by module, in whatever order.

    Attributes:
        modules: module name → way → ratio. Among the ways is `random`: the expected ratio of a random basis of
            the same rank, r/√(out·in). A module without gradient has no ratio and is left out.
    """

    def __init__(self) -> None:
        self.modules: dict[str, dict[str, float]] = {}
        self._squares: dict[str, dict[str, float]] = {}  # of the parts by way, and under "" of all of g

    @exact_products()
    def add(self, name: str, g: torch.Tensor, **ways: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Measure g (out, in) of module `name` in each of `ways`: a pair B (out, r), A (r, in)."""
        energy = float(g.square().sum())
        if energy == 0:
            return
        kept = {way: float((B.to(g).T @ g @ A.to(g).T).square().sum()) for way, (B, A) in ways.items()}
        rank = next(iter(ways.values()))[1].shape[0]
        kept["random"] = energy * rank**2 / g.numel()
        self.modules[name] = {way: math.sqrt(square / energy) for way, square in kept.items()}
        self._squares[name] = kept | {"": energy}

    def overall(self) -> dict[str, float]:
        """Way → ratio over all modules together (of summed squares)."""
        ways = next(iter(self.modules.values()), {})
        sums = {way: math.fsum(squares[way] for squares in self._squares.values()) for way in (*ways, "")}
        return {way: math.sqrt(sums[way] / sums[""]) for way in ways}

    def gather(self) -> None:
        """Take in what the other processes have measured, each of modules of its own."""
        self.modules, self._squares = all_gather_by_name(self.modules), all_gather_by_name(self._squares)


def to_four_digits(ratios: dict[str, float]) -> dict[str, float]:
    """Ratios as they are recorded."""
    return {way: round(ratio, 4) for way, ratio in ratios.items()}


def by_module(modules: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Way → the spread of its ratios over the modules."""
    ways = next(iter(modules.values()))
    return {way: spread([ratios[way] for ratios in modules.values()]) for way in ways}


def spread(values: Collection[float]) -> dict[str, float]:
    """Mean, least and greatest, to four digits; nothing of nothing."""
    if not values:
        return {}
    return to_four_digits({"mean": sum(values) / len(values), "min": min(values), "max": max(values)})
