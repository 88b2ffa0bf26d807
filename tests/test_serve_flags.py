"""Flags of vLLM's own after `--`: which are read, refused, or handed on, and what else `serve` refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.errors import SettingsError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.serving import flags, plan
from tests import serving
from tests.serving import DEFAULTS, dry_run, value_of

folder, plugin, vllm_for_cpus = serving.folder, serving.plugin, serving.vllm_for_cpus


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


@pytest.mark.parametrize(
    ("given", "more"),
    [
        (['{"top_k": 5}'], ['{"top_k": 5, "repetition_penalty": 1.0}']),
        (["{}", "--override_generation-config", '{"top_p": 0.5}'], ['{"top_p": 0.5, "repetition_penalty": 1.0}']),
        (["{}"], []),  # asks for the base's
        (['{"repetition_penalty": 1.3}'], []),
        (['{"top_k": 5, "repetition_penalty": null}'], []),
        *(([bad], []) for bad in ("{", "[1]", "5")),  # left to vLLM
    ],
)
def test_other_parameters_of_the_users_do_not_bring_the_penalty_back(
    folder: Path, tmp_path: Path, given: list[str], more: list[str]
) -> None:
    """Nor do they go: vLLM takes the last of these flags, and no more."""
    base, flag = shutil.copytree(folder / "base", tmp_path / "base"), "--override-generation-config"
    write_json(base / "generation_config.json", {"repetition_penalty": 1.1})
    extra = [flag, *given]
    command = dry_run({}, model=str(base), extra=extra)["command"]
    assert command[command.index(flag) :] == [*extra, *([flag, *more] if more else [])]


def test_the_penalty_is_left_out_beside_parameters_that_are_given_key_by_key() -> None:
    """vLLM makes the last of these flags of them."""
    flag, penalty = "--override-generation-config", "repetition_penalty"
    assert flags.without_penalty([f"{flag}.top_k", "5"]) == [f"{flag}.{penalty}", "1.0"]
    assert flags.without_penalty([flag, "{}", f"{flag}.top_k=5"]) == [f"{flag}.{penalty}", "1.0"]
    assert flags.without_penalty([f"{flag}.{penalty}=1.3", f"{flag}.top_k=5"]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "shared", "adapters": {"a": "a", "b": "b"}}, "of 2 bases.*--mode folded"),
        ({"mode": "fast"}, "mode is 'fast'.*shared, folded, auto"),
        ({"extra": ["--port=1"]}, "not a flag to hand to vLLM here.*--port"),
        *(
            ({"extra": [flag, "x"]}, f"not a flag to hand to vLLM here.*{flag}")
            for flag in ("--model", "--host", "--uds", "--ssl-keyfile", "--ssl-certfile")
        ),
        ({"extra": ["--lora_modules", "x=y"]}, "--lora-modules"),
        ({"extra": ["billing", "--max-model-len", "64"]}, "not a flag.*--adapters billing"),
        ({"extra": ["--api-key", "s3cret"]}, "VLLM_API_KEY"),
        ({"extra": ["--config", "flags.yaml"]}, r"not read here \(--config\)\. Give the flags in it after --"),
        ({"extra": ["--api-ke", "s3cret"]}, "--api-ke may be short for --api-key"),
        ({"extra": ["--shutdown", "9"]}, "--shutdown may be short for --shutdown-timeout"),
        ({"extra": ["--por=9000"]}, "--por may be short for --port"),
        ({"extra": ["--override-generation-conf.top_k=5"]}, "may be short for --override-generation-config"),
        ({"extra": ["--api-server-count", "2"]}, "ignores it"),
        ({"extra": ["--lora-target-modules", "q_proj"]}, "leave out a part of each adapter in silence"),
        ({"extra": ["--lora-dtype=bfloat16"]}, "Use the option --dtype"),
        ({"extra": ["-asc=2"]}, r"ignores it.*\(--api-server-count\)"),
        ({"extra": ["-as", "2"]}, "-as may be short for -asc"),
        ({"extra": ["--max_lora", "1"]}, "--max-lora may be short for --max-loras.*in full"),
        ({"extra": ["--max-cpu", "1"]}, "--max-cpu may be short for --max-cpu-loras.*in full"),
        *(
            ({"extra": [word], "mode": mode}, rf"adapters of the first \({flag}\)\. Leave it out")
            for word, flag in (("--enable_dbo", "--enable-dbo"), ("--ubatch-size=2", "--ubatch-size"))
            for mode in ("shared", "folded")
        ),
        ({"extra": ["--enable-db"]}, "--enable-db may be short for --enable-dbo"),
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


@pytest.mark.parametrize(
    "flag",
    [
        *(
            "--enable-sleep-mode",
            "--fully-sharded-loras",
            "--kv-sharing-fast-prefill",
            "--served-model-name",
            "--dtype",
        ),
        *("--distributed-executor-backend", "--data-parallel-size", "--data-parallel-backend", "--lora-modules"),
        *(
            "--override-generation-config",
            "--tensor-parallel-size",
            "--enable-expert-parallel",
            "--enable-dbo",
            "--ubatch-size",
        ),
    ],
)
def test_a_flag_that_is_read_is_written_out_in_full(flag: str) -> None:
    flags.refuse_bad(["--seed", "1"])
    with pytest.raises(SettingsError, match=rf"{flag[:-1]} may be short for {flag}"):
        flags.refuse_bad([flag[:-1], "x"])


@pytest.mark.parametrize(
    "extra",
    [
        ["--kv-offloading-size", "8", "--kv-offloading-backend", "lmcache"],
        ["--kv-offloading-size=8", "--kv_offloading_backend=lmcache"],
        ["--kv-transfer-config", '{"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}'],
        ["--kv-transfer-config.kv_connector", "LMCacheConnectorV1"],
        ["--kv-tr.kv_connector=HF3FSKVConnector"],
        ["--kv-transfer-config.kv_connector", "FlexKVConnectorV1"],
        [
            *("--kv-transfer-config.kv_connector", "MultiConnector"),
            *("--kv-transfer-config.kv_connector_extra_config.connectors", '[{"kv_connector": "ExampleConnector"}]'),
        ],
    ],
)
def test_a_kv_cache_that_does_not_know_adapters_is_refused_beside_them(folder: Path, extra: list[str]) -> None:
    """By vLLM 0.32 its key is the base's name and the tokens (vllm-project/vllm#44250)."""
    with pytest.raises(SettingsError, match=r"by tokens, not by adapter.*\(--kv-transfer-config\)\. Leave it out"):
        dry_run({"a": folder / "a"}, extra=extra)
    assert dry_run((), model=str(folder / "base"), extra=extra)["command"][-len(extra) :] == extra


