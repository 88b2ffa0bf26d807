"""16 bits on a CPU that cannot multiply them: products in float32, and everything else as it is elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lorasb_export.base import attention
from lorasb_export.base import products as narrow
from lorasb_export.base.model import BaseModel
from lorasb_export.base.nf4 import dequantize
from lorasb_export.base.products import weight_of
from lorasb_export.calibration.gradients import gradient_sums
from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.batches import collate
from lorasb_export.data.encoding import Encoded
from lorasb_export.layers.inject import inject
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import ALL_LINEAR, RANDOM
from tests.tiny import make_bert, make_gpt2, make_llama

IDS = torch.tensor([[1, 20, 21, 22, 23, 2], [1, 30, 31, 32, 33, 2]])
BFLOAT16 = 2.0**-8  # the largest relative error of one rounding, and that much again


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """On a CPU without instructions for it."""
    monkeypatch.setattr(narrow, "cpu_multiplies", lambda dtype: dtype not in (torch.bfloat16, torch.float16))
    found: torch.dtype = request.param
    return found


def converted(layer: nn.Module) -> nn.Module:
    narrow.compute_in_float32(layer)
    assert isinstance(layer, narrow.InFloat32)
    assert narrow.is_linear(layer)
    return layer


def near(found: torch.Tensor, expected: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether `found` is `expected` rounded once to the dtype of `of`."""
    return found.dtype == of.dtype and torch.allclose(found, expected.to(of.dtype), rtol=BFLOAT16, atol=1e-6)


