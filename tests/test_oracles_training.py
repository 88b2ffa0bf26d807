"""The theorems about training (arXiv 2411.19557, section 3 and appendix), on the layer itself. float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorasb_export.calibration.subspace import truncated_svd
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.layers.layer import LoRASBLinear
from tests.tiny import update_of

OUT, IN, RANK, ROWS = 48, 40, 6, 64


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


class Problem:
    """A linear regression with one adapted layer: the loss, and the full gradient at the merged weight."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.y = draw(ROWS, IN), draw(ROWS, OUT)
        self.base = nn.Linear(IN, OUT, bias=False, dtype=torch.float64).requires_grad_(False)
        self.base.weight.copy_(draw(OUT, IN) / IN**0.5)
        self.factors = ModuleBasis(
            orthonormal(OUT, RANK, seed + 1), orthonormal(IN, RANK, seed + 2).T, torch.ones(RANK)
        )
        self.R = draw(RANK, RANK) / RANK

    def layer(
        self, scaling: float = 1.0, factors: ModuleBasis | None = None, R: torch.Tensor | None = None
    ) -> LoRASBLinear:
        return LoRASBLinear(self.base, factors or self.factors, self.R if R is None else R, scaling)

    def loss(self, layer: LoRASBLinear) -> torch.Tensor:
        return (layer(self.x) - self.y).square().mean()

    def full_gradient(self, delta: torch.Tensor) -> torch.Tensor:
        W = (self.base.weight + delta).detach().requires_grad_(True)
        (nn.functional.linear(self.x, W) - self.y).square().mean().backward()
        assert W.grad is not None
        return W.grad

    def run(self, layer: LoRASBLinear, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
        """Train; returns ΔW afterwards."""
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(layer).backward()
            optimizer.step()
        return update_of(layer).detach()


@pytest.fixture
def problem() -> Problem:
    return Problem()


def R_gradient(problem: Problem, layer: LoRASBLinear) -> torch.Tensor:
    layer.R.grad = None
    problem.loss(layer).backward()
    assert layer.R.grad is not None
    return layer.R.grad


def test_oracle_6_equivalent_gradient_is_the_projection(problem: Problem) -> None:
    """With s = 1, B·(∂L/∂R)·A = P_B g P_A, and projecting again changes nothing."""
    layer = problem.layer()
    g = problem.full_gradient(update_of(layer))
    P_B, P_A = layer.B @ layer.B.T, layer.A.T @ layer.A
    equivalent = layer.B @ R_gradient(problem, layer) @ layer.A
    assert torch.allclose(equivalent, P_B @ g @ P_A, atol=1e-12)
    assert torch.allclose(P_B @ equivalent @ P_A, equivalent, atol=1e-12)


def test_oracle_7_theorem_5_scaling(problem: Problem) -> None:
    """At the same ΔW, the equivalent gradient with 1/s² does not depend on s; the raw one scales as s²."""
    optimal, raw = [], []
    for s in (0.1, 7.0):
        layer = problem.layer(s, R=problem.R / s)
        g_R = R_gradient(problem, layer)
        raw.append(s * layer.B @ g_R @ layer.A)
        optimal.append(raw[-1] / s**2)
    assert torch.allclose(optimal[0], optimal[1], atol=1e-12)
    assert torch.allclose(raw[1] / raw[0], torch.full_like(raw[0], 70.0**2), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "power"),
    [(lambda p, rate: torch.optim.SGD(p, lr=rate), 2), (lambda p, rate: torch.optim.Adam(p, lr=rate, eps=1e-16), 1)],
    ids=["sgd", "adam"],
)
def test_oracle_8_training_is_blind_to_s_at_the_scaled_rate(
    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer], power: int, problem: Problem
) -> None:
    """SGD with lr/s² and Adam with lr/s end at the same ΔW for every s; without, one step scales as s² and s."""
    ends, moved = [], []
    for s in (1.0, 3.0):
        layer = problem.layer(s, R=problem.R / s)
        ends.append(problem.run(layer, make([layer.R], 0.01 / s**power), 30))
        plain = problem.layer(s, R=problem.R / s)
        before = update_of(plain).detach()
        moved.append(problem.run(plain, make([plain.R], 0.01), 1) - before)
    assert torch.allclose(ends[0], ends[1], atol=1e-7)
    assert torch.allclose(moved[1], moved[0] * 3.0**power, atol=1e-9)


