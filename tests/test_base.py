"""Which base models are taken, and how they and their tokenizers are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModel, BertForMaskedLM

from lorasb_export import calibrate
from lorasb_export.base import BaseModel
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.encoding import encode
from lorasb_export.errors import BaseModelError
from tests.rows import GOOD
from tests.tiny import make_bert, make_llama


def test_a_tokenizer_without_a_pad_token(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert BaseModel.resolve(base).load_tokenizer().pad_token == "</s>"
    del config["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="neither a pad token nor an end-of-sequence token"):
        BaseModel.resolve(base).load_tokenizer()
    config["pad_token"] = "<unk>"
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = BaseModel.resolve(base).load_tokenizer()
    assert encode([{"text": "x", "label": "a"}], tokenizer, SEQ_CLS, ["a", "b"], 64)
    for line in (GOOD, '{"text": "x"}'):
        with pytest.raises(BaseModelError, match=r"no end-of-sequence token .*eos_token"):
            encode([json.loads(line)], tokenizer, CAUSAL_LM, [], 64)


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
    "vision": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "vit"}')),
        "neither a causal language model nor a sequence classifier",
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


def test_a_base_says_in_a_line_what_it_is(bert: Path) -> None:
    base = BaseModel.resolve(bert)
    assert BaseModel.resolve(base) is base
    assert repr(base) == f"<BaseModel {bert}: bert>"


def test_an_encoder_is_not_asked_to_generate(bert: Path, sums: Path) -> None:
    with pytest.raises(BaseModelError, match="BertModel does not generate text"):
        calibrate(str(bert), {"sums": sums})


def test_drawing_a_head_leaves_every_other_generator_alone(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several GPUs torch would save the generator of each, and warn of it at every load."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", Mock(side_effect=AssertionError))
    before = torch.get_rng_state()
    BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pooler_that_no_file_keeps_is_refused(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", kind=BertForMaskedLM)
    with pytest.raises(BaseModelError, match=r"lacks bert\.pooler\.dense\.bias, or .*draw one for good"):
        BaseModel.resolve(base).load(SEQ_CLS, num_labels=2)
    AutoModel.from_pretrained(base).save_pretrained(base)  # as the error says
    one, two = (BaseModel.resolve(base).load(SEQ_CLS, num_labels=2, seed=seed) for seed in (0, 1))
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)
