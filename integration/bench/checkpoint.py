"""A checkpoint of Llama's shape with random weights, of any size, made without a model in memory, and an adapter."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.files.storage import write_json
from lorasb_export.layers.factors import ModuleBasis
from tests.tiny import save_tokenizer

RANK = 64
_RELATIVE_SIZE = 0.02  # ‖Δ‖ / ‖W0‖ of every module


def make_checkpoint(folder: Path, gb: float, shard_mb: int) -> tuple[Path, Adapter]:
    """`base`, of at least `gb` in bf16, and `adapter`, on all its projections, in `folder`."""
    base = make_base(folder / "base", gb, shard_mb)
    return base, _make_adapter(base, folder / "adapter")


def make_base(folder: Path, gb: float, shard_mb: int) -> Path:
    """At least `gb` of random bf16 in Llama's shape and names, written without a model in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 1024 if gb < 1 else 4096
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=math.ceil((gb * 1e9 - 4 * 32000 * width) / (26 * width**2)),
        num_attention_heads=width // 128,
        num_key_value_heads=width // 512,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(folder)
    save_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 23, generator=generator) * 0.02).bfloat16()  # drawn once: 4e9 draws take a minute
    shards: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if sum(2 * math.prod(shapes[other]) for other in shards[-1]) + 2 * math.prod(shape) > shard_mb * 10**6:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard(folder / file, {name: shapes[name] for name in names}, block)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def _write_shard(path: Path, shapes: Mapping[str, torch.Size], block: torch.Tensor) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            left = math.prod(shape)
            while left:
                start = (number * 7919 + left) % (len(block) // 2)
                part = block[start : start + min(left, len(block) // 2)]
                file.write(part.view(torch.int16).numpy().data)
                left -= len(part)
        file.flush()
        os.fsync(file)


def _make_adapter(base: Path, folder: Path) -> Adapter:
    found = BaseModel.resolve(base)
    names = [name.removesuffix(".weight") for name in found.tensors if "_proj" in name]
    generator = torch.Generator().manual_seed(1)
    modules, R = {}, {}
    for name in names:
        rows, columns = found.tensors[f"{name}.weight"][1].shape
        B = torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0]
        A = torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous()
        modules[name] = ModuleBasis(B.bfloat16(), A.bfloat16(), torch.ones(RANK))
        R[name] = torch.randn(RANK, RANK, generator=generator) / RANK
        R[name] *= _RELATIVE_SIZE * 0.02 * (rows * columns) ** 0.5 / float(R[name].norm())
    basis = Basis(found.ref(names), RANK, modules, {"samples": 0})
    adapter = Adapter(basis.base, basis.sha256, None, R, basis=basis)
    adapter.save(folder)
    return adapter
