"""Chats that are learnt otherwise than they are asked, or whose answers would not end: `fit` tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorasb_export import fit
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.encoding import encode
from lorasb_export.data.task import task_of
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.chats import warn_of_chats
from tests.rows import CHAT_LINE, MARKED

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
