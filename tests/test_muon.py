"""Muon for R: what it does to one matrix, and that its path does not depend on which B and A span the subspaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lorasb_export.errors import SettingsError
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.layers.layer import LoRASBLinear
from lorasb_export.training.muon import Muon, groups_of, orthogonalized

r = 8


def test_all_directions_of_a_matrix_become_about_equally_long() -> None:
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(5, r, r, dtype=torch.float64))
    sigma = torch.logspace(0, -1.5, r, dtype=torch.float64)
    found = U.mT @ orthogonalized(U @ torch.diag(sigma) @ Vh) @ Vh.mT
    assert torch.allclose(found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1)), torch.zeros(()).double())
    assert ((found.diagonal(dim1=-2, dim2=-1) > 0.6) & (found.diagonal(dim1=-2, dim2=-1) < 1.3)).all()


@pytest.mark.parametrize("size", [1e-10, 1e-16, 1e-20, 1e-25, 1e-40])
def test_of_tiny_entries_no_overflow_comes(size: float) -> None:
    """A momentum without new gradients halves every fourteen steps, and its squares underflow long before it does."""
    torch.manual_seed(0)
    assert orthogonalized(size * torch.randn(2, 64, 64)).abs().max() < 1.3


def test_a_model_without_an_adapter_has_no_R_to_train() -> None:
    with pytest.raises(SettingsError, match=r"no adapter is on the model. .*Adapter\.attach"):
        groups_of(torch.nn.Linear(2, 2))


def test_without_a_gradient_nothing_moves() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, r, r)), torch.zeros(2, r, r))
    still, moved = (torch.nn.Parameter(torch.ones(r, r)) for _ in range(2))
    moved.grad = torch.randn(r, r)
    Muon([{"params": [still, moved], "orthogonal": True}], lr=0.1).step()
    assert torch.equal(still, torch.ones(r, r))
    assert not torch.equal(moved, torch.ones(r, r))


def test_a_step_is_as_long_as_its_rate_says() -> None:
    """Root mean square about lr, as AdamW's first step; decay as AdamW's."""
    torch.manual_seed(0)
    R = torch.nn.Parameter(torch.full((r, r), 2.0))
    R.grad = 1e-6 * torch.randn(r, r)
    Muon([{"params": [R], "orthogonal": True}], lr=0.1, weight_decay=0.5).step()
    step = R.detach() - 2 * (1 - 0.1 * 0.5)
    assert float(step.square().mean().sqrt()) == pytest.approx(0.1, rel=0.25)


def test_its_momentum_looks_ahead_as_nesterovs() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, r, r, dtype=torch.float64)
    R = torch.nn.Parameter(torch.zeros(r, r, dtype=torch.float64))
    optimizer = Muon([{"params": [R], "orthogonal": True}], lr=0.1)
    momentum, expected = torch.zeros(2, r, r, dtype=torch.float64)
    for gradient in gradients:
        R.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum + 0.05 * gradient
        expected = expected - 0.1 * r**0.5 * orthogonalized(ahead[None])[0]
    assert torch.allclose(R.detach(), expected, rtol=0, atol=1e-9)


def test_R_of_a_base_on_several_devices_is_trained_on_each() -> None:
    with FakeTensorMode():  # tensors without values, of any device
        parameters = [torch.nn.Parameter(torch.empty(r, r, device=f"cuda:{k}")) for k in (0, 1, 0)]
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=0.1)
        optimizer.step()
    assert [optimizer.state[p]["momentum"].device.index for p in parameters] == [0, 1, 0]


def test_parameters_without_groups_are_refused() -> None:
    R = torch.nn.Parameter(torch.zeros(r, r))
    for groups in ([R], [{"params": [R]}]):
        with pytest.raises(ValueError, match="groups_of"):
            Muon(groups, lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_muon_does_not_see_which_factors_span_the_subspaces(optimizer: str) -> None:
    """B·Q, Pᵀ·A and Qᵀ·R0·P are the same adapter for orthogonal Q and P. AdamW trains another one of it."""
    torch.manual_seed(0)
    size, tokens = 16, 32
    base = torch.nn.Linear(size, size, bias=False).double()
    x, y = torch.randn(2, tokens, size).double()
    B, A, Q, P = (torch.linalg.qr(torch.randn(n, r).double())[0] for n in (size, size, r, r))
    R0 = torch.randn(r, r).double() / 10

    def trained(B: torch.Tensor, R: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        layer = LoRASBLinear(base, ModuleBasis(B, A, torch.ones(r)), R, scaling=1.0)
        made: torch.optim.Optimizer
        if optimizer == "muon":
            made = Muon([{"params": [layer.R], "orthogonal": True}], lr=1e-2)
        else:
            made = torch.optim.AdamW([layer.R], lr=1e-2)
        for _ in range(10):
            made.zero_grad()
            (layer(x) - y).square().mean().backward()
            made.step()
        return B @ layer.R.detach() @ A

    one, other = trained(B, R0, A.T), trained(B @ Q, Q.T @ R0 @ P, P.T @ A.T)
    apart = float((one - other).norm() / (one - B @ R0 @ A.T).norm())
    assert apart < 1e-6 if optimizer == "muon" else apart > 0.1


def test_other_parameters_are_trained_by_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    R = torch.nn.Parameter(torch.eye(r))
    muon = Muon(
        [{"params": [R], "orthogonal": True}, {"params": [ours], "orthogonal": False}], lr=0.01, weight_decay=0.1
    )
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(4):
        ours.grad = torch.randn(3)
        theirs.grad, R.grad = ours.grad.clone(), torch.randn(r, r)
        muon.step()
        adamw.step()
    assert torch.equal(ours, theirs)


def test_a_closure_makes_the_gradients() -> None:
    torch.manual_seed(0)
    start, target = torch.randn(2, r, r)
    ends = []
    for with_closure in (False, True):
        R, head = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(r))
        optimizer = Muon([{"params": [R], "orthogonal": True}, {"params": [head], "orthogonal": False}], lr=0.1)

        def closure(R: torch.Tensor = R, head: torch.Tensor = head, optimizer: Muon = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (head * R - target).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            if with_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
        ends.append((R.detach(), head.detach()))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_its_state_is_saved_and_loaded() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, r, r)

    def made() -> tuple[torch.nn.Parameter, Muon]:
        R = torch.nn.Parameter(torch.zeros(r, r))
        return R, Muon([{"params": [R], "orthogonal": True}], lr=0.1)

    def steps(R: torch.nn.Parameter, optimizer: Muon, part: torch.Tensor) -> None:
        for gradient in part:
            R.grad = gradient.clone()
            optimizer.step()

    R, optimizer = made()
    steps(R, optimizer, gradients[:3])
    resumed, again = made()
    resumed.data.copy_(R)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(R, optimizer, gradients[3:])
    steps(resumed, again, gradients[3:])
    assert torch.equal(R, resumed)


def test_groups_of_a_model_with_a_head() -> None:
    model = torch.nn.ModuleDict(
        {
            "layer": LoRASBLinear(
                torch.nn.Linear(r, r), ModuleBasis(torch.eye(r), torch.eye(r), torch.ones(r)), torch.eye(r), scaling=1.0
            ),
            "head": torch.nn.Linear(r, 2),
        }
    )
    model["layer"].base.requires_grad_(False)
    R, others = groups_of(model)
    assert (len(R["params"]), R["orthogonal"]) == (1, True)
    assert [tuple(p.shape) for p in others["params"]] == [(2, r), (2,)]
    assert not others["orthogonal"]
