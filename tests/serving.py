"""Adapters to serve, and what would be started for them with a vLLM that seems to be installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lorasb_export.choices import SEQ_CLS
from lorasb_export.serving import launcher, plan, shared
from lorasb_export.serving.launcher import api_key
from tests.random_adapter import save_adapter, save_base

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
DEFAULTS: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, **dict.fromkeys(("mode", "dtype"), "auto")}
DEFAULTS |= {"model": None, "extra": (), "updates_from": None}


def make_served(path: Path) -> Path:
    """Two bases; adapters a and b of the first, other of the second, a classifier."""
    for name, seed in (("base", 0), ("base2", 1)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
        base = save_base(model, path / name)
        for adapter, rank in (("a", 4), ("b", 9)) if name == "base" else (("other", 4),):
            save_adapter(base, model, path / adapter, MODULES, rank=rank)
    classifier = BertForSequenceClassification(BertConfig(**SIZES, num_attention_heads=4))
    modules = ["bert.encoder.layer.0.output.dense"]
    save_adapter(save_base(classifier, path / "bert"), classifier, path / "cls", modules, task_type=SEQ_CLS)
    return path


def install(monkeypatch: pytest.MonkeyPatch, distribution: str, version: str = "0.32.0") -> None:
    """As if that vLLM were installed, and no other."""

    def version_of(name: str) -> str:
        if name != distribution:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(shared, "version", version_of)


def dry_run(adapters: Any, api_key_file: Path | None = None, **options: Any) -> dict[str, Any]:
    named, has_key = launcher._named(adapters), bool(api_key(api_key_file))
    return plan.make_plan(named, **DEFAULTS | options, has_key=has_key).describe()
