"""What `serve` would start for adapters that share a basis, and when they do."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as t
from transformers import GPT2Config, GPT2LMHeadModel

from lorasb_export.adapter import Adapter
from lorasb_export.basis import Basis
from lorasb_export.errors import ArtifactError, OutputError, SettingsError
from lorasb_export.files.kind import ADAPTER_FILES
from lorasb_export.serving import choosing, copies, plan
from lorasb_export.serving.modes import Shared
from lorasb_export.serving.shared.loading import copy_adapter, load_R, version_name
from tests import serving
from tests.random_adapter import save_adapter, save_base
from tests.serving import DEFAULTS, MODULES, SIZES, dry_run, install, value_of

folder, plugin, siblings, vllm_for_cpus = serving.folder, serving.plugin, serving.siblings, serving.vllm_for_cpus


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
def test_a_basis_is_as_wide_where_the_base_stores_its_weights_transposed(tmp_path: Path) -> None:
    """As GPT-2 does."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40, n_positions=16))
    save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", ["transformer.h.0.mlp.c_fc"])
    memory = dry_run({"a": tmp_path / "a"}, dtype="float32", mode="shared")["memory"]
    assert memory["basis_bytes"] == 4 * (32 + 4 * 32) * 4


def test_who_needs_the_shared_basis_is_not_told_of_the_other_mode() -> None:
    assert "--mode folded" in Shared({}).advice
    assert Shared({}, updates_from=Path("adapters")).advice == ""


