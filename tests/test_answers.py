"""Answers: greedy, as long as they may be, right when they say what was trained; prompts that have none are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.normalizers import NFC
from transformers import GenerationConfig

from lorasb_export import fit
from lorasb_export.base.model import BaseModel
from lorasb_export.data.encoding import prompt_ids
from lorasb_export.errors import DataError, SettingsError
from lorasb_export.evaluation.inference import _batches, answers, answers_of_ids, question_of
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.rows import CHAT, GOOD, MARKED, THINKING
from tests.tiny import make_gpt2, make_llama, save_tokenizer


def test_answers_are_greedy_whatever_the_base_says_about_chats(chatty: Path) -> None:
    """Qwen's instruct models bring a penalty on repetition, which no other way of running an adapter would apply."""
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float32"), base.tokenizer
    plain = answers(network, tokenizer, ["1+1"], max_tokens=16)
    own = GenerationConfig(repetition_penalty=1.7, no_repeat_ngram_size=2, eos_token_id=2)
    network.generation_config = own
    assert answers(network, tokenizer, ["1+1"], max_tokens=16) == plain
    assert network.generation_config is own
    ids = torch.tensor([prompt_ids(tokenizer, "1+1")])
    found = network.generate(ids, max_new_tokens=16)  # type: ignore[operator]
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) != plain[0]


def test_answers_end_where_tokenizer_or_generation_config_says(chatty: Path) -> None:
    """Of Gemma and Phi-3 the end of a turn is not the tokenizer's end of sequence, and stands in the latter alone."""
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float32"), base.tokenizer
    whole = answers(network, tokenizer, ["ab"], max_tokens=16)[0].split()  # this tokenizer writes its tokens so
    end, before = whole[2], " ".join(whole[:2])
    assert end not in before
    token = tokenizer.convert_tokens_to_ids(end)
    for named in (token, [tokenizer.eos_token_id, token]):
        network.generation_config.eos_token_id = named
        assert answers(network, tokenizer, ["ab", "1+1"], max_tokens=16)[0] == before
    network.generation_config.eos_token_id, tokenizer.eos_token = None, end
    assert answers(network, tokenizer, ["ab"], max_tokens=16) == [before]


def test_an_answer_takes_its_own_room_and_no_longer_one_s(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float32"), base.tokenizer
    texts = ["ab", "1+1=", "2+2=", "a longer prompt"]
    ids, rooms = [prompt_ids(tokenizer, text) for text in texts], [3, 2, 9, 5]
    network.generation_config.eos_token_id = tokenizer.eos_token = None  # nothing ends but by its room
    alone = [answers(network, tokenizer, [text], max_tokens=room)[0] for text, room in zip(texts, rooms, strict=True)]
    asked: list[int] = []
    generate = network.generate

    def counted(*words: Any, **options: Any) -> Any:
        asked.append(network.generation_config.max_new_tokens)
        return generate(*words, **options)  # type: ignore[operator]

    monkeypatch.setattr(network, "generate", counted)
    assert answers_of_ids(network, tokenizer, ids, rooms, batch_size=2) == alone
    assert sorted(asked) == [3, 9]
    assert [len(answer.split()) for answer in alone] == rooms


def test_rows_whose_longest_prompt_and_largest_room_reach_too_far_are_asked_apart(tmp_path: Path) -> None:
    base = BaseModel.resolve(make_gpt2(tmp_path / "gpt2"))  # positions end at 1024
    network, tokenizer = base.load(), base.tokenizer
    network.generation_config.eos_token_id = tokenizer.eos_token = None
    ids, rooms = [[5] * 1000, [6] * 30, [7] * 990], [20, 60, 34]
    alone = [answers_of_ids(network, tokenizer, [one], [room])[0] for one, room in zip(ids, rooms, strict=True)]
    assert answers_of_ids(network, tokenizer, ids, rooms, batch_size=3) == alone
    assert [len(answer.split()) for answer in alone] == rooms


READ_PADDING = {
    "RecurrentGemma": {
        **{"hidden_size": 32, "lru_width": 32, "intermediate_size": 64, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 1},
    },
    "Bart": {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4},
}


@pytest.mark.parametrize("family", READ_PADDING)
def test_prompts_of_one_length_are_asked_together_where_padding_would_be_read(family: str, chatty: Path) -> None:
    """The former's convolutions take no mask, the latter's positions are counted from the padding on."""
    tokenizer = BaseModel.resolve(chatty).tokenizer
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **READ_PADDING[family])
    torch.manual_seed(0)
    network = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter) / 4  # at the usual 0.02 answers repeat the prompt
    network.generation_config.eos_token_id = tokenizer.eos_token = None
    ids, rooms = [[5, 6, 7], [8] * 12, [9, 10, 11], [12, 13, 14], [15, 16]], [6, 6, 9, 4, 8]
    alone = [answers_of_ids(network, tokenizer, [one], [room])[0] for one, room in zip(ids, rooms, strict=True)]
    assert answers_of_ids(network, tokenizer, ids, rooms, batch_size=2) == alone
    sizes_of_rows = [(len(one), room) for one, room in zip(ids, rooms, strict=True)]
    assert _batches(sizes_of_rows, 2, network) == [[1], [2, 0], [3], [4]]


