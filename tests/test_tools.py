"""Chats with tools: what is learnt of them, how they are asked, and what is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.encoding import IGNORE, prompt_ids
from lorasb_export.data.rows import prompt_of, with_system
from lorasb_export.errors import DataError
from lorasb_export.evaluation.inference import question_of
from tests.conftest import lorasb
from tests.random_adapter import adapter_on
from tests.rows import MARKED, TOOLED, encode, in_json, task_of, tool_row
from tests.tiny import TEMPLATE, make_llama

ROW = tool_row("weather", city="Oslo")
ASKED = (
    '<s>{"name": "weather", "description": "now", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}</s><s>?</s>'
)
UNMARKED = TOOLED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CALL = 'weather{"city": "Oslo"}'


def changed(path: str, value: Any) -> dict[str, Any]:
    """ROW with another value at `path`."""
    row: Any = deepcopy(ROW)
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    inner = row
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return row  # type: ignore[no-any-return]


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = TOOLED
    return tokenizer


@pytest.mark.parametrize("template", [TOOLED, UNMARKED, {"default": MARKED, "tool_use": TOOLED}])
def test_calls_are_learnt_as_words_are_and_asked_for_after_the_tools(template: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    (encoded,) = encode([ROW], tokenizer, CAUSAL_LM, [], 512)
    text = "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"]))
    assert text == f"{ASKED}<s>{CALL}</s><s>7</s><s>It is 7.</s>"
    learnt = [label for label in encoded["labels"] if label != IGNORE]
    assert "".join(tokenizer.convert_ids_to_tokens(learnt)) == f"{CALL}</s>It is 7.</s>"

    call = {**ROW, "messages": ROW["messages"][:2]}
    question = question_of(tokenizer, call, "row 1", [tokenizer.eos_token_id])
    assert question.expected.replace(" ", "") == CALL.replace(" ", "")
    assert question.max_tokens == len(CALL) + 1  # and the end
    asked = prompt_ids(tokenizer, question.prompt)
    assert "".join(tokenizer.convert_ids_to_tokens(asked)) == f"{ASKED}<s>"
    assert prompt_ids(tokenizer, prompt_of(call, "row 1")) == asked
    spoken = prompt_ids(tokenizer, with_system(question.prompt, "s"))
    assert "".join(tokenizer.convert_ids_to_tokens(spoken)) == ASKED.replace("<s>?", "<s>s</s><s>?") + "<s>"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tools", json.dumps(ROW["tools"])),
        ("tools/0/function", {key: ROW["tools"][0]["function"][key] for key in ("parameters", "description", "name")}),
        ("tools/0/function/cache", True),
        ("tools/0/cache", True),
        ("messages/1/content", None),
        ("messages/1/content", ""),
        ("messages/0/tool_calls", None),
        ("messages/3/tool_calls", []),
        ("messages/1/tool_calls/0/function/arguments", json.dumps({"city": "Oslo"})),
    ],
)
def test_what_is_the_same_chat(path: str, value: Any, tokenizer: Any, tmp_path: Path) -> None:
    row = changed(path, value)
    (loaded,) = task_of(json.dumps(row) + "\n", tmp_path / "t").rows("train")
    assert encode([loaded], tokenizer, CAUSAL_LM, [], 512) == encode([ROW], tokenizer, CAUSAL_LM, [], 512)


def test_a_call_without_arguments(tokenizer: Any) -> None:
    for arguments in (None, "", {}, "{}"):
        row = changed("messages/1/tool_calls/0/function/arguments", arguments)
        (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 512)
        assert "weather{}" in "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"]))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("tools", "[", "'tools' is text and no JSON"),
        ("tools", {"name": "weather"}, "'tools' is not a list"),
        ("tools/0", {"name": "weather"}, "tool 1 is no function with a name"),
        ("tools/0/function/name", 1, "tool 1 is no function with a name"),
        ("tools/0/type", "web_search", "tool 1 is no function with a name"),
        ("messages/1/tool_calls", "weather", "'tool_calls' of message 2 is not a list"),
        ("messages/1/tool_calls/0", {"name": "weather"}, "a call in message 2 names no function"),
        ("messages/1/tool_calls/0/function/arguments", "{", "arguments of weather in message 2 are no JSON object"),
        ("messages/1/tool_calls/0/function/arguments", "[1]", "arguments of weather in message 2 are no JSON object"),
        ("messages/1/content", 1, "'content' of message 2 is not a string"),
        ("messages/2/content", None, "'content' of message 3 is not a string"),
        ("messages", [{"role": "user", "content": "?"}], "the assistant says nothing"),
    ],
)
def test_rows_that_are_refused(path: str, value: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        task_of(json.dumps(changed(path, value)) + "\n", tmp_path / "t")
    assert told in str(error.value)
    assert "train.jsonl:1" in str(error.value)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (MARKED, "leaves out 'tools'"),
        (TEMPLATE, "leaves out 'tools'"),
        ("{{ tools }}" + MARKED, "leaves out 'tool_calls'"),
        ("{{ tools }}" + TEMPLATE.replace("m['content']", "m['content'] or 'none'"), "leaves out 'tool_calls'"),
        (TOOLED.replace("['arguments'] | tojson", "['arguments'] + ''"), "the chat template refuses the messages"),
    ],
)
def test_templates_that_do_not_do(template: str, told: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"{told}.* \(row 1\)"):
        encode([ROW], tokenizer, CAUSAL_LM, [], 512)
    tokenizer.chat_template = MARKED
    with pytest.raises(DataError, match="leaves out 'tools'"):
        prompt_ids(tokenizer, {**ROW, "messages": ROW["messages"][:1]})


def test_a_template_that_wants_words_or_calls_of_every_turn(tokenizer: Any) -> None:
    """As Mistral's."""
    silent = "{% for m in messages %}{% if not m['content'] and not m['tool_calls'] %}{{ raise_exception('?') }}"
    tokenizer.chat_template = silent + "{% endif %}{% endfor %}" + TOOLED
    (encoded,) = encode([ROW], tokenizer, CAUSAL_LM, [], 512)
    assert encoded["left_out"] is None


def test_a_call_that_is_learnt_after_something_else_than_the_question_has_no_expected_text(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLED.replace("prompt %}<s>", "prompt %}<s>[think]")
    with pytest.raises(DataError, match=r"writes the call of a tool after something else than the question \(row 1\)"):
        question_of(tokenizer, {**ROW, "messages": ROW["messages"][:2]}, "row 1", ())


def test_the_commands_take_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_llama(tmp_path / "llama")
    (base / "chat_template.jinja").write_text(TOOLED)
    adapter_on(base, tmp_path / "adapters" / "a", CAUSAL_LM)
    call = {**ROW, "messages": ROW["messages"][:2]}
    path = in_json(tmp_path, ROW, call)
    told = json.loads(lorasb("inspect", "--data", str(path), "--model", str(base), "--json").stdout)
    segments = told["first_row"]["segments"]
    learnt = [part["text"].replace(" ", "") for part in segments if part["learnt"]]
    assert learnt == [f"{CALL}</s>".replace(" ", ""), "Itis7.</s>"]

    done = lorasb("generate", "--prompts", str(path), "--max-tokens", "2")
    assert (done.exit_code, done.stdout.count("[a] "), done.stdout.splitlines()[0]) == (0, 2, "1. 7")
    done = lorasb("evaluate", "a", "--data", str(path), "--predictions", "p.jsonl")
    assert done.exit_code == 0, done.stderr
