"""Merged onto the base as NF4 rounds it, an adapter answers as it did where it was trained beside such a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from lorasb_export import Adapter, merge
from lorasb_export.base import device as base_device
from lorasb_export.base.model import BaseModel
from lorasb_export.base.nf4 import dequantize
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.errors import BaseModelError, SettingsError
from lorasb_export.merging import sums, write
from lorasb_export.merging.rounding import NOT_ROUNDED
from lorasb_export.merging.verify import compare_logits
from tests import families, test_weight_readers
from tests.conftest import lorasb
from tests.random_adapter import BERT_MODULES, LLAMA_MODULES, save_adapter
from tests.tiny import make_gpt2, make_llama

IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])
TARGETS = {
    "llama": LLAMA_MODULES,
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
    "bert": BERT_MODULES,
    "Mamba": ["backbone.layers.0.mixer.in_proj"],
    **{name: [f"model.layers.1.{families.FAMILIES[name][2][0]}"] for name in ("qwen3", "phi3", "mixtral")},
    "opt": ["model.decoder.layers.1.fc1"],
}


def make(name: str, folder: Path, bert: Path) -> BaseModel:
    if name == "bert":
        return BaseModel.resolve(bert)
    if name == "Mamba":
        return BaseModel.resolve(test_weight_readers.make(folder, name))
    own = {"llama": lambda: make_llama(folder, width=64), "gpt2": lambda: make_gpt2(folder)}
    return BaseModel.resolve(own.get(name, lambda: families.make(folder, name))())


def load(base: BaseModel, dtype: str) -> Any:
    return base.load(CAUSAL_LM, dtype=dtype) if base.generates else base.load(SEQ_CLS, dtype=dtype, num_labels=2)


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = network(IDS).logits
    return found


def test_what_an_accelerator_has_no_room_to_round_the_cpu_rounds(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = make("llama", tmp_path / "base", bert)
    save_adapter(base.folder, load(base, "float32"), tmp_path / "a", LLAMA_MODULES)
    merge(tmp_path / "a", tmp_path / "on-the-cpu", base_dtype="nf4")
    to = torch.Tensor.to

    def full(tensor: torch.Tensor, *words: Any, **options: Any) -> torch.Tensor:
        if torch.device("cuda") in words:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *words, **options)

    monkeypatch.setattr(torch.Tensor, "to", full)
    base_device.warn_of_no_room.cache_clear()
    monkeypatch.setattr(base_device, "default_device", lambda: torch.device("cuda"))
    merge(tmp_path / "a", tmp_path / "model", base_dtype="nf4")
    assert caplog.text.count("cuda has no room to round a weight to four bits: the CPU does it") == 1
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("on-the-cpu", "model")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", TARGETS)
def test_it_answers_as_beside_a_base_in_four_bits(name: str, bert: Path, tmp_path: Path) -> None:
    base = make(name, tmp_path / "base", bert)
    exact, packed = load(base, "float32"), load(base, "nf4")
    task_type = CAUSAL_LM if base.generates else SEQ_CLS
    adapter = save_adapter(base.folder, exact, tmp_path / "a", TARGETS[name], relative_size=0.3, task_type=task_type)
    adapter.training = {"labels": [] if base.generates else ["no", "yes"]}
    done = merge(adapter, tmp_path / "model", base_dtype="nf4", verify=True)
    said = json.loads((tmp_path / "model" / "lorasb.json").read_text())
    assert done["base_dtype"] == said["base_dtype"] == "nf4"
    assert done["verify"]["relative_difference"] < 1e-5

    layers = {name: module for name, module in packed.named_modules() if isinstance(module, Linear4bit)}
    assert layers.keys() > adapter.R.keys()
    adapter.inject(packed)
    merged = load(BaseModel.resolve(tmp_path / "model"), "float32")
    torch.testing.assert_close(logits(merged), logits(packed), rtol=1e-4, atol=1e-5)
    for name, parameter in merged.named_parameters():  # what is no target is as it is there, to the bit
        module = name.removesuffix(".weight")
        if module in layers and module not in adapter.R:
            turned = isinstance(merged.get_submodule(module), Conv1D)
            expected = dequantize(layers[module].weight)
            assert torch.equal(parameter, expected.T if turned else expected), name
            assert not torch.equal(parameter, exact.get_parameter(name)), name
        elif module not in adapter.R and name not in adapter.head:
            assert torch.equal(parameter, exact.get_parameter(name)), name


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_base_in_sixteen_bits_is_rounded_in_them(dtype: str, tmp_path: Path) -> None:
    """As it is when it is loaded: an entry that NF4 stands for is rounded to bf16 before the update is added."""
    base = BaseModel.resolve(make_llama(tmp_path / "base", dtype=torch.bfloat16, shards="20KB"))
    adapter = save_adapter(base.folder, base.load(), tmp_path / "a", LLAMA_MODULES, relative_size=0.3)
    result = merge(adapter, tmp_path / "model", base_dtype="nf4", dtype=dtype, max_shard_size="20KB")
    assert result["shards"] > 2
    merged, packed = BaseModel.resolve(tmp_path / "model").load(), base.load(dtype="nf4")
    stored = torch.bfloat16 if dtype == "auto" else torch.float32
    for name, R in adapter.R.items():
        factors = adapter.load_basis().modules[name]
        update = adapter.scaling * factors.B.double() @ R.double() @ factors.A.double()
        expected = dequantize(packed.get_submodule(name).weight) + update
        found = merged.get_submodule(name).weight
        assert found.dtype == stored
        assert (found != expected.to(stored)).sum() <= 1
    untouched = "model.layers.0.self_attn.k_proj"
    expected = dequantize(packed.get_submodule(untouched).weight).to(stored)
    assert torch.equal(merged.get_submodule(untouched).weight, expected)


def test_a_weight_of_many_pieces_is_rounded_as_one_of_a_single_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseModel.resolve(make_llama(tmp_path / "base", width=64))
    adapter = save_adapter(base.folder, base.load(), tmp_path / "a", LLAMA_MODULES, relative_size=0.3)
    merge(adapter, tmp_path / "whole", base_dtype="nf4")
    monkeypatch.setattr(sums, "BLOCK", 4 * 64)
    monkeypatch.setattr(write, "PIECE", 8 * 64)
    merge(adapter, tmp_path / "in-pieces", base_dtype="nf4")
    whole, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "in-pieces"))
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_exact_weights_are_told_from_rounded_ones(llama: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(llama)
    adapter = save_adapter(llama, base.load(), tmp_path / "a", LLAMA_MODULES, relative_size=0.1)
    merge(adapter, tmp_path / "model", base_dtype="nf4")
    with pytest.raises(Exception, match="the merged logits differ"):
        compare_logits(base, [adapter], tmp_path / "model", NOT_ROUNDED)


@pytest.mark.parametrize(("trained", "base_dtype"), [("nf4", "auto"), ("auto", "nf4")])
def test_onto_another_base_than_in_training_is_told(
    trained: str, base_dtype: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", LLAMA_MODULES, relative_size=0.1)
    adapter.training = {"settings": {"dtype": trained}}
    merge(adapter, tmp_path / "model", base_dtype=trained)
    assert "was trained beside" not in caplog.text
    merge(adapter, tmp_path / "other", base_dtype=base_dtype)
    assert "was trained beside" in caplog.text
    merge([(adapter, 0.5)], tmp_path / "weighted", base_dtype=base_dtype)
    assert "Some of the adapters were trained beside" in caplog.text


def test_weights_under_other_names_are_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseModel.resolve(llama)
    adapter = save_adapter(llama, base.load(), tmp_path / "a", LLAMA_MODULES)
    known = BaseModel.tensor_key
    monkeypatch.setattr(BaseModel, "tensor_key", lambda self, name: None if "k_proj" in name else known(self, name))
    with pytest.raises(BaseModelError, match=r"the weight of model\.layers\.0\.self_attn\.k_proj in another form"):
        merge(adapter, tmp_path / "model", base_dtype="nf4")
    assert not (tmp_path / "model").exists()


def test_the_command_line_takes_it(llama: Path, tmp_path: Path) -> None:
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", LLAMA_MODULES, relative_size=0.3)
    words = ["merge", str(tmp_path / "a"), "--base-dtype", "nf4", "--out", str(tmp_path / "model")]
    assert "base in four bits" in lorasb(*words, "--dry-run").output
    assert lorasb(*words, "--verify").exit_code == 0
    assert "rounded to NF4 (four bits)" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(SettingsError, match=r"base_dtype is 'nf8'\. Use auto, nf4"):
        merge(Adapter.load(tmp_path / "a"), tmp_path / "other", base_dtype="nf8")