def test_a_kv_cache_by_the_hashes_of_vllms_blocks_is_handed_on(folder: Path) -> None:
    for extra in (
        ["--kv-offloading-size", "8"],
        ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
    ):
        assert dry_run({"a": folder / "a"}, extra=extra)["command"][-2:] == extra


def test_a_number_that_is_none_is_left_to_vllm(folder: Path) -> None:
    described = dry_run({"a": folder / "a"}, mode="folded", extra=["--max-loras", "two"])
    assert (described["command"][-2:], described["memory"]["slots"]) == (["--max-loras", "two"], 2)


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        (["--served-model-name", "x", "y", "--seed", "1"], ["x", "y"]),
        (["--served_model_name=z"], ["z"]),
        (["--served-model-name", "x", "y", "--served-model-name", "z"], ["z"]),  # the last counts
    ],
)
def test_a_name_that_is_given_to_the_base_is_its_name(folder: Path, extra: list[str], names: list[str]) -> None:
    adapters = {"base": folder / "a"}  # as the base's folder is called
    assert dry_run(adapters, extra=extra)["models"] == [*names, "base"]
    with pytest.raises(SettingsError, match=f"'{names[0]}' is the name of the base and of an adapter"):
        dry_run({names[0]: folder / "a"}, extra=extra)
