"""Merged logits = unmerged logits on a tiny random checkpoint of every family; experts are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t

from lorasb_export import Adapter, calibrate, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import BaseModelError
from lorasb_export.files.storage import read_header
from lorasb_export.settings import CalibrationSettings
from tests.families import FAMILIES, RENAMED, make
from tests.random_adapter import save_adapter

FUSED = ("mixtral", "qwen3_moe")  # the model holds the experts of a layer as one tensor, the checkpoint one by one
IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return network(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_unmerged(family: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", family)
    network = BaseModel.resolve(base).load()
    plain = logits(network)
    suffixes = tuple(f".{suffix}" for suffix in FAMILIES[family][2])
    modules = [name for name, _ in network.named_modules() if name.endswith(suffixes)]
    assert len(modules) == 2 * len(suffixes)
    save_adapter(base, network, tmp_path / "a", modules, relative_size=0.3)
    Adapter.load(tmp_path / "a").inject(network)
    result = merge(tmp_path / "a", tmp_path / "model", verify=True)
    assert result["verify"]["relative_difference"] < 1e-5
    assert result["verify"]["streamed"] == (family not in FUSED)
    merged = logits(BaseModel.resolve(tmp_path / "model").load())
    expected = logits(network)
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (merged - plain).abs().max() > 1e-2 * plain.abs().max()  # the adapter does something


@pytest.mark.parametrize("body", RENAMED)
def test_a_body_that_the_checkpoint_calls_otherwise(body: str, sums: Path, tmp_path: Path) -> None:
    """And merged folders too: vLLM reads them as it reads the base."""
    base, modules = make(tmp_path / "base", body), RENAMED[body][2]
    keys = set(read_header(base / "model.safetensors"))
    assert keys == {key for key in keys if key.startswith(body)} | {"lm_head.weight"}
    basis = calibrate(base, {"sums": sums}, CalibrationSettings(rank=4, samples=4, targets=",".join(modules)))
    network = BaseModel.resolve(base).load()
    adapter = save_adapter(base, network, tmp_path / "a", list(basis.modules), relative_size=0.3)
    assert adapter.base == basis.base
    plain = logits(network)
    adapter.inject(network)
    found = merge(adapter, tmp_path / "model", verify=True)["verify"]
    assert (found["relative_difference"] < 1e-5, found["streamed"]) == (True, True)
    assert set(read_header(tmp_path / "model" / "model.safetensors")) == keys
    merged, expected = logits(BaseModel.resolve(tmp_path / "model").load()), logits(network)
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (merged - plain).abs().max() > 1e-2 * plain.abs().max()


def test_an_adapter_on_experts_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "mixtral")
    network = BaseModel.resolve(base).load()
    adapter = save_adapter(base, network, tmp_path / "a", ["model.layers.0.self_attn.q_proj"])
    adapter.R = {"model.layers.0.mlp.experts.gate_up_proj": adapter.R["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(BaseModelError, match=r"no weight for module model\.layers\.0\.mlp\.experts"):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_gemma_2_bounds_its_attention_scores(tmp_path: Path) -> None:
    """The default of older versions of transformers, sdpa, does not."""
    found = BaseModel.resolve(make(tmp_path / "base", "gemma2")).load()
    eager = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    unbounded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_logit_softcapping=None)
    assert torch.equal(logits(found), logits(eager))
    assert not torch.equal(logits(eager), logits(unbounded))
