"""What tokens a row becomes, of which the loss is taken, and how rows are batched."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.batches import collate, row_losses
from lorasb_export.data.encoding import IGNORE, Encoded, prompt_ids
from lorasb_export.data.rows import CHAT, COMPLETION, TEXT
from lorasb_export.errors import DataError
from tests.rows import MARKED, encode
from tests.tiny import TEMPLATE, VOCABULARY, save_tokenizer


def test_a_text_without_tokens_is_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    with pytest.raises(DataError, match=r"the text has no tokens \(row 1\)"):
        encode([{"text": "", "label": "a"}], tokenizer, SEQ_CLS, ["a", "b"], 64)


def test_loss_is_on_the_completion_alone(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    (row,) = encode([{"prompt": "1+1=", "completion": "2"}], tokenizer, CAUSAL_LM, [], 64)
    assert "".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == "<s>1+1=</s><s>2</s>"
    completion = [label for label in row["labels"] if label != IGNORE]
    assert "".join(tokenizer.convert_ids_to_tokens(completion)) == "2</s>"


def test_loss_of_plain_text_is_on_all_but_the_first_token(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    (row,) = encode([{"text": "abc"}], tokenizer, CAUSAL_LM, [], 64)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["a", "b", "c", "</s>"]
    assert row["labels"] == [IGNORE, *row["input_ids"][1:]]
    assert collate([row], 2)["logits_to_keep"].tolist() == [0, 1, 2]


def test_a_beginning_and_an_end_that_a_row_brings_are_not_written_twice(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = None

    def spelled(row: dict[str, str]) -> str:
        (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
        return "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"]))

    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    assert spelled({"text": "ab"}) == spelled({"text": "<s>ab"}) == "<s>ab</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        assert spelled({"text": text}) == "<s>ab</s>"
    for row in ({"prompt": "a", "completion": "b"}, {"prompt": "<s>a", "completion": "b</s>"}):
        assert spelled(row) == "<s>ab</s>"
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "<s>a")) == ["<s>", "a"]


@pytest.mark.parametrize("prepend", ["first", "always", "never", "normalizer"])
def test_a_completion_goes_on_without_a_space_that_it_does_not_have(prepend: str) -> None:
    """Llama 2, TinyLlama and Mistral put one before every text of its own; with a template that is as they answer."""
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*VOCABULARY, "\n", "▁"])}, merges=[]))
    if prepend == "normalizer":
        backend.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = Metaspace(prepend_scheme=prepend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=TEMPLATE)

    def learnt(completion: str) -> str:
        (row,) = encode([{"prompt": "f(", "completion": completion}], tokenizer, CAUSAL_LM, [], 64)
        return "".join(tokenizer.convert_ids_to_tokens([label for label in row["labels"] if label != IGNORE]))

    assert learnt("x):") == ("x):</s>" if prepend == "never" else "▁x):</s>")
    tokenizer.chat_template = None
    assert learnt("x):") == "x):</s>"
    assert learnt(" x):") == "▁x):</s>"


def some_rows(kind: str) -> list[dict[str, Any]]:
    words = ["7", "a longer one, of many tokens", "some"]
    if kind == TEXT:
        return [{"text": word} for word in words]
    if kind == COMPLETION:
        return [{"prompt": word, "completion": word[::-1]} for word in words]
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}] for word in words]
    return [{"messages": turns[0]}, {"messages": turns[1] + turns[0]}, {"messages": turns[2][1:] + turns[2]}]


@pytest.mark.parametrize("kind", [COMPLETION, CHAT, TEXT])
def test_padding_changes_no_loss(kind: str, llama: Path) -> None:
    base = BaseModel.resolve(llama)
    tokenizer, network = base.tokenizer, base.load(dtype="float64")
    tokenizer.chat_template = MARKED

    def losses(rows: list[dict[str, Any]]) -> list[float]:
        batch = collate(rows, tokenizer.pad_token_id)
        labels = batch.pop("labels")
        sums, counts = row_losses(network(**batch).logits, labels)
        assert counts.tolist() == [sum(label != IGNORE for label in row["labels"]) for row in rows]
        return (sums / counts).tolist()

    rows = encode(some_rows(kind), tokenizer, CAUSAL_LM, [], 64)
    assert len({len(row["input_ids"]) for row in rows}) == 3
    alone = [losses([row])[0] for row in rows]
    assert losses(rows) == pytest.approx(alone, abs=1e-6)
    full = [float(network(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss) for r in rows]
    assert alone == pytest.approx(full, abs=1e-6)


def test_regression_rows_and_their_loss(bert: Path) -> None:
    tokenizer = BaseModel.resolve(bert).tokenizer
    rows = [{"text": "a", "label": 2}, {"text": "a b", "text_pair": "c", "label": -0.5}]
    batch = collate(encode(rows, tokenizer, SEQ_CLS, [], 64), tokenizer.pad_token_id)
    assert batch["labels"].tolist() == [2.0, -0.5]
    losses, counts = row_losses(torch.tensor([[1.0], [-1.0]]), batch["labels"])
    assert (losses.tolist(), counts.tolist()) == ([1.0, 0.25], [1, 1])


def test_prompt_without_a_chat_template_is_taken_as_it_is(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "1+1=")) == list("1+1=")


def test_rows_cut_to_nothing_are_left_out_or_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1" * 50, "completion": "2"}]
    assert len(encode(rows, tokenizer, CAUSAL_LM, [], 20)) == 1
    with pytest.raises(DataError, match=r"alone has 20 tokens or more \(all a: valid rows\). Raise max_length"):
        encode(rows[1:], tokenizer, CAUSAL_LM, [], 20, unit="a: valid row")


def test_one_warning_counts_and_names_the_rows_left_out_and_cut(
    llama: Path, bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    good, long = {"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": "2" * 20}
    prompts = [{"prompt": "1" * 20, "completion": "2"}] * 11
    with caplog.at_level(logging.WARNING):
        assert [row["row"] for row in encode([good, long, good], tokenizer, CAUSAL_LM, [], 20)] == [1, 2, 3]
        assert [row["row"] for row in encode([good, *prompts, long], tokenizer, CAUSAL_LM, [], 20)] == [1, 13]
        assert encode([good], tokenizer, CAUSAL_LM, [], 20)
        tokenizer = BaseModel.resolve(bert).tokenizer
        texts = [{"text": "a" * count, "label": 1} for count in (20, 21)]
        assert [len(row["input_ids"]) for row in encode(texts, tokenizer, SEQ_CLS, [1], 20)] == [20, 20]
    assert caplog.messages == [
        "1 of 3 rows cut at 20 tokens (row 2)",
        "11 of 13 rows left out: their prompt alone has 20 tokens or more "
        "(rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1 more); 1 of 13 rows cut at 20 tokens (row 13)",
        "1 of 2 rows cut at 20 tokens (row 2)",
    ]
    assert all(record.name == "lorasb_export.data.encoding" for record in caplog.records)


def test_batches_are_padded_right_and_know_which_logits_they_need(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    rows = encode(
        [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1", "completion": "200"}], tokenizer, CAUSAL_LM, [], 64
    )
    batch = collate(rows, 2)
    assert batch["input_ids"].shape == (2, 9)
    assert batch["input_ids"][1].tolist()[-1] == 2
    # prompts of 7 and 4 tokens; after them "2</s>" and "200</s>"
    assert batch["logits_to_keep"].tolist() == [3, 4, 5, 6, 7]
    wanted = [[IGNORE, IGNORE, IGNORE, "2", "</s>"], ["2", "0", "0", "</s>", IGNORE]]
    found = [
        [IGNORE if label == IGNORE else tokenizer.convert_ids_to_tokens(label) for label in row]
        for row in batch["labels"].tolist()
    ]
    assert found == wanted


def test_prompts_of_all_lengths_need_few_logits(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    rows = encode([{"prompt": "1" * n, "completion": "2"} for n in (1, 20, 50)], tokenizer, CAUSAL_LM, [], 64)
    assert len(collate(rows, 2)["logits_to_keep"]) == 6  # two tokens a row


def test_labels_outside_the_training_labels(bert: Path) -> None:
    tokenizer = BaseModel.resolve(bert).tokenizer
    with pytest.raises(DataError, match="label 'maybe' is not among the training labels"):
        encode([{"text": "x", "label": "maybe"}], tokenizer, SEQ_CLS, ["no", "yes"], 64)


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Bloom", "Falcon", "Gemma2", "Mixtral", "Mamba", "Phi"])
def test_padding_without_a_mask_changes_no_loss(family: str) -> None:
    """Whether positions come from the mask or a table, are a bias (ALiBi) or a state (Mamba)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    own = {
        "GPT2": {"bos_token_id": 0, "eos_token_id": 0},
        "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "Falcon": {"alibi": True},
        "Gemma2": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "sliding_window": 4},
        "Mixtral": {"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 4, "sliding_window": 4},
        "Mamba": {"state_size": 4},
        "Phi": {"intermediate_size": 64},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **own.get(family, {}), pad_token_id=1)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    network = getattr(transformers, name)(config).eval()
    rows: list[Encoded] = [
        {"input_ids": list(range(5, 5 + n)), "labels": [IGNORE] * (n - 3) + list(range(2 + n, 5 + n))}
        for n in (5, 12, 8)
    ]
    together, alone = collate(rows, 1), [collate([row], 1) for row in rows]
    labels = together.pop("labels")
    found = row_losses(network(**together).logits, labels)[0]
    for loss, batch in zip(found.tolist(), alone, strict=True):
        labels = batch.pop("labels")
        assert loss == pytest.approx(row_losses(network(**batch).logits, labels)[0].item(), rel=1e-5)
