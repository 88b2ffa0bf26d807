"""Which base models are taken, for which tasks, and what the others are told."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertLMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorasb_export import calibrate, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.base.supported import _DECODERS_IF_SET, _ENCODERS
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.task import TaskData
from lorasb_export.errors import ArtifactError, BaseModelError, SettingsError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.tiny import make_bert, make_llama
from tests.training import SETTINGS

BAD_BASES = {
    "a file": (lambda f: f.write_text("hello"), "the base model is a file"),
    "missing": (lambda f: None, "the base model was not found"),
    "empty folder": (lambda f: f.mkdir(), "no config.json"),
    "no weights": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "llama"}')),
        "no model.safetensors",
    ),
    "encoder-decoder": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')),
        "neither a causal language model nor a sequence classifier",
    ),
    "of images and text": (
        lambda f: (
            f.mkdir(),
            (f / "config.json").write_text(
                '{"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}'
            ),
        ),
        "takes images or audio beside text, which is not supported",
    ),
    "vision": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "vit"}')),
        "neither a causal language model nor a sequence classifier",
    ),
    "of a network that looks ahead": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "xlnet"}')),
        "model type 'xlnet' is not supported: its network in transformers sees the tokens that it is to predict",
    ),
    "quantized": (
        lambda f: (
            f.mkdir(),
            (f / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'),
        ),
        "quantized (gptq)",
    ),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_bad_base_is_refused(case: str, tmp_path: Path) -> None:
    make, message = BAD_BASES[case]
    make(tmp_path / "base")
    with pytest.raises(BaseModelError) as error:
        BaseModel.resolve(tmp_path / "base").tensors  # noqa: B018
    assert message in str(error.value)


def test_a_config_that_says_that_it_is_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": null}')
    assert BaseModel.resolve(tmp_path).config["model_type"] == "llama"


def test_an_encoder_is_not_asked_to_generate(bert: Path, sums: Path) -> None:
    with pytest.raises(BaseModelError, match="BertModel does not generate text"):
        calibrate(str(bert), {"sums": sums})


def test_a_config_need_not_name_its_class(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "base")
    config = read_json(bert / "config.json") | {"model_type": "distilbert"}
    del config["architectures"]
    write_json(tmp_path / "base" / "config.json", config)
    with pytest.raises(BaseModelError, match="distilbert does not generate text"):
        BaseModel.resolve(tmp_path / "base").require_task(CAUSAL_LM)


def test_an_encoder_with_a_head_for_text_generates_if_its_tokens_do_not_see_what_follows(
    sums: Path, tmp_path: Path
) -> None:
    """transformers only warns; in training the loss would fall to 0, by labels that are seen."""
    base = make_bert(tmp_path / "base", kind=BertLMHeadModel)
    with pytest.raises(BaseModelError, match=r"BertLMHeadModel does not generate text: .* its tokens see those that f"):
        calibrate(str(base), {"sums": sums})
    write_json(base / "config.json", read_json(base / "config.json") | {"is_decoder": True})
    network = BaseModel.resolve(base).load(CAUSAL_LM)
    one, other = network(torch.tensor([[5, 6, 7], [5, 6, 8]])).logits
    assert torch.equal(one[:2], other[:2])


@pytest.mark.parametrize(
    ("named", "more", "generates"),
    [
        ("ElectraForCausalLM of electra", {}, False),
        ("ElectraForCausalLM of electra", {"is_decoder": True}, True),
        ("RobertaForCausalLM of roberta", {"is_decoder": True}, False),
        ("XLMWithLMHeadModel of xlm", {"causal": True}, False),
        ("GPTNeoXForCausalLM of gpt_neox", {"is_decoder": False}, True),
        ("Qwen2ForCausalLM of qwen2", {"is_causal": False}, False),
        ("Qwen2ForCausalLM of qwen2", {"is_causal": None}, False),
        ("Gemma3ForCausalLM of gemma3_text", {"use_bidirectional_attention": True}, False),
        ("Gemma4ForCausalLM of gemma4_text", {"use_bidirectional_attention": "vision"}, True),
    ],
)
def test_what_generates_is_causal(named: str, more: dict[str, object], generates: bool, tmp_path: Path) -> None:
    architecture, model_type = named.split(" of ")
    for name in (architecture, None):
        config = {"model_type": model_type, "architectures": name and [name], **more}
        assert BaseModel("x", None, tmp_path, config).generates is generates


def test_every_encoder_that_transformers_takes_for_a_language_model_is_known() -> None:
    """Its source warns of each that is not made a decoder."""
    types = {name: model_type for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    sources = [path.read_text(encoding="utf-8") for path in files]
    warning = "(standalone, add|make sure that) `is_decoder=True"
    named = [name for text in sources if re.search(warning, text) for name in re.findall(r"^class (\w+)", text, re.M)]
    found = {types[name] for name in named if name in types}
    assert {"bert", "xmod"} < found <= _ENCODERS | _DECODERS_IF_SET


def test_what_the_base_cannot_do_is_refused(llama: Path, bert: Path, sums: Path, parity: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"dtype is 'bf16'.*bfloat16"):
        fit(str(llama), CalibrationSettings(rank=8), sums, tmp_path / "a", FitSettings(dtype="bf16"))
    for calibration, settings in (({"max_length": 600}, {}), ({}, {"max_length": 600})):
        with pytest.raises(SettingsError, match=r"max_length is 600, the base's positions end at 512\. Lower"):
            fit(str(bert), CalibrationSettings(rank=8, **calibration), parity, tmp_path / "a", FitSettings(**settings))


def test_checkpointing_that_the_base_lacks_is_refused(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = BaseModel.resolve(llama).load(dtype="float64")
    monkeypatch.setattr(type(network), "supports_gradient_checkpointing", False)
    settings = replace(SETTINGS, gradient_checkpointing=True)
    with pytest.raises(SettingsError, match="LlamaForCausalLM has no gradient checkpointing"):
        fit(str(llama), basis, sums, tmp_path / "a", settings, network=network)


def test_a_base_with_peft_layers_is_refused(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    network = BaseModel.resolve(llama).load(dtype="float64")
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))  # puts its layers into `network`
    with pytest.raises(BaseModelError, match=r"already carries PEFT layers.*q_proj.*Merge or unload them first"):
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS, network=network)
    with pytest.raises(BaseModelError, match="already carries PEFT layers"):
        calibrate(str(llama), tasks, CalibrationSettings(rank=2), network=network)


@pytest.mark.parametrize(("family", "generates"), [("llama", True), ("gpt2", True), ("deberta-v2", False)])
def test_a_config_that_names_no_architecture(family: str, generates: bool, tmp_path: Path) -> None:
    base = BaseModel("x", None, tmp_path, {"model_type": family})
    assert base.generates is generates


def test_a_pointer_of_git_lfs_says_so(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ArtifactError, match=r"a pointer of git-lfs, not the file itself .* Run git lfs pull"):
        _ = BaseModel.resolve(base).tensors
