"""Which layers a name of targets stands for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear

from lorasb_export.base.products import is_linear
from lorasb_export.errors import BaseModelError, SettingsError
from lorasb_export.layers.targets import find_targets
from tests.families import MOE, SIZES


def empty(model_type: str, *, classifies: bool = False, **fields: Any) -> PreTrainedModel:
    """A small model without weights."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    with torch.device("meta"):
        kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(config)
    return model


def test_a_linear_layer_that_computes_something_else_is_none() -> None:
    """PhiMoE's router, a subclass of Linear, returns what it has chosen; Falcon's computes what Linear does."""
    phimoe = empty("phimoe", num_local_experts=4)
    routers = {name for name, module in phimoe.named_modules() if isinstance(module, torch.nn.Linear)}
    assert any(name.endswith("router") for name in routers)
    assert {name.rpartition(".")[2] for name in find_targets(phimoe, "all-linear")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert is_linear(FalconLinear(2, 2))


def test_the_body_may_have_another_name_than_the_prefix() -> None:
    network = empty("llama4_text", num_local_experts=2)
    assert not hasattr(network, network.base_model_prefix)
    assert "model.layers.0.self_attn.q_proj" in find_targets(network, "all-linear")


def test_a_body_alone_has_no_layers_to_find() -> None:
    with pytest.raises(BaseModelError, match=r"no linear layer in LlamaModel\.model"):
        find_targets(empty("llama").model, "all-linear")


def test_targets_by_regular_expression() -> None:
    network = empty("llama")
    found = find_targets(network, r"model\.layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)")
    assert {name.removeprefix("model.layers.1.") for name in found} == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.up_proj",
    }
    assert len(find_targets(network, r".*_proj|lm_head")) == 14  # never a head
    with pytest.raises(SettingsError, match="not a regular expression"):
        find_targets(network, "model.(layers")
    for nothing in (r"q_proj$", "", ","):  # a regular expression matches whole names
        with pytest.raises(SettingsError, match=r"matches no module.*down_proj, gate_proj"):
            find_targets(network, nothing)


def test_oracle_23_targets_that_share_a_weight_are_refused() -> None:
    network = empty("llama")
    first, second = network.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    with pytest.raises(BaseModelError, match=r"0\.self_attn\.q_proj and .*1\.self_attn\.q_proj share.*--targets"):
        find_targets(network, "all-linear")
    assert len(find_targets(network, "k_proj,v_proj,o_proj,mlp.up_proj")) == 8
    second.self_attn.q_proj = first.self_attn.q_proj  # the same module at two places
    with pytest.raises(BaseModelError, match="share one weight"):
        find_targets(network, "q_proj")


@pytest.mark.parametrize(
    ("model_type", "fields", "ending"),
    [
        ("qwen2", {}, r"\.mlp\.down_proj"),
        ("phi3", {}, r"\.mlp\.down_proj"),
        ("gemma3_text", {}, r"\.mlp\.down_proj"),
        ("qwen3", {"head_dim": 16}, r"\.mlp\.down_proj"),  # its attention's output has that shape too
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, r"\.fc2"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, r"\.mlp\.c_proj"),
        ("gpt_neox", {}, r"\.mlp\.dense_4h_to_h"),
        ("bert", {"classifies": True}, r"[0-9]\.output\.dense"),
        ("distilbert", {"classifies": True, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, r"\.ffn\.lin2"),
        ("modernbert", {"classifies": True}, r"\.mlp\.Wo"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_the_output_of_every_mlp(model_type: str, fields: dict[str, Any], ending: str) -> None:
    model = empty(model_type, **fields)
    expected = {name for name, _ in model.named_modules() if re.search(f"{ending}$", name)}
    assert set(find_targets(model, "mlp-output")) == expected
    assert len(expected) == 2


def test_a_mixture_of_experts_has_no_output_of_an_mlp() -> None:
    with pytest.raises(SettingsError, match="'mlp-output' matches no module"):
        find_targets(empty("mixtral", **MOE), "mlp-output")
