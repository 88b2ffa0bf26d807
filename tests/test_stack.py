"""Several adapters at once: a row of a mixed batch is the row alone with its adapter; the base is never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.evaluation.inference import answers
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.layers.inject import inject
from lorasb_export.layers.layer import LoRASBLinear, Route
from lorasb_export.settings import CalibrationSettings
from lorasb_export.stack import Stack
from tests.families import make
from tests.random_adapter import save_adapter


def random_adapter(basis: Basis, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter.fresh(basis, scaling=2.0)
    adapter.R = {n: torch.randn(4, 4, generator=generator, dtype=torch.float64) for n in adapter.R}
    return adapter


@pytest.mark.parametrize("bias", [True, False])
def test_what_comes_out_may_be_changed_in_place(bias: bool) -> None:
    """As DeBERTa's attention does; of the base's layer it may be, and its gradient is then R's too."""
    linear = torch.nn.Linear(5, 4, bias=bias)
    factors = ModuleBasis(torch.linalg.qr(torch.randn(4, 2))[0], torch.linalg.qr(torch.randn(5, 2))[0].T, torch.ones(2))
    layer = LoRASBLinear(linear, factors, torch.randn(2, 2), 1.0)
    x = torch.randn(2, 3, 5)
    y = layer(x)
    y /= 2
    y.square().sum().backward()
    found, layer.R.grad = layer.R.grad, None
    (layer(x) / 2).square().sum().backward()
    assert found is not None
    assert layer.R.grad is not None
    assert torch.equal(found, layer.R.grad)


def test_a_layer_keeps_its_basis_out_of_what_is_saved_of_a_model() -> None:
    factors = ModuleBasis(torch.eye(4, 2), torch.eye(2, 5), torch.ones(2))
    layer = LoRASBLinear(torch.nn.Linear(5, 4), factors, torch.randn(2, 2), 1.0)
    assert set(layer.state_dict()) == {"base.weight", "base.bias", "R"}


@pytest.mark.parametrize("rows", [None, [0, 1]])
def test_nothing_may_come_in(rows: list[int] | None) -> None:
    """As to an expert that no token is sent to."""
    factors = ModuleBasis(torch.eye(4, 2), torch.eye(2, 5), torch.ones(2))
    route = Route()
    route.rows = None if rows is None else torch.tensor(rows)
    layer = LoRASBLinear(torch.nn.Linear(5, 4), factors, torch.randn(*([] if rows is None else [2]), 2, 2), 1.0, route)
    x = torch.randn(2, 0, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, 4)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert layer.R.grad is not None
    assert not layer.R.grad.any()


def test_second_derivatives_are_refused() -> None:
    """They would leave out what u = x·Aᵀ has of x."""
    factors = ModuleBasis(torch.eye(4, 2), torch.eye(2, 5), torch.ones(2))
    layer = LoRASBLinear(torch.nn.Linear(5, 4), factors, torch.randn(2, 2), 1.0)
    (gradient,) = torch.autograd.grad(layer(torch.randn(3, 5)).square().sum(), layer.R, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.fixture(scope="module")
def basis(llama: Path, sums: Path) -> Basis:
    return calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, dtype="float64"))


@pytest.fixture
def adapters(basis: Basis) -> dict[str, Adapter]:
    return {name: random_adapter(basis, seed) for seed, name in enumerate("abc")}


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.detach()


IDS = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(0))


