"""Oracle 16: exported to plain LoRA (A, s·B·R, α = r), PEFT's own loader gives the logits of W0 + s·B·R·A."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import environment
from lorasb_export.adapter import Adapter
from lorasb_export.base import device as base_device
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import load_task
from lorasb_export.errors import ArtifactError, BaseModelError, OutputError
from lorasb_export.exporting import peft
from lorasb_export.exporting.peft import export_peft
from lorasb_export.files.storage import read_json, write_json
from tests.conftest import lorasb
from tests.merging import adapter_for
from tests.random_adapter import save_adapter, save_base, write_in

from peft import PeftModel  # isort: skip
from transformers import (  # isort: skip
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

IDS = torch.arange(1, 13).reshape(2, 6)


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16)).eval()


def bert() -> BertForSequenceClassification:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()


CASES: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    # Layer 1 only for o_proj: the same module of layer 0 must stay as it is.
    "llama": (llama, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"], "CAUSAL_LM"),
    "gpt2": (gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"], "CAUSAL_LM"),
    "bert": (bert, ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"], SEQ_CLS),
}


def make(kind: str, folder: Path) -> tuple[Any, Path, Adapter]:
    build, modules, task_type = CASES[kind]
    torch.manual_seed(0)
    model = build()
    base = save_base(model, folder / "base")
    return model, base, save_adapter(base, model, folder / "adapter", modules, task_type=task_type)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_oracle_16_peft_loads_the_export_and_gives_the_merged_logits(kind: str, tmp_path: Path) -> None:
    model, base, adapter = make(kind, tmp_path)
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    with torch.no_grad():
        plain = model(IDS).logits
        loaded = PeftModel.from_pretrained(type(model).from_pretrained(base), str(tmp_path / "peft")).eval()(IDS).logits
        write_in(model, adapter)
        by_hand = model(IDS).logits
    assert (loaded - by_hand).abs().max() <= 1e-4
    assert (plain - by_hand).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize("kind", CASES)
def test_keys_and_shapes_are_those_of_a_lora(kind: str, tmp_path: Path) -> None:
    _, _, adapter = make(kind, tmp_path)
    result = export_peft(tmp_path / "adapter", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}": tensor.shape for name, tensor in adapter.head.items()}
    for name, module in adapter.load_basis().modules.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = module.A.shape
        expected[f"base_model.model.{name}.lora_B.weight"] = module.B.shape
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 4, True)
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert config["modules_to_save"] == (["classifier"] if kind == "bert" else None)
    assert read_json(tmp_path / "peft" / "lorasb.json")["kind"] == "peft"
    assert "peft" in (tmp_path / "peft" / "README.md").read_text()
    assert result == {"out": str(tmp_path / "peft"), "rank": 4, "modules": 2, "bytes": result["bytes"]}


def test_a_fresh_process_without_this_package_loads_the_export(tmp_path: Path) -> None:
    model, _, adapter = make("llama", tmp_path)
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    write_in(model, adapter)
    with torch.no_grad():
        save_file({"ids": IDS, "logits": model(IDS).logits}, tmp_path / "expected.safetensors")
    program = """
