"""Which adapters `serve` takes, from where, and of which base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import ArtifactError, BaseModelError, SettingsError
from lorasb_export.files.storage import read_json, write_json
from tests import serving
from tests.artifacts import forbid
from tests.conftest import lorasb
from tests.random_adapter import save_adapter, save_base
from tests.serving import SIZES, dry_run

folder, siblings, vllm_for_cpus = serving.folder, serving.siblings, serving.vllm_for_cpus


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


def test_all_adapters_of_a_folder_are_served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapters = tmp_path / "many"
    for name in ("x2", "x1", ".being-written"):
        shutil.copytree(folder / "a", adapters / name)
    (adapters / "notes").mkdir()
    done = lorasb("serve", "--adapters-dir", str(adapters), "--dry-run", "--json")
    assert json.loads(done.stdout)["models"] == ["base", "x1", "x2"], done.stderr


def test_a_model_alone_is_served_whoever_the_adapters_belong_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "a", tmp_path / "adapters" / "a")
    forbid(tmp_path / "adapters", monkeypatch)
    done = lorasb("serve", "--model", str(folder / "base"), "--dry-run", "--json")
    assert json.loads(done.stdout)["models"] == ["base"], done.stderr


def test_in_a_folder_a_bad_adapter_does_not_keep_the_others_from_being_served(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    adapters = tmp_path / "many"
    sources = {"base": "a", "damaged": "a", "good": "a", "sorts": "cls", "text": "a", "two words": "a"}
    for name, source in sources.items():
        shutil.copytree(folder / source, adapters / name)
    (adapters / "damaged" / "adapter.safetensors").write_bytes(b"{")
    (adapters / "out").symlink_to(folder / "a")
    words = ["serve", "--dry-run", "--json", "--adapters-dir", str(adapters)]
    done = lorasb(*words)
    assert json.loads(done.stdout)["models"] == ["base", "good"], done.stderr
    for reason in ("damaged: ", "sorts: a classifier", "text: 'text' cannot", "'two words' cannot", "out is a link"):
        assert reason in log.text
    assert "3 of 5 adapters cannot be served" in log.text
    assert "Passed over: 'base' is the name of the base and of an adapter" in log.text
    assert "The others are served" in log.text
    named = lorasb(*words, "--adapters", "good,damaged")
    assert json.loads(named.stdout)["error"]["what"].startswith("1 of 2 adapters cannot be served")
    for name in ("base", "good"):
        shutil.rmtree(adapters / name)
    none = lorasb(*words)
    assert json.loads(none.stdout)["error"]["what"].startswith("3 of 3 adapters cannot be served")


def test_what_is_not_of_one_adapter_alone_is_an_error_for_all(
    folder: Path, siblings: dict[str, Path], tmp_path: Path
) -> None:
    """Another base; and a basis that cannot be read, as while the Hub is not reached."""
    both = {"a": folder / "a", "other": folder / "other"}
    with pytest.raises(BaseModelError, match="1 of 2 adapters cannot be served"):
        dry_run(both, pass_over=True)
    first = Adapter.load(folder / "a")
    Adapter(first.base, "0" * 64, str(tmp_path / "gone"), first.R, scaling=0.5).save(tmp_path / "third")
    with pytest.raises(ArtifactError, match="1 of 3 adapters cannot be served"):
        dry_run({**siblings, "third": tmp_path / "third"}, pass_over=True)


def test_a_few_without_their_basis_or_of_another_base_do_not_keep_many_from_being_served(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Adapter.load(folder / "a")
    Adapter(first.base, "0" * 64, str(tmp_path / "gone"), first.R).save(tmp_path / "experiment")
    # The first of all is of another base: the others' is served.
    apart = {"0": folder / "other", "experiment": tmp_path / "experiment"}
    others = [f"t{number:02}" for number in range(18)]
    many = {"0": apart["0"], **dict.fromkeys(others, folder / "a"), "experiment": apart["experiment"]}
    assert dry_run(many, pass_over=True, mode="folded")["models"] == ["base", *others]
    assert "2 of 20 adapters cannot be served:\n  0: the base's weights are not those" in caplog.text
    with pytest.raises(BaseModelError, match="2 of 20 adapters cannot be served"):  # named, each has to be
        dry_run(many, mode="folded")
    del many[others[0]]  # more than a tenth
    with pytest.raises(BaseModelError, match="2 of 19 adapters cannot be served"):
        dry_run(many, pass_over=True, mode="folded")


def test_of_many_that_cannot_be_served_an_error_names_the_first_and_what_is_too_many(folder: Path) -> None:
    many = {f"t{number:02}": folder / ("other" if number < 12 else "a") for number in range(26)}
    for pass_over, why in (
        (True, r" \(more than a tenth are .*, or of another base: name those to serve\)"),
        (False, ""),
    ):
        with pytest.raises(BaseModelError, match=f"12 of 26 adapters cannot be served{why}:\n  t00: the b") as refused:
            dry_run(many, pass_over=pass_over, mode="folded")
        *_, last, more = str(refused.value).splitlines()
        assert (last.startswith("  t09: "), more) == (True, "  and 2 more")


@pytest.mark.parametrize("mode", ["shared", "folded"])
def test_an_adapter_that_vllm_would_ignore_is_refused(tmp_path: Path, mode: str) -> None:
    ranks = {"q_lora_rank": None, "kv_lora_rank": 16}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_attention_heads": 4}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, **ranks, **heads, first_k_dense_replace=2))
    save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", ["model.layers.0.self_attn.kv_b_proj"])
    with pytest.raises(SettingsError, match=r"no adapter to kv_b_proj.*lorasb merge"):
        dry_run({"a": tmp_path / "a"}, mode=mode)


@pytest.mark.parametrize("mode", ["shared", "folded"])
def test_an_adapter_that_vllm_would_apply_to_keys_but_not_to_values_is_refused(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    heads = {"num_attention_heads": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    of_layers = {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**SIZES, **heads, **of_layers, attention_k_eq_v=True))
    base = save_base(model, tmp_path / "base")
    for name, layer in (("own", 0), ("both", 1)):  # the values of layer 0 are of a v_proj
        save_adapter(base, model, tmp_path / name, [f"model.layers.{layer}.self_attn.k_proj"])
    assert dry_run({"own": tmp_path / "own"}, mode="folded")["models"] == ["base", "own"]
    with pytest.raises(SettingsError, match=r"layers\.1\.self_attn\.k_proj makes keys and values, .*lorasb merge"):
        dry_run({"both": tmp_path / "both"}, mode=mode)
    served = dry_run({"both": tmp_path / "both", "own": tmp_path / "own"}, mode="folded", pass_over=True)
    assert served["models"] == ["base", "own"]
    assert "1 of 2 adapters cannot be served" in caplog.text


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


def test_all_broken_adapters_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    config = read_json(folder / "a" / "adapter_config.json")
    for name, change in (("old", {"format_version": 0}), ("foreign", {"peft_type": "LORA"})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "adapter_config.json", config | change)
    with pytest.raises(ArtifactError) as caught:
        dry_run({"a": folder / "a", "old": tmp_path / "old", "foreign": tmp_path / "foreign"})
    assert all(part in str(caught.value) for part in ("2 of 3", "old: format version", "foreign: peft_type"))
