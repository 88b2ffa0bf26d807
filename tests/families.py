"""Families of models, each as a tiny random checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import load_file, save_file

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
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Qwen3_5": "Qwen3_5TextConfig"}
# What the checkpoint calls the body, which is `model.` in the network → as above.
RENAMED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "model.language_model.": ("Qwen3_5", {"layer_types": ["full_attention"] * 2}, ["self_attn.o_proj", "mlp.up_proj"]),
    "backbone.": ("NemotronH", {"layers_block_type": ["attention", "mlp"]}, ["mixer.o_proj", "mixer.up_proj"]),
}


def make(folder: Path, family: str) -> Path:
    name, own, _ = (FAMILIES | RENAMED)[family]
    torch.manual_seed(0)
    config = getattr(t, CONFIGS.get(name, f"{name}Config"))(**SIZES, **own)
    getattr(t, f"{name}ForCausalLM")(config).save_pretrained(folder)
    save_tokenizer(folder)
    if family in RENAMED:  # transformers does so where it has read such a checkpoint
        body = re.compile(r"^model\.(?!language_model\.)")
        tensors = {body.sub(family, key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