OPENED = MARKED.replace(
    "add_generation_prompt %}<s>", "add_generation_prompt %}<s>["
)  # when it is asked, and only then


@pytest.mark.parametrize(
    ("row", "template", "read"),
    [
        (json.loads(GOOD), MARKED, "2"),
        ({"prompt": "1+1=", "completion": " 2</s>"}, MARKED, "2"),
        ({"prompt": "the drink", "completion": "cafe\N{COMBINING ACUTE ACCENT}"}, MARKED, "c a f é"),
        (CHAT, MARKED, "2"),
        (CHAT, THINKING, "[ ]   2"),
        (CHAT, THINKING.replace("{% endgeneration", "~{% endgeneration"), "[ ]   2"),  # `~` after the end
        (CHAT, OPENED, "2"),
    ],
)
def test_an_answer_is_right_that_says_what_was_trained(
    row: dict[str, Any], template: str, read: str, chatty: Path
) -> None:
    tokenizer = BaseModel.resolve(chatty).tokenizer  # writes a blank between tokens
    tokenizer.backend_tokenizer.normalizer = NFC()
    tokenizer.add_tokens(["é"])
    tokenizer.chat_template = template
    assert question_of(tokenizer, row, "row 1", {tokenizer.eos_token_id}).expected.strip() == read


def test_an_answer_may_be_as_long_as_the_template_makes_it(chatty: Path) -> None:
    tokenizer = BaseModel.resolve(chatty).tokenizer
    assert question_of(tokenizer, CHAT, "row 1", ()).max_tokens < 20
    tokenizer.chat_template = THINKING.replace("[]", "[" + "1" * 40 + "]")
    assert question_of(tokenizer, CHAT, "row 1", ()).max_tokens >= 44  # with the brackets, the answer and its end


def test_prompts_that_cannot_be_answered_are_named(chatty: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(), base.tokenizer
    with pytest.raises(SettingsError, match="prompts is a text"):
        answers(network, tokenizer, "1+1")
    assert answers(network, tokenizer, []) == []  # a process with more peers than rows has none
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(DataError, match=r"chat template refuses the messages: no system message \(prompt 1\)"):
        answers(network, tokenizer, ["1+1"])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no tokens.* \(prompt 2\)"):
        answers(network, tokenizer, ["1+1", ""])
    learned = BaseModel.resolve(make_gpt2(tmp_path / "gpt2")).load()
    with pytest.raises(DataError, match=r"prompt of 1000 tokens and an answer of 30; .* end at 1024 \(test row 2\)"):
        answers(learned, tokenizer, ["1+1", "1" * 1000], max_tokens=30, unit="test row")


def test_such_prompts_are_found_before_training(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    save_tokenizer(base, template=False)
    (base / "chat_template.jinja").unlink()
    data = {"train": GOOD, "valid": GOOD + '{"prompt": "", "completion": "2"}\n'}
    (tmp_path / "data").mkdir()
    for split, lines in data.items():
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    settings = FitSettings(max_steps=1, metric="exact_match")
    with pytest.raises(DataError, match=r"no tokens.* \(a: valid row 2\)"):
        fit(str(base), CalibrationSettings(rank=2), tmp_path / "data", tmp_path / "a", settings)
