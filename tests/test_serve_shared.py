"""The parts of the shared-basis plugin that need no vLLM: the product by token, and the reading of R."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorasb_export.adapter import Adapter
from lorasb_export.basis import Basis
from lorasb_export.errors import ArtifactError, OutputError
from lorasb_export.format import sealed
from lorasb_export.serving import shared
from lorasb_export.serving.shared import plugin
from lorasb_export.serving.shared.loading import copy_adapter, load_R
from lorasb_export.serving.shared.routes import Block, Routes
from lorasb_export.serving.shared.versions import Versions
from lorasb_export.storage import read_json, write_json
from tests.random_adapter import save_adapter, save_base

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SLOTS, RANK = 3, 4


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", MODULES, rank=RANK)


def load(adapter: Adapter) -> tuple[list[str], torch.Tensor]:
    assert adapter.folder is not None
    return load_R(adapter.folder, Basis.load(adapter.folder))


@pytest.mark.parametrize(
    "slots",
    [
        [0],
        [-1, 0, 2, 1, -1, 0],  # decode
        [1] * 9,  # one prompt
        [-1] * 9 + [0, 2, -1] + [2] * 20 + [1],  # prompts and decode in one step
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_every_token_meets_the_R_of_its_slot(slots: list[int], parts: int) -> None:
    R = torch.randn(SLOTS + 1, 4, RANK, RANK)
    R[SLOTS] = 0
    first = 4 - parts
    u = torch.randn(max(3, len(slots)), parts, RANK)
    routes = Routes(R.mT.contiguous(), 64)
    for wrong in ([0, 1, 2], slots):  # a step before this one leaves nothing behind
        routes.update(torch.tensor(wrong))
        v = routes.product(u[: len(wrong)].flatten(1), parts, first).view(-1, parts, RANK)
    expected = torch.stack(
        [torch.einsum("ijk,ik->ij", R[slot, first:], row) for slot, row in zip(slots, u, strict=False)]
    )
    torch.testing.assert_close(v, expected)
    base = torch.tensor(slots) < 0
    assert not v[base].any()
    spans = [(slice(0, RANK), slice(RANK * part, RANK * (part + 1))) for part in range(parts)]
    columns, rows = torch.arange(RANK * parts), torch.arange(8)
    blocks = [Block.of(columns, rows, block, 8 * part) for part, block in enumerate(spans)]
    y = torch.zeros(len(slots), 8 * parts)
    routes.add_blocks(y, u[: len(slots)].flatten(1), blocks, first)
    torch.testing.assert_close(y.view(-1, parts, 8), torch.cat([expected, torch.zeros_like(expected)], dim=-1))


@pytest.mark.parametrize("slots", [[0, -1, 2], [1] * 9])
@pytest.mark.parametrize("columns", [[range(12)], [range(6), range(6, 12)], [range(9), range(9, 12)]])
@pytest.mark.parametrize("rows", [[range(10)], [range(5), range(5, 10)], [[0, 1, 2, 5, 6], [3, 4, 7, 8, 9]]])
def test_a_block_may_lie_in_several_processes(
    slots: list[int], columns: list[Sequence[int]], rows: list[Sequence[int]]
) -> None:
    """Each has some columns or some rows of W; of a module that fills several slices, some of each."""
    block, R = (slice(3, 3 + RANK), slice(5, 5 + RANK)), torch.randn(SLOTS + 1, 1, RANK, RANK)
    R[SLOTS] = 0
    routes = Routes(R.mT.contiguous(), 64)
    routes.update(torch.tensor(slots))
    x, expected = torch.randn(len(slots), 12), torch.zeros(len(slots), 10)
    expected[:, block[0]] = torch.stack([R[slot, 0] @ row for slot, row in zip(slots, x[:, block[1]], strict=True)])
    found = torch.zeros_like(expected)
    for own_columns in columns:
        for own_rows in rows:
            y = torch.zeros(len(slots), 2 + len(own_rows))
            own = Block.of(torch.tensor(own_columns), torch.tensor(own_rows), block, 2)
            routes.add_blocks(y, x[:, list(own_columns)], [own], 0)
            assert not y[:, :2].any()
            found[:, list(own_rows)] += y[:, 2:]
    torch.testing.assert_close(found, expected)


def test_a_step_of_the_base_alone_is_idle() -> None:
    routes = Routes(torch.zeros(SLOTS + 1, 1, RANK, RANK), 64)
    routes.update(torch.tensor([-1, -1]))
    assert routes.idle
    routes.update(torch.tensor([-1, 2]))
    assert not routes.idle


def test_R_is_read_as_one_block(adapter: Adapter) -> None:
    names, R = load(adapter)
    for name, matrix in zip(names, R, strict=True):
        torch.testing.assert_close(matrix, adapter.scaling * adapter.R[name], rtol=0, atol=0)
    assert sorted(names) == sorted(MODULES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"format_version": 2}, "format version 2"),
        ({"basis": {"sha256": "0" * 64, "source": "embedded"}}, "another basis"),
        ({"scaling": math.inf}, "non-finite"),
    ],
)
def test_a_foreign_config_is_refused(adapter: Adapter, change: dict[str, object], message: str) -> None:
    assert adapter.folder is not None
    path = adapter.folder / "adapter_config.json"
    write_json(path, sealed(read_json(path) | change))
    with pytest.raises(ArtifactError, match=message):
        load(adapter)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nan", "non-finite"),
        ("minus infinity", "non-finite"),
        ("shape", "not F32"),
        ("dtype", "not F32"),
        ("missing", "not one R for each module"),
        ("truncated", "truncated"),
        ("one bit", "not the tensors that the config names"),
        ("another version's", "not the tensors that the config names"),
    ],
)
def test_damaged_tensors_are_refused(adapter: Adapter, damage: str, message: str) -> None:
    assert adapter.folder is not None
    path = adapter.folder / "adapter.safetensors"
    tensors = load_file(path)
    key = f"{MODULES[0]}.R"
    if damage == "nan":
        tensors[key][1, 2] = math.nan
    elif damage == "minus infinity":
        tensors[key][1, 2] = -math.inf
    elif damage == "shape":
        tensors[key] = tensors[key][:2].contiguous()
    elif damage == "dtype":
        tensors[key] = tensors[key].half()
    elif damage == "missing":
        del tensors[key]
    elif damage == "another version's":
        tensors[key] += 1
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-5:]
    elif damage == "one bit":
        content[-2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        load(adapter)


def test_an_adapter_that_cannot_be_read_is_no_full_disk(adapter: Adapter, tmp_path: Path) -> None:
    """As while `fit --overwrite` puts another one in its place."""
    with pytest.raises(ArtifactError, match="cannot read the adapter: No such file"):
        copy_adapter(tmp_path / "gone", tmp_path / "copy")
    assert adapter.folder is not None
    with pytest.raises(OutputError, match="Set TMPDIR"):
        copy_adapter(adapter.folder, tmp_path / "nowhere" / "copy")


def test_a_version_is_kept_while_it_may_be_read(adapter: Adapter, tmp_path: Path) -> None:
    """Two versions of one name: the one that no name stands for goes when its time is over, and not before."""
    assert adapter.folder is not None
    (tmp_path / "updates").mkdir()
    versions = Versions(tmp_path / "updates", seconds=0.2)
    paths = []
    for scaling in (1.0, 2.0):
        copy = tmp_path / "copy"
        copy_adapter(adapter.folder, copy)
        write_json(copy / "adapter_config.json", sealed(read_json(copy / "adapter_config.json") | {"scaling": scaling}))
        paths.append(versions.keep("a", copy))
    old, new = paths
    versions.sweep([str(new)])
    assert old.is_dir()
    time.sleep(0.3)
    versions.sweep([str(old), str(new)])  # it was loaded again
    versions.sweep([str(new)])
    assert old.is_dir()
    time.sleep(0.3)
    versions.sweep([str(new)])
    assert not old.exists()
    assert (new / "adapter.safetensors").is_file()


def answered(app: Any, scope: dict[str, Any], body: bytes = b"") -> int:
    """The status of what `app` answers."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    status: int = sent[0]["status"]
    return status


