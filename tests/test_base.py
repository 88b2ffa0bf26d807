"""How base models and their tokenizers are found, checked and loaded."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM

from lorasb_export import calibrate, evaluate, fit
from lorasb_export.base import device
from lorasb_export.base.device import default_device
from lorasb_export.base.given import require_positions
from lorasb_export.base.model import BaseModel
from lorasb_export.base.structure import positions, trained_positions
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.task import task_of
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.evaluation.inference import answers
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.inspect import inspect_data
from tests.rows import GOOD, encode
from tests.tiny import TEMPLATE, make_bert, make_gpt2, make_llama, write_index


def test_a_tokenizer_without_a_pad_token(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert BaseModel.resolve(base).tokenizer.pad_token == "</s>"
    del config["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="neither a pad token nor an end-of-sequence token"):
        _ = BaseModel.resolve(base).tokenizer
    config["pad_token"] = "<unk>"
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = BaseModel.resolve(base).tokenizer
    assert encode([{"text": "x", "label": "a"}], tokenizer, SEQ_CLS, ["a", "b"], 64)
    for line in (GOOD, '{"text": "x"}'):
        with pytest.raises(BaseModelError, match=r"no end-of-sequence token .*eos_token"):
            encode([json.loads(line)], tokenizer, CAUSAL_LM, [], 64)


def test_a_base_says_in_a_line_what_it_is(bert: Path) -> None:
    base = BaseModel.resolve(bert)
    assert BaseModel.resolve(base) is base
    assert repr(base) == f"<BaseModel {bert}: bert>"


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


def test_the_head_gets_the_last_positions_in_one_block_of_memory(llama: Path) -> None:
    """Of a strided slice torch makes a product for every row, on a CPU by copies of the weight."""
    network, seen = BaseModel.resolve(llama).load(), []
    head = network.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    ids = torch.arange(18).reshape(3, 6)
    last = network(ids, logits_to_keep=2).logits
    assert seen == [True]
    assert torch.allclose(last, network(ids).logits[:, -2:], atol=1e-6)


def test_more_tokens_than_the_base_is_made_for_are_told_of(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = BaseModel.resolve(llama)
    network, tokenizer = base.load(), base.tokenizer
    assert (trained_positions(network), positions(network)) == (2048, math.inf)
    for _ in range(2):
        require_positions(network, 2048)
        require_positions(network, 2049)
    learned = BaseModel.resolve(make_gpt2(tmp_path / "gpt2"))  # what is beyond is refused
    require_positions(learned.load_empty(CAUSAL_LM), 1024)
    network.config.max_position_embeddings = 16
    answers(network, tokenizer, ["1", "1" * 20], max_tokens=2, unit="one")
    first, second = (record.getMessage() for record in caplog.records if record.name.startswith("lorasb"))
    assert first.startswith("max_length is 2049, and the base's config has max_position_embeddings = 2048: what lies")
    assert second.startswith("one: 1 of 2 may reach, with their answers, beyond the 16 tokens of max_position_emb")


def test_a_pad_token_without_an_embedding_is_none(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(base)
    found = BaseModel.resolve(base).tokenizer
    assert found.pad_token == found.eos_token


def test_a_row_with_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    rows = [{"prompt": "1+1=", "completion": answer} for answer in ("2", "2<|im_end|>")]
    task = task_of("sums", {"train": rows})
    calibrate(base, {"sums": task}, CalibrationSettings(rank=4))  # nothing but characters
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(base)
    told = r"'<\|im_end\|>', token 98, has no embedding: the base has 98 \(.*row 2\)\. .*resize_token_embeddings"
    with pytest.raises(DataError, match=told):
        calibrate(base, {"sums": task}, CalibrationSettings(rank=4))
    with pytest.raises(DataError, match=told):
        inspect_data(task, base)
    drawn = calibrate(base, {}, CalibrationSettings(rank=4, directions="random"))
    with pytest.raises(DataError, match=told):
        fit(base, drawn, task, tmp_path / "a", FitSettings(max_steps=1))
    others = replace(task, splits={"train": rows[:1], "test": rows})
    adapter = fit(base, drawn, others, tmp_path / "a", FitSettings(max_steps=1))
    with pytest.raises(DataError, match=told):
        evaluate(adapter, others, metric="loss")
    asked = replace(task, splits={"train": rows[:1], "test": [{"prompt": "1<|im_end|>", "completion": "2"}]})
    with pytest.raises(DataError, match=r"token 98, has no embedding.* row 1\)"):
        evaluate(adapter, asked)
    with pytest.raises(DataError, match=r"token 98, has no embedding.* \(prompt 2\)"):
        answers(BaseModel.resolve(base).load(), tokenizer, ["1+1=", "<|im_end|>"])
    long = {"prompt": "1<|im_end|>" * 8, "completion": "2"}  # is left out, and nobody is asked it
    of_both = replace(task, splits={"train": [rows[0], long]})
    fit(base, drawn, of_both, tmp_path / "b", FitSettings(max_steps=1, max_length=8))
    tokenizer.eos_token = "<|im_end|>"  # and the pad token has an embedding
    tokenizer.save_pretrained(base)
    with pytest.raises(BaseModelError, match=r"the end of sequence, '<\|im_end\|>', token 98, has no embedding"):
        calibrate(base, {"sums": others}, CalibrationSettings(rank=4))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    with pytest.raises(BaseModelError, match="neither a pad token nor an end-of-sequence token with an embedding"):
        _ = BaseModel.resolve(base).tokenizer


def test_a_tokenizer_is_the_one_of_its_hugging_face_files(tmp_path: Path) -> None:
    """Mistral's own, which vLLM brings and transformers would take, has no chat template; serving asks with it."""
    mistral_common = pytest.importorskip("mistral_common")
    base = make_llama(tmp_path / "base")
    shutil.copyfile(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", base / "tekken.json")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    tokenizer = BaseModel.resolve(base).tokenizer
    assert tokenizer.chat_template == TEMPLATE


def test_a_base_in_float32_on_a_gpu_is_told_of_bfloat16(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`meta` stands for one."""
    base, said = BaseModel.resolve(llama), "with --dtype bfloat16 it takes half the memory"
    base.load(device="cpu")
    for dtype in ("float32", "bfloat16"):
        base.load(dtype=dtype, device="meta")
    assert said not in caplog.text
    base.load(device="meta")
    assert caplog.text.count(said) == 1


def test_a_gpu_that_imitates_bfloat16_is_not_told_of_it(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "imitates_bfloat16", lambda device: device.type == "meta")
    base, said = BaseModel.resolve(llama), "this GPU imitates bfloat16"
    base.load(dtype="bfloat16", device="cpu").save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    base.load(device="meta")
    assert "with --dtype float16 it takes half the memory" in caplog.text
    BaseModel.resolve(tmp_path).load(dtype="bfloat16", device="meta")
    assert "bfloat16" not in caplog.text
    BaseModel.resolve(tmp_path).load(device="meta")
    assert caplog.text.count(said) == 1


def test_accelerates_switch_chooses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert default_device() == torch.device("mps")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == torch.device("cpu")


def test_apples_gpus_have_no_float64(llama: Path) -> None:
    with pytest.raises(SettingsError, match=r"no float64 .*--dtype float32, or set ACCELERATE_USE_CPU=1"):
        BaseModel.resolve(llama).load(dtype="float64", device="mps")


def test_a_loaded_network_can_be_pickled(llama: Path) -> None:
    network = BaseModel.resolve(llama).load()
    again = pickle.loads(pickle.dumps(network))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, network(ids).logits)


def test_an_index_that_names_an_output_embedding_which_is_tied(tmp_path: Path) -> None:
    """transformers ties it; what it would have to invent is refused."""
    base = make_llama(tmp_path / "base")
    write_index(base)
    index = read_json(base / "model.safetensors.index.json")

    def name_too(tensor: str) -> BaseModel:
        weight_map = index["weight_map"] | {tensor: "model-1.safetensors"}
        write_json(base / "model.safetensors.index.json", index | {"weight_map": weight_map})
        return BaseModel.resolve(base)

    found = name_too("lm_head.weight")
    network = found.load()
    assert "lm_head.weight" not in found.tensors
    assert torch.equal(network.lm_head.weight, network.model.embed_tokens.weight)
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {"tie_word_embeddings": False})
    with pytest.raises(BaseModelError, match=r"the checkpoint lacks lm_head\.weight"):
        BaseModel.resolve(base).load()
    write_json(base / "config.json", config)
    with pytest.raises(BaseModelError, match=r"names tensor model\.norm2\.weight, which no file holds"):
        _ = name_too("model.norm2.weight").tensors
