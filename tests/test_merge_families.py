"""Merged logits = unmerged logits on a tiny random checkpoint of every family; experts are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from lorasb_export import Adapter, merge
from lorasb_export.base import BaseModel
from lorasb_export.errors import BaseModelError
from tests.random_adapter import save_adapter
from tests.tiny import VOCABULARY, save_tokenizer

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MOE = {"moe_intermediate_size": 16, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
SPLIT = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen2": ("Qwen2", {}, SPLIT),
    "qwen3": ("Qwen3", {}, SPLIT),
    "mistral": ("Mistral", {}, SPLIT),
    "gemma2": ("Gemma2", {}, SPLIT),
    "gemma3": ("Gemma3", {}, SPLIT),
    "phi3": ("Phi3", {}, ["self_attn.qkv_proj", "mlp.gate_up_proj"]),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, ["self_attn.q_proj", "fc1"]),
    "mixtral": ("Mixtral", MOE, ATTENTION),
    "qwen3_moe": ("Qwen3Moe", MOE, ATTENTION),
}
FUSED = ("mixtral", "qwen3_moe")  # the model holds the experts of a layer as one tensor, the checkpoint one by one
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])


def make(folder: Path, family: str) -> Path:
    name, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(t, CONFIGS.get(name, f"{name}Config"))(**SIZES, **own)
    getattr(t, f"{name}ForCausalLM")(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


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


def test_an_adapter_on_experts_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "mixtral")
    network = BaseModel.resolve(base).load()
    adapter = save_adapter(base, network, tmp_path / "a", ["model.layers.0.self_attn.q_proj"])
    adapter.R = {"model.layers.0.mlp.experts.gate_up_proj": adapter.R["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(BaseModelError, match=r"no weight for module model\.layers\.0\.mlp\.experts"):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_gemma_2_bounds_its_attention_scores(tmp_path: Path) -> None:
    """transformers' default, sdpa, does not."""
    found = BaseModel.resolve(make(tmp_path / "base", "gemma2")).load()
    eager = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(found), logits(eager))
    assert not torch.equal(logits(eager), logits(plain))
