"""Models whose layers take the weight of another and do not call it: Mamba, and hybrids with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasb_export import Adapter, Basis, calibrate, fit, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import TaskData
from lorasb_export.errors import SettingsError
from lorasb_export.layers.factors import BlockBasis, ModuleBasis
from lorasb_export.layers.layer import LoRASBLinear
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.stack import Stack
from tests.tiny import VOCABULARY, save_tokenizer

SIZES: dict[str, Any] = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2}
OF_MAMBA2 = {"d_state": 8, "n_heads": 8, "d_head": 8, "n_groups": 1, "expand": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "GraniteMoeHybrid": {
        **{"intermediate_size": 64, "shared_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
        **{f"mamba_{name}": value for name, value in OF_MAMBA2.items()},
    },
}


def make(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**SIZES, **MODELS[name])).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_such_a_model_is_trained_and_merged(name: str, tasks: dict[str, TaskData], tmp_path: Path) -> None:
    base = make(tmp_path / "base", name)
    basis = calibrate(str(base), tasks, CalibrationSettings(rank=2, dtype="float32"))
    settings = FitSettings(max_steps=12, learning_rate=3e-2, max_length=64)
    adapter = fit(str(base), basis, tasks["plus"], tmp_path / "a", settings)
    start = Adapter.fresh(basis)
    assert all((R - start.R[name]).abs().max() > 1e-3 for name, R in adapter.R.items())
    result = merge(adapter, tmp_path / "model", verify=True)
    assert (result["verify"]["relative_difference"] < 1e-5, result["verify"]["streamed"]) == (True, False)
    ids = torch.tensor([[1, 20, 21, 22, 23, 2]])
    network, merged = BaseModel.resolve(base).load(), BaseModel.resolve(tmp_path / "model").load()
    plain = network(ids).logits
    adapter.inject(network)
    expected = network(ids).logits
    assert torch.allclose(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-3)


def test_of_several_adapters_none_is_the_weight(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "Mamba")
    basis: Basis = calibrate(str(base), {}, CalibrationSettings(rank=2, directions="random"))
    network = BaseModel.resolve(base).load()
    Stack(network, {"a": Adapter.fresh(basis), "b": Adapter.fresh(basis)})
    with pytest.raises(SettingsError, match=r"layers read whole weights.*one adapter at a time"):
        network(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "block"])
def test_the_weight_is_what_the_layer_multiplies_by(kind: str) -> None:
    torch.manual_seed(0)
    base = Conv1D(6, 5) if kind == "Conv1D" else nn.Linear(5, 6)
    B, A = torch.linalg.qr(torch.randn(6, 2))[0], torch.linalg.qr(torch.randn(5, 2))[0].T
    factors = BlockBasis((6, 5), slice(3, 5), slice(1, 3)) if kind == "block" else ModuleBasis(B, A, torch.ones(2))
    layer = LoRASBLinear(base, factors, torch.randn(2, 2), 0.5)
    x = torch.randn(4, 5)
    y = x @ (layer.weight if kind == "Conv1D" else layer.weight.T) + layer.bias
    assert torch.allclose(y, layer(x), atol=1e-6)
    (by_weight,) = torch.autograd.grad(y.square().sum(), layer.R)
    (by_layer,) = torch.autograd.grad(layer(x).square().sum(), layer.R)
    assert torch.allclose(by_weight, by_layer, rtol=1e-4, atol=1e-5)
