"""A tiny random model with adapters, to export, and prompts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.layers.factors import ModuleBasis
from tests.tiny import VOCABULARY, save_tokenizer

from .reference import greedy, random_prompts

RANK, EOS, TOKENS = 8, 2, 24
PROMPTS = random_prompts(3, 17, 9, 1, 17, 30, 2, 5, 11)  # more than one batch, of unequal rows


def save_basis(base: Path, folder: Path, modules: list[str], seed: int) -> Basis:
    """Orthonormal random factors for `modules` of the model in `base`."""
    generator = torch.Generator().manual_seed(seed)
    network = BaseModel.resolve(base).load(device="cpu")

    def factor(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, RANK, generator=generator)).Q

    factors = {}
    for name in modules:
        rows, columns = network.get_submodule(name).weight.shape
        factors[name] = ModuleBasis(factor(rows), factor(columns).T.contiguous(), torch.ones(RANK))
    Basis(BaseModel.resolve(base).ref(factors), RANK, factors, {"seed": seed}).save(folder)
    return Basis.load(folder)


def save_adapter(basis: Basis, folder: Path, seed: int, scaling: float = 1.0, **options: Any) -> Path:
    """A random R, not symmetric, large enough to change the answers."""
    generator = torch.Generator().manual_seed(seed)
    R = {name: 0.5 * torch.randn(RANK, RANK, generator=generator) for name in basis.modules}
    Adapter(basis.base, basis.sha256, basis.source, R, scaling, basis=basis, **options).save(folder)
    return folder


def make_world(root: Path) -> Path:
    """A random Llama with grouped queries and biases; adapters red and blue of one basis, stranger of another."""
    save_tokenizer(root / "base")
    (root / "base" / "LICENSE").write_text("for anybody")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    network = LlamaForCausalLM(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(root / "base")
    modules = [name for name, module in network.named_modules() if "proj" in name and hasattr(module, "weight")]
    basis = save_basis(root / "base", root / "basis", modules, seed=1)
    save_adapter(basis, root / "red", seed=10)
    save_adapter(basis, root / "blue", seed=11, scaling=0.5)
    save_adapter(save_basis(root / "base", root / "basis2", modules[:3], seed=2), root / "stranger", seed=12)
    return root


def answers(network: PreTrainedModel, eos: set[int]) -> list[list[int]]:
    return [greedy(network, prompt, TOKENS, eos) for prompt in PROMPTS]
