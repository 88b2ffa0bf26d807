"""Chats that are learnt otherwise than they are asked, or whose answers would not end: `fit` tells."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from lorasb_export import fit
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.task import task_of
from lorasb_export.errors import DataError
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.inspect import inspect_data
from lorasb_export.training.row_warnings import warn_of_chats, warn_of_thoughts
from tests.rows import CHAT_LINE, MARKED, encode
from tests.tiny import TEMPLATE

RANDOM = CalibrationSettings(rank=4, directions="random")


def test_chats_whose_answers_will_not_end_are_told(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those on Qwen's base models: `<|im_end|>` ends a turn, and no end that is looked for is it."""
    base = shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text(CHAT_LINE)

    def told(name: str) -> list[str]:
        caplog.clear()
        fit(base, RANDOM, tmp_path / "chats.jsonl", tmp_path / name, FitSettings(max_steps=1))
        return [message for message in caplog.messages if "will not end" in message]

    (base / "chat_template.jinja").write_text(MARKED.replace("</s>{% end", "~{% end"))
    (message,) = told("a")
    assert "the last that they are taught is ['2', '~'], and they end with ['</s>'] alone. Let {% gen" in message
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 97]}))
    assert not told("b")


@pytest.mark.parametrize(
    ("written", "asked", "endings"),
    [
        ("{% generation %}{{ m['content'] }}", "<s>", None),
        ("{% generation %}[]{{ m['content'] }}", "<s>", None),
        ("{% generation %}[]{{ m['content'] }}", "<s>[", None),  # as Qwen2.5's, whose marks enclose the line's end
        ("[]{% generation %}{{ m['content'] }}", "<s>", ("<s> [ ]", "<s>")),  # Qwen3's own, marked round the content
        ("{% generation %}{{ m['content'] }}", "<s>[", ("<s>", "<s> [")),  # DeepSeek-R1's: it is to think when asked
        ("{% generation %}{{ m['content'] }}", "{{ raise_exception('no') }}", None),
    ],
)
def test_chats_that_are_asked_after_something_else_are_told(
    written: str, asked: str, endings: tuple[str, str] | None, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    template = MARKED.replace("{% generation %}{{ m['content'] }}", written)
    tokenizer.chat_template = template.replace("prompt %}<s>", f"prompt %}}{asked}")
    chat = json.loads(CHAT_LINE)
    ends_with_user = {"messages": [*chat["messages"], {"role": "user", "content": "2"}]}
    cut = json.loads(CHAT_LINE.replace('"2"', f'"{"2" * 99}"'))
    task = task_of("t", {"train": [chat, ends_with_user, chat, cut]})
    warn_of_chats(task, encode(task.rows("train"), tokenizer, CAUSAL_LM, [], 40), tokenizer, {2})
    told = [message for message in caplog.messages if "asked for after" in message]
    assert len(told) == (endings is not None)
    if endings is not None:
        learnt, when_asked = (["<s>", *"1+1=", "</s>", *ending.split()][-8:] for ending in endings)
        assert f"2 of 3 chats is learnt after {learnt} and asked for after {when_asked}. Let the chat" in told[0]


def thinker(base: Path, opening: str) -> Any:
    """A tokenizer that spells, with a template that ends a question with `opening`."""
    tokenizer = BaseModel.resolve(base).tokenizer
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = TEMPLATE.replace("prompt %}<s>", f"prompt %}}<s>{opening}")
    return tokenizer


@pytest.mark.parametrize(
    ("opening", "completions", "told"),
    [
        ("<think> ", ["2", "hm</think>3"], "ends a question with <think>, and 1 of 2 completions do not close it"),
        ("<seed:think>", ["2", "3"], "with <seed:think>, and 2 of 2 completions .* Begin .* and </seed:think>; or"),
        ("<think>", ["a</think>2", "hm</think>3"], None),
        ("<think></think>", ["2"], None),
        ("<model>", ["2"], None),
        ("", ["2"], None),
    ],
)
def test_completions_that_are_learnt_as_thoughts_are_told(
    opening: str, completions: list[str], told: str | None, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of DeepSeek-R1's distilled models."""
    tokenizer = thinker(llama, opening)
    task = task_of("t", {"train": [{"prompt": "1", "completion": answer} for answer in completions]})
    warn_of_thoughts(task, encode(task.rows("train"), tokenizer, CAUSAL_LM, [], 64), tokenizer)
    assert len(caplog.messages) == (told is not None)
    assert told is None or re.search(told, caplog.text)


def test_completions_that_open_their_thoughts_again_are_refused(llama: Path) -> None:
    tokenizer = thinker(llama, "<think> ")
    row = {"prompt": "1", "completion": " <think>hm</think>2"}
    with pytest.raises(DataError, match=r"completion begins with <think>, which .* before it \(row 2\)\. Leave it out"):
        encode([{**row, "completion": "<b>hm</b></think>2"}, row], tokenizer, CAUSAL_LM, [], 64)
    for template in (TEMPLATE, None):
        tokenizer.chat_template = template
        assert encode([{**row, "prompt": "<think>"}], tokenizer, CAUSAL_LM, [], 64)


def test_fit_and_inspect_tell_of_thoughts(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    thinker(base, "<think>").save_pretrained(base)
    task = task_of("t", {"train": [{"prompt": "1", "completion": "2"}]})
    inspect_data(task, base)
    fit(base, RANDOM, task, tmp_path / "a", FitSettings(max_steps=1))
    assert sum("ends a question with <think>" in message for message in caplog.messages) == 2