import sys
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
model = AutoPeftModelForCausalLM.from_pretrained("peft")
expected = load_file("expected.safetensors")
assert "lorasb_export" not in sys.modules
print(float((model(expected["ids"]).logits - expected["logits"]).abs().max()))
"""
    variables = environment.child_environment("bitsandbytes")  # which takes a second to import
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 1e-4


def test_llama_needs_no_base_but_checks_a_given_one(tmp_path: Path) -> None:
    _, base, _ = make("llama", tmp_path)
    torch.manual_seed(1)
    other = save_base(llama(), tmp_path / "other")
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", base=other)
    base.rename(tmp_path / "moved")
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    export_peft(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "moved")


def test_who_was_trained_beside_a_base_in_four_bits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, adapter = make("llama", tmp_path)
    for dtype in ("auto", "nf4"):
        assert "trained beside" not in caplog.text
        replace(adapter, training={"settings": {"dtype": dtype}}).save(tmp_path / dtype)
        export_peft(tmp_path / dtype, tmp_path / "peft", overwrite=True)
    assert "The adapter was trained beside a base in four bits" in caplog.text


def test_gpt2_names_need_the_base_to_tell_conv1d_from_linear(tmp_path: Path) -> None:
    _, base, _ = make("gpt2", tmp_path)
    base.rename(tmp_path / "moved")
    with pytest.raises(BaseModelError):
        export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    export_peft(tmp_path / "adapter", tmp_path / "peft", base=tmp_path / "moved")
    assert read_json(tmp_path / "peft" / "adapter_config.json")["fan_in_fan_out"]


def test_what_is_exported_is_not_overwritten(tmp_path: Path) -> None:
    _, _, adapter = make("llama", tmp_path)
    adapter.load_basis().save(tmp_path / "basis")
    adapter.basis_source = str(tmp_path / "basis")
    adapter.save(tmp_path / "shares")
    for name, out in (("adapter", "adapter"), ("shares", "shares"), ("shares", "basis")):
        with pytest.raises(OutputError, match="the target holds what it is made from"):
            export_peft(tmp_path / name, tmp_path / out, overwrite=True)
    assert Adapter.load(tmp_path / "shares").load_basis()


def test_an_existing_target_is_kept_unless_overwritten(tmp_path: Path) -> None:
    make("llama", tmp_path)
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    (tmp_path / "peft" / "mine").write_text("kept")
    with pytest.raises(OutputError, match="exists"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert (tmp_path / "peft" / "mine").read_text() == "kept"
    export_peft(tmp_path / "adapter", tmp_path / "peft", overwrite=True)
    assert not (tmp_path / "peft" / "mine").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine").write_text("kept")
    with pytest.raises(OutputError, match="not a folder lorasb wrote"):
        export_peft(tmp_path / "adapter", tmp_path / "foreign", overwrite=True)
    assert (tmp_path / "foreign" / "mine").read_text() == "kept"


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe", "jamba", "llama"])
def test_what_peft_would_take_for_experts_is_refused(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT loads it with a warning, and answers as the base: measured with GLM-4-MoE's dense first layer."""
    model = llama()
    base = save_base(model, tmp_path / "base")
    save_adapter(base, model, tmp_path / "adapter", ["model.layers.0.mlp.down_proj"])
    write_json(base / "config.json", read_json(base / "config.json") | {"model_type": family})
    if family != "glm4_moe":
        export_peft(tmp_path / "adapter", tmp_path / "peft")
    else:
        with pytest.raises(BaseModelError, match=r"glm4_moe PEFT takes .*down_proj for an expert.*Use `lorasb merge`"):
            export_peft(tmp_path / "adapter", tmp_path / "peft")
    shutil.rmtree(base)
    export_peft(tmp_path / "adapter", tmp_path / "again")
    assert "the type of the base could not be looked up" in caplog.text


def test_the_type_of_a_base_is_looked_up_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, adapter = make("llama", tmp_path)
    looked_up = Mock(return_value=(base, ""))
    monkeypatch.setattr(peft, "resolve_folder", looked_up)
    for revision in ("abc", None):
        of_the_hub = replace(adapter, base=replace(adapter.base, name_or_path="owner/base", revision=revision))
        assert peft._family(of_the_hub, None) == "llama"
    assert [call.args[0] for call in looked_up.call_args_list] == ["owner/base@abc", "owner/base"]


