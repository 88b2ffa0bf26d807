"""The theorems of the paper (arXiv 2411.19557), each on the code that relies on it. float64 unless said.

`oracle_N` in a test's name is the number of its oracle in the specification. Elsewhere are 6 to 10, 12, 17 and 26
(test_oracles_training.py), 16 (test_export_peft.py), 18 (test_stack.py), 22 (test_artifacts.py, test_belonging.py,
test_resume.py) and 25 (test_capture.py), and more of 14 (test_merge.py) and 23 (test_calibrate.py,
test_gradients.py, test_targets.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasb_export import Adapter, Basis, calibrate, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.gradients import gradient_sums
from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.calibration.subspace import reduced, truncated_svd
from lorasb_export.data.batches import collate, row_losses
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.layers.inject import remove
from lorasb_export.layers.layer import LoRASBLinear, Route, _LoRASBFunction
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.rows import encode
from tests.tiny import update_of

OUT, IN, RANK = 48, 40, 6


def factors(seed: int = 0, out: int = OUT, inside: int = IN, rank: int = RANK) -> ModuleBasis:
    generator = torch.Generator().manual_seed(seed)
    B = torch.linalg.qr(torch.randn(out, rank, generator=generator, dtype=torch.float64))[0]
    A = torch.linalg.qr(torch.randn(inside, rank, generator=generator, dtype=torch.float64))[0].T.contiguous()
    return ModuleBasis(B, A, torch.arange(rank, 0, -1.0))


def layer(scaling: float = 0.7, seed: int = 0) -> LoRASBLinear:
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    R = torch.randn(RANK, RANK, dtype=torch.float64)  # not symmetric: a wrong transpose shows
    return LoRASBLinear(base, factors(seed), R, scaling)


@pytest.fixture(scope="module")
def task(sums: Path) -> TaskData:
    return load_task("sums", sums)


@pytest.fixture(scope="module")
def basis(llama: Path, sums: Path) -> Basis:
    return calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4))


def test_oracle_1_basis_is_orthonormal(basis: Basis) -> None:
    for module in basis.modules.values():
        identity = torch.eye(basis.rank)
        assert (module.B.T @ module.B - identity).abs().max() < 1e-5
        assert (module.A @ module.A.T - identity).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(48, 40), (1100, 1200)], ids=["exact", "randomized"])
def test_oracle_2_eckart_young(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).sign()
    U, S, Vh = truncated_svd(matrix, RANK, seed=0)
    best = torch.linalg.svdvals(matrix)[RANK:].square().sum().sqrt()
    assert (matrix - U * S @ Vh).norm() <= best * (1 + 1e-2)
    assert (S.diff() <= 0).all()


def test_oracle_3_R0_is_S_over_s(llama: Path, basis: Basis) -> None:
    network = BaseModel.resolve(llama).load()
    adapter = Adapter.attach(network, basis, scaling=2.0)
    for name, R in adapter.R.items():
        assert torch.equal(R.detach(), torch.diag(basis.modules[name].S / 2.0))
        assert (R.detach().diag() >= 0).all()
        assert (R.detach().diag().diff() <= 0).all()


def test_oracle_3_zero_start_is_the_base_bit_for_bit(llama: Path, basis: Basis) -> None:
    network, ids = BaseModel.resolve(llama).load(), torch.tensor([[5, 6, 7, 8]])
    before = network(ids).logits
    Adapter.attach(network, basis, init="zero")
    assert torch.equal(network(ids).logits, before)


def test_oracle_4_lemma_2_gradient_of_R() -> None:
    """∂L/∂R = s·Bᵀ·(∂L/∂W)·Aᵀ, and y and ∂L/∂x are those of the merged weight."""
    ours = layer()
    x = torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()

    W = (ours.base.weight + update_of(ours)).detach().requires_grad_(True)
    x2 = x.detach().clone().requires_grad_(True)
    y2 = nn.functional.linear(x2, W, ours.base.bias)
    (y2 * direction).sum().backward()
    assert torch.allclose(y, y2, atol=1e-12)
    assert torch.allclose(x.grad, x2.grad, atol=1e-12)
    assert torch.allclose(ours.R.grad, ours.scaling * ours.B.T @ W.grad @ ours.A.T, atol=1e-12)


def test_oracle_4_the_function_passes_gradcheck() -> None:
    ours = layer()
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))


def test_oracle_4_the_function_passes_gradcheck_with_a_stack() -> None:
    """∂/∂x and ∂/∂R where rows go through different R, two of them through the same, one through none."""
    ours, rows = layer(), torch.tensor([1, 0, -1, 1])
    x = torch.randn(4, 3, IN, dtype=torch.float64, requires_grad=True)
    R = torch.randn(2, RANK, RANK, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        return _LoRASBFunction.apply(x, ours.base.weight, ours.base.bias, ours.B, R, ours.A, 0.7, rows)

    assert torch.autograd.gradcheck(run, (x, R))


def test_oracle_5_orthonormal_backprop_is_the_optimal_gradient() -> None:
    """Theorem 3: with orthonormal B, A and s = 1, what comes back to R is the least-squares solution of B·X·A = g."""
    ours = layer(scaling=1.0)
    x = torch.randn(7, IN, dtype=torch.float64)
    direction = torch.randn(7, OUT, dtype=torch.float64)
    (ours(x) * direction).sum().backward()
    g = direction.T @ x
    solution = torch.linalg.lstsq(torch.kron(ours.B.contiguous(), ours.A.T.contiguous()), g.reshape(-1, 1)).solution
    assert torch.allclose(ours.R.grad.reshape(-1, 1), solution, atol=1e-10)


def test_oracle_11_loss_scale_and_eta(llama: Path, task: TaskData) -> None:
    """A larger η scales S alone; the sign makes B and A blind to the size of the loss."""
    small = calibrate(str(llama), {"t": task}, CalibrationSettings(rank=4, eta=1e-6))
    large = calibrate(str(llama), {"t": task}, CalibrationSettings(rank=4, eta=4e-6))
    for name, module in small.modules.items():
        assert torch.equal(module.B, large.modules[name].B)
        assert torch.allclose(4 * module.S, large.modules[name].S)


@pytest.mark.parametrize("rows", [None, [1, -1, 0]])
def test_a_block_takes_the_place_of_products(rows: list[int] | None) -> None:
    """y and the gradients are those of a dense B and A that span the same, also where every row has its R."""
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    units = random_factors({"m": base}, RANK, 3, torch.float64, "block")["m"]
    R, route = torch.randn(2, RANK, RANK, dtype=torch.float64), Route()
    route.rows = None if rows is None else torch.tensor(rows)
    ours = LoRASBLinear(base, units, R[0] if rows is None else R, 0.7, route)
    assert ours.block is not None
    assert not list(ours.buffers())
    dense = LoRASBLinear(base, ModuleBasis(units.B, units.A, units.S), ours.R, 0.7, route)
    assert dense.block is None
    direction, found = torch.randn(3, 5, OUT, dtype=torch.float64), []
    for layer in (ours, dense):
        x = torch.ones(3, 5, IN, dtype=torch.float64).cumsum(0).cumsum(2).requires_grad_(True)
        y = layer(x)
        (y * direction).sum().backward()
        found.append((y, x.grad, layer.R.grad))
    for one, other in zip(*found, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_oracle_13_isometry() -> None:
    ours = layer(scaling=0.7)
    delta, R = update_of(ours).detach(), ours.R.detach()
    assert torch.allclose(delta.norm(), 0.7 * R.norm())
    assert torch.allclose(torch.linalg.svdvals(delta)[:RANK], 0.7 * torch.linalg.svdvals(R))


def test_oracle_14_remove_restores_the_base_bit_for_bit(llama: Path, basis: Basis) -> None:
    network, ids = BaseModel.resolve(llama).load(), torch.tensor([[5, 6, 7, 8]])
    before, state = network(ids).logits, {k: v.clone() for k, v in network.state_dict().items()}
    Adapter.attach(network, basis)
    remove(network)
    assert torch.equal(network(ids).logits, before)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_oracle_15_transpose_trap() -> None:
    """R and Rᵀ give different outputs, and the layer uses R."""
    ours, x = layer(), torch.randn(5, IN, dtype=torch.float64)
    right = nn.functional.linear(x, ours.base.weight + ours.scaling * ours.B @ ours.R @ ours.A, ours.base.bias)
    wrong = nn.functional.linear(x, ours.base.weight + ours.scaling * ours.B @ ours.R.T @ ours.A, ours.base.bias)
    assert torch.allclose(ours(x), right, atol=1e-12)
    assert (ours(x) - wrong).abs().max() > 0.1


def sums_of(base: BaseModel, task: TaskData, batch_size: int, *, reverse: bool = False) -> dict[str, torch.Tensor]:
    tokenizer = base.tokenizer
    rows = encode(task.splits["train"][:13], tokenizer, task.task_type, [], 64)
    rows = rows[::-1] if reverse else rows
    batches = [collate(rows[i : i + batch_size], tokenizer.pad_token_id) for i in range(0, len(rows), batch_size)]
    network = base.load(dtype="float64")
    return gradient_sums(
        network, find_targets(network, "all-linear"), batches, loss="sample", gradient_checkpointing=True
    )


def test_oracle_19_sum_is_blind_to_order_batches_and_padding(llama: Path, task: TaskData) -> None:
    """13 rows one by one (no padding), in fours (with a last batch of one), and backwards."""
    base = BaseModel.resolve(llama)
    one = sums_of(base, task, 1)
    for other in (sums_of(base, task, 4), sums_of(base, task, 5, reverse=True)):
        for name, gradient in one.items():
            assert torch.allclose(gradient, other[name], atol=1e-12)


def test_oracle_19_sum_is_that_of_plain_backward(llama: Path, task: TaskData) -> None:
    base = BaseModel.resolve(llama)
    ours = sums_of(base, task, 4)
    network, tokenizer = base.load(dtype="float64"), base.tokenizer
    network.requires_grad_(True)
    for row in encode(task.splits["train"][:13], tokenizer, task.task_type, [], 64):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = network(ids).logits[0, :-1]
        nn.functional.cross_entropy(logits, labels[0, 1:]).backward()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, network.get_submodule(name).weight.grad, atol=1e-10)


def test_oracle_19_a_gradient_is_freed_as_soon_as_it_is_summed(llama: Path, task: TaskData) -> None:
    """When backward comes to the first layer, no weight of the second holds a gradient any more."""
    base = BaseModel.resolve(llama)
    tokenizer, network = base.tokenizer, base.load()
    batch = collate(encode(task.splits["train"][:4], tokenizer, task.task_type, [], 64), tokenizer.pad_token_id)
    held: list[int] = []
    network.model.layers[0].register_full_backward_pre_hook(
        lambda module, grads: held.append(sum(p.grad is not None for p in network.parameters()))
    )
    gradient_sums(network, find_targets(network, "all-linear"), [batch], loss="sample", gradient_checkpointing=True)
    assert held == [0]


def test_oracle_19_flags_and_mode_are_restored_also_after_an_error(llama: Path) -> None:
    network = BaseModel.resolve(llama).load().train()
    network.model.norm.weight.requires_grad_(True)
    before = [p.requires_grad for p in network.parameters()]
    with pytest.raises(KeyError):
        gradient_sums(network, find_targets(network, "q_proj"), [{}], loss="sample", gradient_checkpointing=True)
    assert [p.requires_grad for p in network.parameters()] == before
    assert network.training
    assert all(p.grad is None for p in network.parameters())


def test_oracle_20_same_seed_same_hash_and_the_global_rng_is_left_alone(llama: Path, task: TaskData) -> None:
    settings = CalibrationSettings(rank=4, seed=3)
    state = torch.get_rng_state()
    first, second = (calibrate(str(llama), {"t": task}, settings) for _ in range(2))
    assert first.sha256 == second.sha256
    assert torch.equal(torch.get_rng_state(), state)
    assert calibrate(str(llama), {"t": task}, CalibrationSettings(rank=4, seed=4)).sha256 != first.sha256


def test_oracle_20_of_a_large_matrix_too_the_seed_alone_decides() -> None:
    matrix = torch.randn(1040, 1100, generator=torch.Generator().manual_seed(1)).sign()
    found = []
    with torch.random.fork_rng():
        for drawn_before, seed in ((7, 0), (8, 0), (7, 1)):
            torch.manual_seed(drawn_before)
            state = torch.get_rng_state()
            found.append(truncated_svd(matrix, RANK, seed))
            assert torch.equal(torch.get_rng_state(), state)
    first, again, other = found
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_oracle_21_only_R_moves(llama: Path, basis: Basis, task: TaskData, tmp_path: Path) -> None:
    network = BaseModel.resolve(llama).load()

    def digests() -> list[Any]:
        factors = [(name, _digest(of.B), _digest(of.A)) for name, of in basis.modules.items()]
        return [*factors, *((name, _digest(tensor)) for name, tensor in network.state_dict().items())]

    before = digests()
    adapter = fit(str(llama), basis, task, tmp_path / "a", FitSettings(max_steps=4), network=network)
    assert digests() == before
    assert set(adapter.R) == set(basis.modules)
    for name, R in adapter.R.items():
        assert not torch.equal(R, torch.diag(basis.modules[name].S))
    assert adapter.training["trainable_parameters"] == len(basis.modules) * basis.rank**2


@pytest.mark.parametrize("shape", [(96, 8), (8, 96), (40, 40), (1100, 1040)], ids=str)
def test_oracle_23_factors_are_orthonormal_whatever_the_gradient(shape: tuple[int, int]) -> None:
    """m ≫ n, m ≪ n, large enough for the randomized SVD; with rows that got no gradient, and of lower rank than r."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    gradient[: shape[0] // 2] = 0
    for reduction in ("sign", "raw"):
        step = reduced(gradient, reduction)
        assert not step[: shape[0] // 2].any()  # sign(0) = 0
        U, S, Vh = truncated_svd(step, 6, seed=0)
        assert torch.allclose(U.T @ U, torch.eye(6), atol=1e-5)
        assert torch.allclose(Vh @ Vh.T, torch.eye(6), atol=1e-5)
        assert (S >= 0).all()
        assert S.isfinite().all()


def test_oracle_24_R_is_fp32_under_a_bf16_base(llama: Path, sums: Path, tmp_path: Path) -> None:
    settings = CalibrationSettings(rank=4, dtype="bfloat16")
    basis = calibrate(str(llama), {"sums": sums}, settings)
    assert basis.modules["model.layers.0.self_attn.q_proj"].B.dtype == torch.bfloat16
    adapter = fit(str(llama), basis, sums, tmp_path / "a", FitSettings(max_steps=2, dtype="bfloat16"))
    assert {R.dtype for R in adapter.R.values()} == {torch.float32}


def test_row_losses_match_transformers(llama: Path, task: TaskData) -> None:
    base = BaseModel.resolve(llama)
    tokenizer, network = base.tokenizer, base.load(dtype="float64")
    rows = encode(task.splits["train"][:5], tokenizer, task.task_type, [], 64)
    batch = collate(rows, tokenizer.pad_token_id)
    labels = batch.pop("labels")
    losses, counts = row_losses(network(**batch).logits, labels)
    for row, loss, count in zip(rows, losses, counts, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        assert float(loss / count) == pytest.approx(float(network(ids, labels=labels).loss), abs=1e-6)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