@pytest.mark.usefixtures("plugin")
def test_updates_on_an_accelerator_are_warned_of(
    folder: Path, siblings: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need the shared mode, which is not chosen there otherwise."""
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    said = "the shared basis has not been run on an accelerator yet: compare some answers"
    assert dry_run(siblings, updates_from=folder)["mode"] == "shared"
    assert said not in caplog.text
    install(monkeypatch, "vllm")
    assert dry_run(siblings, updates_from=folder)["mode"] == "shared"
    assert said in caplog.text


@pytest.mark.usefixtures("plugin")
def test_auto_shares_a_basis_where_it_can(
    folder: Path, siblings: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_run(siblings)["mode"] == "shared"
    assert dry_run(siblings, mode="folded")["mode"] == "folded"
    assert not caplog.text
    assert dry_run({"a": folder / "a", "b": folder / "b"})["mode"] == "folded"
    assert "the adapters are of 2 bases" in caplog.text
    monkeypatch.setattr(choosing, "why_unavailable", lambda: "vLLM 9.9 is not one of the tested versions")
    assert dry_run(siblings)["mode"] == "folded"
    with pytest.raises(SettingsError, match=r"vLLM 9\.9 is not one.*--mode folded"):
        dry_run(siblings, mode="shared")


@pytest.mark.usefixtures("plugin")
def test_one_adapter_of_another_basis_is_named_and_where_it_may_be_passed_over(
    folder: Path, siblings: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the first of all. Where nobody asks for a basis that is shared, it is served, and so all are folded."""
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    stray = {"0": folder / "b", **siblings}
    differ = "the basis of a and 1 more is not that of 0: the adapters are of 2 bases"
    for options in ({"mode": "shared"}, {"updates_from": folder}):
        caplog.clear()
        described = dry_run(stray, **options, pass_over=True)
        assert (described["mode"], described["models"]) == ("shared", ["base", "a", "second"])
        assert "Passed over, being of another basis than a and 1 more: 0" in caplog.text
        with pytest.raises(SettingsError, match=differ):  # named, each has to be served
            dry_run(stray, **options)
        with pytest.raises(SettingsError, match="the basis of b is not that of a"):  # which one is to be served?
            dry_run({"b": folder / "b", "a": folder / "a"}, **options, pass_over=True)
        with pytest.raises(SettingsError, match="is not that of a, second"):  # two of four, so no stray
            dry_run({"1": folder / "b", **stray}, **options, pass_over=True)
    assert len(dry_run(stray, pass_over=True)["models"]) == 4
    assert f"Serving folded, with a full LoRA in memory for each adapter: {differ}" in caplog.text


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    "flags",
    [
        *("--enable-sleep-mode", "--distributed-executor-backend ray", "--data_parallel_backend=ray", "-dpb ray"),
        "--fully-sharded-loras",  # for vLLM's own layers
        "--kv-sharing-fast-prefill",  # fewer tokens in later layers than have slots
    ],
)
def test_what_a_shared_basis_would_not_outlive_is_served_folded(
    flags: str, siblings: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM drops its tensors, or starts workers that do not see our variables."""
    assert dry_run(siblings, mode="auto", extra=flags.split())["mode"] == "folded"
    assert "Serving folded" in caplog.text


@pytest.mark.usefixtures("plugin")
def test_experts_are_served_folded(folder: Path) -> None:
    adapter = Adapter.load(folder / "a")
    of_expert = replace(adapter, R={"model.layers.0.mlp.experts.0.up_proj": torch.ones(4, 4)})
    with pytest.raises(SettingsError, match="a shared basis of mixture-of-experts layers is not supported"):
        choosing.choose_mode("shared", adapter.base.resolve(), {"a": of_expert}, (), None)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe", "GraniteMoeShared", "GraniteMoeHybrid"])
def test_engines_of_a_mixture_of_experts_are_served_folded(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2}
    hybrid = {"layer_types": ["attention"] * 2, "mamba_n_heads": 8} if family == "GraniteMoeHybrid" else {}
    config = getattr(t, f"{family}Config")(**SIZES, **attention, **hybrid, num_local_experts=4)
    model = getattr(t, f"{family}ForCausalLM")(config)
    save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", ["model.layers.0.self_attn.o_proj"])
    assert dry_run({"a": tmp_path / "a"})["mode"] == "shared"
    assert dry_run({"a": tmp_path / "a"}, extra=["--data-parallel-size", "2"])["mode"] == "folded"
    assert "an idle engine drops its adapters" in caplog.text


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("mode", ["auto", "folded"])
@pytest.mark.parametrize(("module", "is_split"), [("mlp.shared_expert.up_proj", True), ("self_attn.o_proj", False)])
def test_a_shared_expert_that_would_see_a_part_of_the_tokens_is_refused(
    module: str, is_split: bool, mode: str, tmp_path: Path
) -> None:
    """So it does with all three flags, on every rank, and stock vLLM takes the adapters of the first tokens for it."""
    attention, experts = {"num_attention_heads": 4, "num_key_value_heads": 2}, {"num_experts": 4}
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**SIZES, **attention, **experts, **sizes))
    save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", [f"model.layers.0.{module}"])
    all_three = ["-tp=2", "-dp=2", "-ep"]
    for extra in (*combinations(all_three, 2), ["-tp", "1", "-dp", "2", "-ep"]):
        assert dry_run({"a": tmp_path / "a"}, mode=mode, extra=extra)["models"] == ["base", "a"]
    for extra in (all_three, ["--tensor-parallel-size=2", "--data_parallel_size", "4", "--enable-expert-parallel"]):
        if is_split:
            message = (
                rf"{module} would see a part of the tokens.*\(--enable-expert-parallel\)\. Leave it out, or --tens"
            )
            with pytest.raises(SettingsError, match=message):
                dry_run({"a": tmp_path / "a"}, mode=mode, extra=extra)
        else:
            assert dry_run({"a": tmp_path / "a"}, mode=mode, extra=extra)["mode"] == "folded"


@pytest.mark.usefixtures("plugin")
def test_a_second_stream_for_adapters_is_stock_vllms(
    siblings: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    assert dry_run(siblings, mode="auto")["mode"] == "folded"
    assert "VLLM_LORA_ENABLE_DUAL_STREAM" in caplog.text


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
    folder: Path,
    siblings: dict[str, Path],
    tmp_path: Path,
    extra: list[str],
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"model": None, "mode": "shared", "host": "127.0.0.1", "port": 1, "dtype": "auto"}
    made = plan.make_plan(siblings, **options, extra=extra, updates_from=None, has_key=False)
    served = tmp_path / "served"
    served.mkdir()
    made.mode.write(served)
    second = served / version_name("second", siblings["second"])
    basis = Basis.load(folder / "a")
    before = load_R(second, basis)
    linked = [(second / file).samefile(siblings["second"] / file) for file in ADAPTER_FILES]
    assert linked == [not again] * 2  # where all are held none is read again, and none is copied
    memory, one = made.describe()["memory"], len(MODULES) * 4 * 4 * 2
    copied = (
        sum(
            file.stat().st_size
            for path in siblings.values()
            for file in (path / "adapter_config.json", path / "adapter.safetensors")
        )
        if again
        else 0
    )
    assert memory.get("disk_bytes", 0) == copied
    assert memory.get("host_bytes", 0) == (2 * one if "--max-cpu-loras=2" in extra else 0)
    if again:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=copied - 1))
        with pytest.raises(OutputError, match="not enough disk"):
            made.mode.write(tmp_path)
        shutil.rmtree(siblings["second"])
        assert any(str(second) in flag for flag in made.mode.flags(served))  # asked when it is gone
        assert torch.equal(load_R(second, basis).R, before.R)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("in_cache", [False, True])
def test_an_adapter_that_is_trained_anew_before_it_is_loaded_is_the_one_that_its_version_names(
    folder: Path, siblings: dict[str, Path], tmp_path: Path, in_cache: bool
) -> None:
    """Or what is cached of one would answer for the other. In the Hub's cache the files are links."""
    source, served = siblings["second"], tmp_path / "served"
    served.mkdir()
    if in_cache:
        (tmp_path / "blobs").mkdir()
        for file in source.iterdir():
            file.rename(tmp_path / "blobs" / file.name)
            file.symlink_to(Path("..", "blobs", file.name))
    options: dict[str, Any] = {**DEFAULTS, "mode": "shared", "has_key": False}
    made, second = plan.make_plan(siblings, **options), Adapter.load(source)
    path = served / version_name("second", source)
    made.mode.write(served)
    if in_cache:
        shutil.rmtree(tmp_path / "blobs")
    else:
        replace(second, R={name: R + 1 for name, R in second.R.items()}).save(source, overwrite=True)
    assert f"second={path}" in made.command(served)
    loaded = load_R(path, Basis.load(folder / "a"))
    assert torch.equal(loaded.R, torch.stack([second.R[name] for name in loaded.names]) * second.scaling)


@pytest.mark.usefixtures("plugin")
def test_where_a_disk_has_no_hard_links_an_adapter_is_read_where_it_lies(
    folder: Path, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the temporary folder is on another disk."""
    monkeypatch.setattr(Path, "hardlink_to", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    served = tmp_path / "served"
    served.mkdir()
    plan.make_plan(siblings, **{**DEFAULTS, "mode": "shared", "has_key": False}).mode.write(served)
    path = served / version_name("second", siblings["second"])
    assert all((path / file).samefile(siblings["second"] / file) for file in ADAPTER_FILES)
    assert load_R(path, Basis.load(folder / "a")).names


def planned_copies(siblings: dict[str, Path]) -> plan.ServePlan:
    """Of a server that reads its adapters again, and so copies them."""
    options: dict[str, Any] = {**DEFAULTS, "mode": "shared", "extra": ["--max-loras", "1"], "has_key": False}
    return plan.make_plan(siblings, **options)


@pytest.mark.usefixtures("plugin")
def test_an_adapter_that_is_trained_anew_while_a_server_starts_is_served_as_it_is_now(
    folder: Path, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away for a moment, then one file of it is copied with the other of the next version, then it is whole."""
    made, source, served = planned_copies(siblings), siblings["second"], tmp_path / "served"
    served.mkdir()
    old = version_name("second", source)
    second = Adapter.load(source)
    new = replace(second, R={name: R + 1 for name, R in second.R.items()}, scaling=0.25)
    begun = []

    def copy(found: Path, target: Path) -> None:
        begun.extend([target] * (found == source))
        if found != source or len(begun) == 3:
            copy_adapter(found, target)
        elif len(begun) == 1:
            found.rename(tmp_path / "away")
            try:
                copy_adapter(found, target)
            finally:
                (tmp_path / "away").rename(found)
        else:
            copy_adapter(found, target)
            new.save(found, overwrite=True)
            shutil.copy(found / "adapter_config.json", target)

    monkeypatch.setattr(copies, "copy_adapter", copy)
    made.mode.write(served)
    version = version_name("second", source)
    assert version != old
    assert len(begun) == 3
    assert {path.name for path in served.iterdir()} == {version_name("a", folder / "a"), version}
    command = made.command(served)
    assert f"second={served / version}" in command
    assert not any(old in word for word in command)
    loaded = load_R(served / version, Basis.load(folder / "a"))
    assert torch.equal(loaded.R, torch.stack([new.R[name] for name in loaded.names]) * 0.25)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("now", ["of another basis", "of another base", "damaged", "gone"])
def test_what_an_adapter_was_replaced_by_has_to_be_one_that_was_checked(
    folder: Path, siblings: dict[str, Path], tmp_path: Path, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_PAUSE", 0)
    made, source, served = planned_copies(siblings), siblings["second"], tmp_path / "served"
    served.mkdir()
    second = Adapter.load(source)
    if now == "of another basis":
        replace(second, basis_sha256="0" * 64).save(source, overwrite=True)
    elif now == "of another base":
        replace(second, base=replace(second.base, fingerprint="0" * 64)).save(source, overwrite=True)
    elif now == "damaged":
        replace(second, R={name: R + 1 for name, R in second.R.items()}).save(source, overwrite=True)
        shutil.copy(folder / "a" / "adapter.safetensors", source)

    def copy(found: Path, target: Path) -> None:
        if now == "gone":  # since its size was asked for
            shutil.rmtree(source, ignore_errors=True)
        copy_adapter(found, target)

    copying = Mock(side_effect=copy)
    monkeypatch.setattr(copies, "copy_adapter", copying)
    what = "cannot read the adapter" if now == "gone" else "the adapter was replaced meanwhile"
    with pytest.raises(ArtifactError, match=what):
        made.mode.write(served)
    assert copying.call_count == 1 + 3