def test_oracle_9_theorem_4_first_order_decrease(problem: Problem) -> None:
    """ΔL / (-η‖∂L/∂R‖²) → 1, and its deviation shrinks in proportion to η."""
    deviations = []
    for eta in (1e-2, 1e-3, 1e-4):
        layer = problem.layer()
        g_R = R_gradient(problem, layer)
        before = problem.loss(layer).detach()
        layer.R.data -= eta * g_R
        change = problem.loss(layer).detach() - before
        assert change < 0
        deviations.append(abs(float(change / (-eta * g_R.square().sum())) - 1))
    assert deviations[0] / deviations[1] == pytest.approx(10, rel=0.05)
    assert deviations[1] / deviations[2] == pytest.approx(10, rel=0.05)


def test_oracle_10_theorem_6_one_sgd_step_is_the_best_rank_r_step(problem: Problem) -> None:
    """Basis from the raw gradient, R = 0, one SGD step: ΔW = trunc_r(-η·g)."""
    eta, g = 0.05, problem.full_gradient(torch.zeros(OUT, IN, dtype=torch.float64))
    U, S, Vh = truncated_svd(-eta * g, RANK, seed=0)
    layer = problem.layer(factors=ModuleBasis(U, Vh, S), R=torch.zeros(RANK, RANK))
    delta = problem.run(layer, torch.optim.SGD([layer.R], lr=eta), 1)
    assert torch.allclose(delta, U * S @ Vh, atol=1e-12)


def test_oracle_10_raw_basis_beats_sign_basis_beats_random_on_the_gradient() -> None:
    """What is left of ‖g‖ after projection, in the metric in which the raw basis is optimal by construction."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(48, 10, generator=generator), torch.randn(10, 40, generator=generator)
    g = left @ right + torch.randn(48, 40, generator=generator)

    def remaining(U: torch.Tensor, Vh: torch.Tensor) -> float:
        return float((g - U @ (U.T @ g @ Vh.T) @ Vh).norm() / g.norm())

    raw = remaining(*truncated_svd(g, RANK, seed=0)[::2])
    sign = remaining(*truncated_svd(g.sign(), RANK, seed=0)[::2])
    random = remaining(orthonormal(48, RANK, 1).float(), orthonormal(40, RANK, 2).T.float())
    assert raw < sign < random


def test_oracle_12_gauge(problem: Problem) -> None:
    """(BQ, QᵀRP, PᵀA) is the same ΔW. SGD's path does not depend on the gauge, Adam's does."""
    Q, P = orthonormal(RANK, RANK, 5), orthonormal(RANK, RANK, 6)
    factors = problem.factors
    turned = ModuleBasis(factors.B @ Q, P.T @ factors.A, factors.S)
    R = Q.T @ problem.R @ P
    assert torch.allclose(update_of(problem.layer(factors=turned, R=R)), update_of(problem.layer()), atol=1e-12)
    differences = []
    for make in (torch.optim.SGD, torch.optim.Adam):
        plain, rotated = problem.layer(), problem.layer(factors=turned, R=R)
        ends = [problem.run(layer, make([layer.R], lr=0.01), 30) for layer in (plain, rotated)]
        differences.append(float((ends[0] - ends[1]).norm()))
    assert differences[0] < 1e-12
    assert differences[1] > 1e-3


def test_oracle_17_averaging_R_averages_the_updates(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(RANK, RANK, generator=generator, dtype=torch.float64) for _ in range(5)]
    mean_of_updates = sum(update_of(problem.layer(R=R)) for R in matrices) / 5
    assert torch.allclose(update_of(problem.layer(R=sum(matrices) / 5)), mean_of_updates, atol=1e-12)


def test_oracle_26_energy_of_a_sign_matrix() -> None:
    """The top 64 of 512 directions of a random sign matrix hold 38 % of its energy; of a low-rank one's, far more."""
    generator = torch.Generator().manual_seed(0)

    def energy(matrix: torch.Tensor) -> float:
        S = truncated_svd(matrix.sign(), 64, seed=0)[1]
        return float(S.square().sum() / matrix.numel())

    assert energy(torch.randn(512, 512, generator=generator)) == pytest.approx(0.38, abs=0.02)
    low = torch.randn(512, 16, generator=generator) @ torch.randn(16, 512, generator=generator)
    assert energy(low) > 0.68