@pytest.mark.parametrize(
    ("authorization", "body", "status"),
    [
        ("Bearer s3cret", b"[" * 100_000, 400),
        ("Bearer s3cret", b'{"lora_name": "x", "lora_name": "y"}', 400),
        ("Bearer s3cret", b"\xff", 400),
        ("Bearer s3cret", b'{"lora_name": "text"}', 400),
        ("bearer s3cret", b"{", 400),  # vLLM takes the scheme in any case
        ("Bearer S3CRET", b"{", 401),
        ("Basic s3cret", b"{", 401),
        ("", b"{", 401),
    ],
)
def test_a_bad_request_for_an_update_is_answered(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authorization: str, body: bytes, status: int
) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.key import AsksForKey
    from lorasb_export.serving.shared.updates import LOAD, Updates

    variables = {shared.BASIS_VARIABLE: "a", shared.UPDATES_VARIABLE: "", shared.VERSIONS_VARIABLE: "versions"}
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": LOAD}
    scope["headers"] = [(b"authorization", authorization.encode())]
    scope["app"] = SimpleNamespace(state=SimpleNamespace(openai_serving_models=None))
    assert answered(AsksForKey(Updates(Response())), scope, body) == status


@pytest.mark.parametrize(("path", "status"), [("loop", 400), ("a", 507)])
def test_a_full_disk_is_the_servers_fault_and_a_link_to_itself_the_clients(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, status: int
) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.shared.updates import LOAD, Updates

    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "versions").mkdir()
    variables = {shared.BASIS_VARIABLE: "a", shared.UPDATES_VARIABLE: "", shared.VERSIONS_VARIABLE: "versions"}
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(shutil, "copyfile", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    models = SimpleNamespace(is_base_model=lambda name: False)
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": LOAD, "headers": []}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))
    body = json.dumps({"lora_name": "x", "lora_path": path}).encode()
    assert answered(Updates(Response()), scope, body) == status


@pytest.mark.parametrize(
    ("kind", "method", "path", "status"),
    [
        ("http", "GET", "/health", 200),
        ("http", "GET", "/metrics", 200),
        ("http", "OPTIONS", "/v1/completions", 200),
        ("http", "POST", "/v1/completions", 401),
        ("http", "POST", "/invocations", 401),
        ("http", "POST", "/health", 401),
        ("http", "GET", "/health/", 401),
        ("http", "GET", "/", 401),
        ("websocket", None, "/health", 401),
    ],
)
def test_what_is_open_without_the_key(
    kind: str, method: str | None, path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.key import AsksForKey

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    scope: dict[str, Any] = {"type": kind, "method": method, "path": path, "headers": []}
    assert answered(AsksForKey(Response()), scope) == status
    scope["headers"] = [(b"authorization", b"Bearer s3cret")]
    assert answered(AsksForKey(Response()), scope) == 200


def test_the_plugin_is_inert_without_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shared.BASIS_VARIABLE, raising=False)
    monkeypatch.delenv(shared.FOLDED_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of vLLM would raise
    plugin.register()


@pytest.mark.parametrize(("version", "mended"), [("0.32.0", True), ("0.33.0", False)])
def test_of_a_folded_server_only_the_metrics_are_mended(
    version: str, mended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client")
    from lorasb_export.serving.shared.gauge import LatestGauge

    monkeypatch.setenv(shared.BASIS_VARIABLE, "")
    monkeypatch.setenv(shared.FOLDED_VARIABLE, "1")
    logger = SimpleNamespace(_gauge_cls=None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))  # without a module of LoRA
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.loggers", SimpleNamespace(PrometheusStatLogger=logger))
    plugin.register()
    assert logger._gauge_cls is (LatestGauge if mended else None)


def test_a_vllm_that_was_not_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "version", {"vllm": "0.99.1+cpu"}.__getitem__)
    assert "vLLM 0.99.1 is not one of the tested versions (0.32.0)" in str(shared.why_unavailable())

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(shared, "version", missing)
    assert shared.why_unavailable() == "vLLM is not installed"
