"""A base in four bits: everything is as with a base whose weights are what the packed ones stand for."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorasb_export import Adapter, Basis, calibrate, fit, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.gradients import draw, gradients_of_rows
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.task import load_task
from lorasb_export.errors import BaseModelError, MissingPackageError, SettingsError
from lorasb_export.evaluation.evaluate import evaluate
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import BLOCK, CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit_together
from tests.conftest import lorasb
from tests.test_weight_readers import MODELS, make
from tests.tiny import make_gpt2, make_llama

BASIS = CalibrationSettings(rank=4, samples=8)
FITTING: dict[str, Any] = {"max_steps": 6, "evaluate_every": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bert: Path) -> BaseModel:
    folder = tmp_path_factory.mktemp("base") / request.param
    made = {"llama": lambda: make_llama(folder, width=64), "gpt2": lambda: make_gpt2(folder), "bert": lambda: bert}
    return BaseModel.resolve(made[request.param]())


def packed(base: BaseModel, dtype: str = "nf4") -> Any:
    return base.load(CAUSAL_LM, dtype=dtype) if base.generates else base.load(SEQ_CLS, dtype=dtype, num_labels=2)


def twin(base: BaseModel) -> Any:
    """The base in fp32, with the weights that the packed ones stand for."""
    found = packed(base, "float32")
    for name, module in packed(base).named_modules():
        if isinstance(module, Linear4bit):
            whole = dequantize_4bit(module.weight, module.weight.quant_state)
            weight = found.get_submodule(name).weight
            weight.data = whole if weight.shape == whole.shape and base.config["model_type"] != "gpt2" else whole.T
    return found


def task_of(base: BaseModel, sums: Path, parity: Path) -> Path:
    return sums if base.generates else parity


def test_the_bodys_linear_layers_are_packed_and_nothing_else(base: BaseModel) -> None:
    network, whole = packed(base), packed(base, "float32")
    prefix = f"{network.base_model_prefix}."
    for name, module in network.named_modules():
        if isinstance(module, Linear4bit):
            assert name.startswith(prefix)
            assert module.weight.nbytes * 8 == whole.get_submodule(name).weight.nbytes  # 32 bits before
        else:
            assert not isinstance(module, nn.Linear) or not name.startswith(prefix), name
    assert find_targets(network, "all-linear").keys() == find_targets(whole, "all-linear").keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_weights_it_stands_for(
    base: BaseModel, checkpointing: bool, sums: Path, parity: Path
) -> None:
    task = load_task("t", task_of(base, sums, parity))
    rows = draw(task, base, task.labels, BASIS)
    settings = CalibrationSettings(gradient_checkpointing=checkpointing, batch_size=3)
    found, expected = (
        gradients_of_rows(n, find_targets(n, "all-linear"), rows, 2, settings) for n in (packed(base), twin(base))
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("directions", ["gradient", BLOCK])
def test_it_is_trained_in_as_the_weights_it_stands_for(
    base: BaseModel, directions: Any, sums: Path, parity: Path, tmp_path: Path
) -> None:
    data = task_of(base, sums, parity)
    basis = calibrate(base, {"t": data}, CalibrationSettings(rank=4, samples=8, directions=directions, dtype="nf4"))
    adapter = fit(base, basis, data, tmp_path / "a", FitSettings(dtype="nf4", **FITTING))
    expected = fit(base, basis, data, tmp_path / "b", FitSettings(dtype="float32", **FITTING), network=twin(base))
    assert adapter.training["settings"]["dtype"] == "nf4"
    for name, R in adapter.tensors().items():
        torch.testing.assert_close(R, expected.tensors()[name], rtol=1e-3, atol=1e-5)

    if base.generates:
        loss = partial(evaluate, adapter, data, split="valid", metric="loss")
        in_four_bits = loss(dtype="nf4")["adapter"]
        assert in_four_bits == pytest.approx(loss(dtype="float32", network=twin(base))["adapter"], rel=1e-5)
        assert in_four_bits != pytest.approx(loss(dtype="float32")["adapter"], rel=1e-5)
    else:
        in_four_bits = evaluate(adapter, data, split="valid", dtype="nf4")["adapter"]
        assert in_four_bits == evaluate(adapter, data, split="valid", dtype="float32", network=twin(base))["adapter"]
    assert merge(adapter, tmp_path / "merged")["modules"] == len(adapter.R)  # into the weights of the folder


def test_several_tasks_are_trained_together_in_it(llama: Path, sums: Path, products: Path, tmp_path: Path) -> None:
    basis = calibrate(llama, {"sums": sums}, CalibrationSettings(rank=4, samples=8, dtype="nf4"))
    settings = FitSettings(dtype="nf4", **FITTING)
    together, _ = fit_together(llama, basis, {"sums": sums, "products": products}, tmp_path / "together", settings)
    alone = fit(llama, basis, sums, tmp_path / "alone", settings)
    for name, R in alone.R.items():
        torch.testing.assert_close(together.R[name], R, rtol=1e-3, atol=1e-5)


def test_an_evaluation_does_not_change_what_is_trained(llama: Path, sums: Path, tmp_path: Path) -> None:
    basis = calibrate(llama, {"sums": sums}, CalibrationSettings(rank=4, samples=8, targets="mlp-output", dtype="nf4"))
    settings = FitSettings(dtype="nf4", max_steps=6, keep="last")
    evaluated, not_evaluated = (
        fit(llama, basis, sums, tmp_path / str(every), replace(settings, evaluate_every=every)) for every in (1, 6)
    )
    assert evaluated.sha256 == not_evaluated.sha256


@pytest.mark.parametrize("labels", [None, 2])
def test_a_head_that_does_not_fit_is_drawn_as_for_a_whole_base(labels: int | None, bert: Path, tmp_path: Path) -> None:
    """The checkpoint has none, or one of five classes."""
    base = BaseModel.resolve(bert)
    if labels:
        base.load(SEQ_CLS, num_labels=5).save_pretrained(tmp_path / "base")
        base.tokenizer.save_pretrained(tmp_path / "base")
        base = BaseModel.resolve(tmp_path / "base")
    before = torch.get_rng_state()
    networks = [
        base.load(SEQ_CLS, num_labels=2, seed=seed, dtype=dtype)
        for seed, dtype in ((3, "nf4"), (3, "auto"), (4, "nf4"))
    ]
    heads = [network.classifier.weight for network in networks]
    assert [tuple(head.shape) for head in heads] == [(2, 32)] * 3
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_body_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(BaseModelError, match=r"lacks model\.layers\.0\.mlp\S+, or has it in another shape"):
        BaseModel.resolve(tmp_path / "base").load(dtype="nf4")


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights_are_trained_in_it(name: str, sums: Path, tmp_path: Path) -> None:
    base = make(tmp_path / "base", name)
    basis = calibrate(base, {"sums": sums}, CalibrationSettings(rank=2, samples=8, dtype="nf4"))
    adapter = fit(base, basis, sums, tmp_path / "a", FitSettings(dtype="nf4", **FITTING))
    assert evaluate(adapter, sums, dtype="nf4", metric="loss", limit=4)["adapter"] > 0


def test_a_given_network_is_scored_and_trained_in(llama: Path, sums: Path, tmp_path: Path) -> None:
    """Loaded by transformers itself, and asked something before."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    network = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    basis = calibrate(llama, {"sums": sums}, CalibrationSettings(rank=4, samples=8, dtype="nf4"), network=network)
    adapter = fit(llama, basis, sums, tmp_path / "a", FitSettings(dtype="nf4", **FITTING), network=network)
    assert evaluate(adapter, sums, dtype="nf4", metric="loss", network=network)["adapter"] > 0
    fp4 = AutoModelForCausalLM.from_pretrained(llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(BaseModelError, match="the network's weights are fp4"):
        calibrate(llama, {"sums": sums}, BASIS, network=fp4)


def test_a_given_network_says_what_it_is(llama: Path, sums: Path, tmp_path: Path) -> None:
    network = BaseModel.resolve(llama).load(dtype="nf4")
    with pytest.raises(SettingsError, match=r"dtype is auto, the network that was given is nf4\. Set dtype to nf4"):
        calibrate(llama, {"sums": sums}, BASIS, network=network)
    basis = calibrate(llama, {"sums": sums}, CalibrationSettings(rank=4, samples=8, dtype="nf4"), network=network)
    adapter = Adapter.attach(network, basis)
    assert {R.dtype for R in adapter.R.values()} == {torch.float32}


def test_weights_in_eight_bits_are_refused(llama: Path, sums: Path) -> None:
    base = BaseModel.resolve(llama)
    network = base.load()
    basis = calibrate(llama, {"sums": sums}, CalibrationSettings(rank=4, samples=8, targets="v_proj"))
    name = next(iter(basis.modules))
    rows, columns = basis.modules[name].shape
    layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    layer.weight.data = torch.zeros(rows, columns, dtype=torch.int8)
    network.set_submodule(name, layer)
    with pytest.raises(BaseModelError, match="the network's weights are int8"):
        Adapter.attach(network, basis)


def test_the_command_line_takes_it(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lorasb("init", "--model", str(llama), "--task", f"sums={sums}").exit_code == 0
    settings = Path("lorasb.toml").read_text().replace("rank = 128", "rank = 4")
    Path("lorasb.toml").write_text(settings.replace("[fit]\n", '[fit]\ndtype = "nf4"\nmax_steps = 2\n'))
    for words in (["fit"], ["evaluate", "--limit", "2"], ["generate", "1+1=", "--adapters", "sums"]):
        result = lorasb(*words, "--dtype", "nf4")
        assert result.exit_code == 0, result.output
    assert Basis.load("basis").calibration["dtype"] == "nf4"


def test_without_bitsandbytes_the_error_says_what_to_install(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    what = "the package bitsandbytes is not installed. For dtype nf4: pip install bitsandbytes"
    with pytest.raises(MissingPackageError, match=what):
        BaseModel.resolve(llama).load(dtype="nf4")