def mixed_as_alone(
    model: torch.nn.Module, adapters: dict[str, Adapter], choice: list[str | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the base and of a mixed batch, each row of which is what its adapter alone gives."""
    base = logits(model, IDS)
    alone = {None: base}
    for name, adapter in adapters.items():
        adapter.inject(model)
        alone[name] = logits(model, IDS)
    stack = Stack(model, adapters)
    stack.use(choice)
    mixed = logits(model, IDS)
    for row, name in enumerate(choice):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-12), name
    return base, mixed


def test_oracle_18_mixed_batch_is_each_row_alone(llama: Path, adapters: dict[str, Adapter]) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    base, mixed = mixed_as_alone(model, adapters, ["b", None, "c", "b"])
    assert torch.equal(mixed[1], base[1])  # "none" is the base bit for bit
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)


def test_a_stack_that_was_replaced_says_so_and_takes_nothing_of_the_others_off(
    llama: Path, adapters: dict[str, Adapter]
) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    first = Stack(model, {"a": adapters["a"], "b": adapters["b"]})
    second = Stack(model, {"b": adapters["b"]})
    of_b = logits(model, IDS)
    with pytest.raises(SettingsError, match="no longer on the model"):
        first.use("a")
    first.detach()
    assert torch.equal(logits(model, IDS), of_b)
    second.values += 1
    assert torch.equal(next(iter(adapters["b"].R.values())), second.values[0, 0])
    second.detach()
    assert not any(isinstance(module, LoRASBLinear) for module in model.modules())


def test_switching_and_detaching_leave_the_base_bit_for_bit(llama: Path, adapters: dict[str, Adapter]) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = logits(model, IDS)
    stack = Stack(model, adapters)
    first = logits(model, IDS)
    stack.use("b")
    second = logits(model, IDS)
    stack.use(None)
    assert torch.equal(logits(model, IDS), base)
    stack.use("a")
    assert torch.equal(logits(model, IDS), first)
    assert not torch.equal(first, second)
    with pytest.raises(SettingsError, match=r"no adapter 'd' is attached.*a, b, c"):
        stack.use(["a", "d"])
    stack.detach()
    assert not any(isinstance(module, LoRASBLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, IDS), base)


class Called(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_gradient_of_a_stack_is_each_adapters_own(llama: Path, adapters: dict[str, Adapter]) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    alone = {}
    for row, (name, adapter) in enumerate(adapters.items()):
        inject(model, adapter.load_basis().modules, adapter.R, adapter.scaling)
        model(IDS[row : row + 1]).logits.square().mean().backward()
        alone[name] = {n: m.R.grad for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}
    stack = Stack(model, adapters)
    stack.use(["a", "b", "c", None])
    loss = sum(row.square().mean() for row in model(IDS).logits)
    with Called() as ops:
        loss.backward()
    assert "mm" in ops.names
    assert not {"index_add_", "scatter_add_"} & ops.names  # on CUDA they add in any order: a resumed run would differ
    for k, name in enumerate(adapters):
        for module, gradient in alone[name].items():
            assert torch.allclose(model.get_submodule(module).R.grad[k], gradient, atol=1e-12)


def test_an_adapter_that_is_not_finite_spoils_no_other(llama: Path, adapters: dict[str, Adapter]) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    stack = Stack(model, adapters)
    stack.use(["a", "b", "c", None])
    sound = model(IDS).logits
    sound.square().mean().backward()
    gradients = [R.grad for R in stack.layers]
    stack.values[0] = torch.nan  # -1, the base's row, looks at this place of the stack too
    for R in stack.layers:
        R.grad = None
    spoilt = model(IDS).logits
    spoilt.square().mean().backward()
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], sound[1:])
    for R, gradient in zip(stack.layers, gradients, strict=True):
        assert R.grad[0].isnan().all()
        assert torch.equal(R.grad[1:], gradient[1:])


def test_answers_are_of_one_adapter(llama: Path, adapters: dict[str, Adapter]) -> None:
    base = BaseModel.resolve(llama)
    network, prompts = base.load(dtype="float64"), ["a longer prompt", "short"]
    stack = Stack(network, adapters)
    stack.use("b")
    assert len(answers(network, base.tokenizer, prompts, max_tokens=2)) == 2
    stack.use(["a", "b"])
    with pytest.raises(SettingsError, match=r"an adapter was chosen for each row. Choose one for all of them"):
        answers(network, base.tokenizer, prompts, max_tokens=2)
    with pytest.raises(SettingsError, match=r"no adapter was chosen. Name one"):
        stack.use([])


def test_a_trained_stack_saves_adapter_by_adapter(llama: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    stack = Stack(model, adapters)
    with torch.no_grad():
        stack.values[1] += 1
    adapters["b"].save(tmp_path / "b")
    loaded = Adapter.load(tmp_path / "b")
    assert all(torch.equal(loaded.R[name], stack.values[1, place].float()) for place, name in enumerate(loaded.R))


def test_adapters_of_two_bases_are_refused(llama: Path, sums: Path, adapters: dict[str, Adapter]) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, dtype="float64", reduction="raw"))
    model = BaseModel.resolve(llama).load(dtype="float64")
    with pytest.raises(ArtifactError, match="do not belong together"):
        Stack(model, {**adapters, "other": random_adapter(other, 9)})


def test_adapters_of_two_scalings_are_refused(llama: Path, adapters: dict[str, Adapter]) -> None:
    model = BaseModel.resolve(llama).load(dtype="float64")
    adapters["b"].scaling = 0.5
    with pytest.raises(ArtifactError, match=r"adapter b has scaling 0\.5, another 2\.0\. Attach those of one scaling"):
        Stack(model, adapters)


def test_autocast_and_gradient_checkpointing_keep_the_gradient(llama: Path, basis: Basis) -> None:
    """Under autocast the layer computes in bf16 and R gets an fp32 gradient; recomputed activations give the same."""
    model = BaseModel.resolve(llama).load(dtype="float32")
    adapter = Adapter.attach(model, basis)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        return [R.grad.clone() for R in adapter.R.values()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(), plain, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gradients()
    for a, b in zip(half, plain, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


def test_a_choice_between_a_pass_and_its_backward_does_not_go_unseen_where_the_pass_is_made_again(
    llama: Path, basis: Basis
) -> None:
    """Gradient checkpointing would compute it with the R of the other adapter."""
    model = BaseModel.resolve(llama).load(dtype="float32")
    stack = Stack(model, {"a": random_adapter(basis, 1), "b": random_adapter(basis, 2)})

    def gradient(meanwhile: str) -> torch.Tensor:
        model.zero_grad()
        stack.use("a")
        loss = model.train()(IDS, labels=IDS).loss
        stack.use(meanwhile)
        loss.backward()
        return torch.stack([R.grad for R in stack.layers])

    plain = gradient("b")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(gradient("a"), plain, atol=1e-6)
    with pytest.raises(SettingsError, match=r"another adapter was chosen .* call backward before the next"):
        gradient("b")


def test_a_model_that_flattens_its_rows(tmp_path: Path) -> None:
    """OPT's feed-forward layers get (n·t, in)."""
    base = make(tmp_path / "base", "opt")
    network = BaseModel.resolve(base).load(dtype="float64")
    saved = save_adapter(base, network, tmp_path / "a", ["model.decoder.layers.0.fc1"], relative_size=0.3)
    adapters = {"a": saved, "b": random_adapter(saved.load_basis(), 1)}
    mixed_as_alone(network, adapters, ["b", None, "a", "b"])
    with pytest.raises(SettingsError, match=r"4 adapters were chosen, which does not fit a batch of shape \(21, 32\)"):
        logits(network, IDS[:3])