def test_a_weight_is_cast_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "_PIECE", 10)
    x, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, dtype=torch.bfloat16)
    for weight in (torch.randn(7, 3).bfloat16(), torch.randn(3, 7).bfloat16().T):
        grad = torch.randn(5, 7, dtype=torch.float64)
        torch.testing.assert_close(narrow.product(x, weight, bias), x @ weight.double().T + bias.double())
        torch.testing.assert_close(narrow.product(x, weight, None), x @ weight.double().T)
        torch.testing.assert_close(narrow.product_of_gradient(grad, weight), grad @ weight.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_gives_what_float32_gives_rounded_once(dtype: torch.dtype, kind: type[nn.Module], bias: bool) -> None:
    plain: Any = nn.Linear(24, 16, bias=bias) if kind is nn.Linear else Conv1D(16, 24)
    layer: Any = converted(copy.deepcopy(plain.to(dtype)))
    plain.float()
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    wide = x.detach().float().requires_grad_()
    y, expected = layer(x), plain(wide)
    assert near(y, expected, x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.float())
    assert near(x.grad, wide.grad, x)
    for name, parameter in layer.named_parameters():
        assert near(parameter.grad, plain.get_parameter(name).grad, parameter), name
    y = layer(x)
    y.add_(1)  # a view could not be changed in place
    assert y.shape == (2, 5, 16)
    assert layer(x[:0]).shape == (0, 5, 16)


def test_no_copy_of_a_frozen_weight_is_kept(dtype: torch.dtype) -> None:
    layer = converted(nn.Linear(24, 16, dtype=dtype)).requires_grad_(False)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(8, 24, dtype=dtype, requires_grad=True))
    assert [t.data_ptr() for t in saved] == [layer.weight.data_ptr()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_network_trains_as_in_float32(
    family: str, dtype: torch.dtype, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss and the gradient of R are near; its targets and weights have the names that they have in float32."""
    makes = {"gpt2": make_gpt2, "bert": partial(make_bert, kind=BertForSequenceClassification)}
    base = BaseModel.resolve(llama if family == "llama" else makes[family](tmp_path / "base"))
    task_type = SEQ_CLS if family == "bert" else CAUSAL_LM
    attended: list[torch.dtype] = []
    real = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **o: attended.append(a[1].dtype) or real(*a, **o)
    )
    found = []
    for name in (str(dtype).removeprefix("torch."), "float32"):
        network = base.load(task_type, dtype=name)
        targets = find_targets(network, ALL_LINEAR)
        start = {module: torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) for module in targets}
        R = inject(network, random_factors(targets, 4, 0, torch.float32, RANDOM), start, 0.1)
        loss = network(IDS).logits.float().logsumexp(-1).sum()
        loss.backward()
        gradients = torch.cat([R[module].grad.flatten() for module in targets])
        found.append((loss.item(), gradients, list(targets), list(network.state_dict())))
        ours = [module for module in network.modules() if isinstance(module, narrow.InFloat32)]
        assert len(ours) == (0 if name == "float32" else len(targets) + 1)  # the head, which is no target
    assert set(attended) == {torch.float32}  # in the backward pass; and never by the network in float32
    (loss, gradients, *names), (right_loss, right, *right_names) = found
    assert names == right_names
    assert loss == pytest.approx(right_loss, rel=0.01)
    assert (gradients - right).norm() < 0.05 * right.norm()
    assert not (gradients == right).all()


def test_a_given_network_computes_so_as_well(dtype: torch.dtype, llama: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    targets = find_targets(network, "q_proj")
    inject(network, random_factors(targets, 4, 0, dtype, RANDOM), {name: torch.zeros(4, 4) for name in targets}, 1.0)
    assert isinstance(network.lm_head, narrow.InFloat32)


def test_attention_takes_what_models_give_it(dtype: torch.dtype) -> None:
    """A mask by its name, as AFMoE does, and a bias of every position, as Inkling does."""
    query, key, value = (torch.randn(1, 2, 6, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 6, 6, dtype=dtype)
    visible = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    found, _ = attention._in_float32(nn.Module(), query, key, value, attention_mask=visible, position_bias=bias)
    wide = (tensor.float() for tensor in (query, key, value))
    right, _ = attention.sdpa_attention_forward(nn.Module(), *wide, visible, position_bias=bias.float())
    assert near(found, right, query)


def test_a_graph_is_of_the_plain_product(dtype: torch.dtype, llama: Path) -> None:
    """An ONNX graph in 16 bits is of any number of tokens, and does not tell on which CPU it was made."""
    layer = converted(nn.Linear(1024, 2048, dtype=dtype))  # more than a piece
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (torch.randn(6, 1024, dtype=dtype),), dynamic_shapes=(rows,), strict=False)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.aten.linear.default]
    network = BaseModel.resolve(llama).load(dtype=str(dtype).removeprefix("torch."))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert compiled(IDS).logits.shape == (2, 6, network.config.vocab_size)


def test_autocast_does_not_undo_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it change what comes out: products in its dtype."""
    computed: list[torch.dtype] = []

    def linear(*args: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = nn.functional.linear(*args)  # type: ignore[arg-type]
        computed.append(y.dtype)
        return y

    monkeypatch.setattr(narrow, "linear", linear)
    layer, x = converted(nn.Linear(24, 16, dtype=dtype)), torch.randn(8, 24, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert set(computed) == {torch.float32}
    assert y.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_another_dtype_than_the_weights_is_refused_as_elsewhere(dtype: torch.dtype) -> None:
    layer = converted(nn.Linear(24, 16, dtype=dtype)).float()
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(8, 24, dtype=dtype))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_layer_is_copied_and_pickled(dtype: torch.dtype, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = converted(nn.Linear(24, 16, dtype=dtype)), torch.randn(8, 24, dtype=dtype)
    again = copied(layer)
    assert type(again) is type(layer)
    assert torch.equal(again(x), layer(x))


def test_the_attention_of_others_is_left_to_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None: ...

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", theirs)
    converted(nn.Linear(24, 16, dtype=dtype))
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs


def test_a_base_in_four_bits_is_multiplied_in_float32(dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, bias=True, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 64, dtype=dtype), requires_grad=False, quant_type="nf4").to("cpu")
    layer.bias = nn.Parameter(torch.randn(32, dtype=dtype), requires_grad=False)
    converted(layer)
    weight = dequantize(layer.weight).float()
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert near(y, x.float() @ weight.T + layer.bias.float(), x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert near(x.grad, upstream.float() @ weight, x)


def test_a_network_in_float32_is_left_alone(dtype: torch.dtype, llama: Path) -> None:
    network = BaseModel.resolve(llama).load(dtype="float32")
    assert not any(isinstance(module, narrow.InFloat32) for module in network.modules())


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_for_a_basis_are_those_of_float32(packed: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """In four bits those of the weights that these stand for."""
    base = BaseModel.resolve(make_llama(tmp_path / "base", dtype=dtype, width=64))
    rows: list[Encoded] = [{"input_ids": ids, "labels": ids} for ids in IDS.tolist()]
    if packed:
        pytest.importorskip("bitsandbytes")
    sums = []
    for name in ("nf4" if packed else "auto", "float32"):
        network = base.load(dtype=name)
        targets = find_targets(network, ALL_LINEAR)
        if not sums:
            stored = {module: dequantize(weight_of(layer)).float() for module, layer in targets.items()}
        else:
            for module, layer in targets.items():
                layer.weight.data.copy_(stored[module])
        sums.append(gradient_sums(network, targets, [collate(rows, 2)], loss="sample", gradient_checkpointing=True))
    for module, right in sums[1].items():
        assert (sums[0][module] - right).norm() < 0.05 * right.norm(), module


def test_one_row_is_multiplied_as_it_is(dtype: torch.dtype) -> None:
    """A single token, as in generation: torch's products of a vector are fast in any dtype."""
    assert narrow.compute_dtype(torch.zeros(1, 1, 8, dtype=dtype)) == dtype
    assert narrow.compute_dtype(torch.zeros(2, 8, 8, dtype=dtype)) == torch.float32