def test_what_peft_refuses_in_models_of_mambas_kind_is_refused_here(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.out_proj = torch.nn.Linear(32, 48)
    base = save_base(model, tmp_path / "base")
    save_adapter(base, model, tmp_path / "adapter", ["model.layers.0.mlp.out_proj"])
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    write_json(base / "config.json", read_json(base / "config.json") | {"model_type": "mamba2"})
    with pytest.raises(BaseModelError, match=r"mamba2 PEFT takes no adapter for model.layers.0.mlp.out_proj"):
        export_peft(tmp_path / "adapter", tmp_path / "again")


def test_a_layer_whose_weight_others_read_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.dt_proj = torch.nn.Linear(32, 48)
    base = save_base(model, tmp_path / "base")
    save_adapter(base, model, tmp_path / "adapter", ["model.layers.0.mlp.dt_proj"])
    with pytest.raises(BaseModelError, match=r"around model\.layers\.0\.mlp\.dt_proj"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")


def test_verify_compares_the_logits_of_peft(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", ["model.layers.0.mlp.up_proj"])
    command = ["export", str(tmp_path / "a"), "--verify", "--out", str(tmp_path / "peft")]
    done = lorasb(*command)
    assert done.exit_code == 0, done.output
    assert "PEFT's logits differ from the adapter's by " in done.output
    adapter.training = {"data": str(sums), "data_sha256": load_task("sums", sums).sha256}
    adapter.save(tmp_path / "a", overwrite=True)
    found = json.loads(lorasb(*command, "--overwrite", "--json").stdout)["verify"]
    assert found["rows"] == 4
    assert found["relative_difference"] < found["tolerance"] == 1e-4

    whole = peft.folded_tensors
    monkeypatch.setattr(peft, "folded_tensors", lambda one: {name: 1.01 * t for name, t in whole(one).items()})
    done = lorasb(*command[:-1], str(tmp_path / "wrong"))
    assert (done.exit_code, "PEFT's logits differ by " in done.stderr) == (1, True)
    assert not (tmp_path / "wrong").exists()


def test_a_device_without_room_leaves_the_comparison_to_the_cpu(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, from_pretrained, devices = BaseModel.load, PeftModel.from_pretrained, []

    def full(self: BaseModel, *words: Any, device: torch.device, **options: Any) -> Any:
        devices.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(self, *words, device=device, **options)

    def with_peft(*words: Any, torch_device: str, **options: Any) -> Any:  # PEFT's own choice is the GPU
        devices.append(torch_device)
        return from_pretrained(*words, torch_device=torch_device, **options)

    monkeypatch.setattr(PeftModel, "from_pretrained", with_peft)
    adapter_for(llama, tmp_path / "a")
    monkeypatch.setattr(BaseModel, "load", full)
    monkeypatch.setattr(base_device, "default_device", lambda: torch.device("cuda"))
    export_peft(tmp_path / "a", tmp_path / "peft", verify=True)
    assert devices == ["cuda", "cpu", "cpu"]


def test_verify_compares_a_head_too(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2)
    module = "bert.encoder.layer.0.output.dense"
    save_adapter(bert, network, tmp_path / "a", [module], task_type=SEQ_CLS)
    export_peft(tmp_path / "a", tmp_path / "peft", verify=True)
    whole = peft.folded_tensors
    monkeypatch.setattr(
        peft, "folded_tensors", lambda one: {n: t if "lora" in n else 0 * t for n, t in whole(one).items()}
    )
    with pytest.raises(ArtifactError, match="PEFT's logits differ"):
        export_peft(tmp_path / "a", tmp_path / "other", verify=True)
    monkeypatch.setattr(peft, "folded_tensors", lambda one: {n: t for n, t in whole(one).items() if "lora" in n})
    config, unsaid = peft.peft_config, {"modules_to_save": None, "task_type": None}  # or PEFT would miss the head
    monkeypatch.setattr(peft, "peft_config", lambda *args, **kw: config(*args, **kw) | unsaid)
    with pytest.raises(ArtifactError, match="PEFT's logits differ"):
        export_peft(tmp_path / "a", tmp_path / "without", verify=True)


def test_the_base_is_named_at_its_commit(tmp_path: Path) -> None:
    _, base, adapter = make("llama", tmp_path)
    at_commit = replace(adapter.base, name_or_path="owner/base", revision="1" * 40)
    replace(adapter, base=at_commit, basis=replace(adapter.load_basis(), base=at_commit)).save(tmp_path / "pinned")
    export_peft(tmp_path / "pinned", tmp_path / "lora", base=base)
    config = read_json(tmp_path / "lora" / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "1" * 40)


def test_each_adapter_goes_into_a_folder_of_its_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a project all; one that is damaged is left out, and named."""
    monkeypatch.chdir(tmp_path)
    Path("lorasb.toml").write_text(f'model = "{llama}"\n')
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        adapter_for(llama, tmp_path / "adapters" / name, ["model.layers.0.mlp.up_proj"])
    Path("adapters/b/adapter.safetensors").write_bytes(b"damaged")
    done = lorasb("export", "--out", "peft/{name}", "--json")
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed["exported"]), list(printed["failed"])) == (1, ["a", "c"], ["b"])
    assert printed["exported"]["a"]["out"] == "peft/a"
    for name in "ac":
        export_peft(f"adapters/{name}", "alone", overwrite=True)
        alone, of_many = (Path(folder, "adapter_model.safetensors") for folder in ("alone", f"peft/{name}"))
        assert alone.read_bytes() == of_many.read_bytes()
    assert sorted(path.name for path in Path("peft").iterdir()) == ["a", "c"]
    lines = lorasb("export", "a", "c", "--out", "again/{name}").stdout.splitlines()
    assert [line.partition(" (")[0] for line in lines] == ["a: exported to again/a", "c: exported to again/c"]
    done = lorasb("export", "--out", "peft/{name}")  # some are there: nothing is written
    assert (done.exit_code, "(peft/a). Name the adapters that are left, or pass --overwrite" in done.stderr) == (
        1,
        True,
    )
    assert "routed is for" in lorasb("export", "a", "--format", "onnx", "--routed", "--out", "x/{name}").stderr
    shutil.copytree("adapters/a", "elsewhere/a")
    done = lorasb("export", "a", "elsewhere/a", "--out", "more/{name}")
    assert (done.exit_code, "two of the adapters would go to one folder" in done.stderr) == (1, True)
    assert lorasb("export", "--format", "onnx-adapters", "--out", "x/{name}").exit_code == 2
