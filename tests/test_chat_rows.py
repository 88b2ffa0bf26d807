"""Chats → token ids with labels on what the assistant says, with templates that mark it and such that do not."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tokenizers.normalizers import NFC, NFKC, Normalizer, Sequence

from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.chat_template import fixed_date
from lorasb_export.data.encoding import IGNORE, prompt_ids
from lorasb_export.data.rows import question_and_answer
from lorasb_export.data.task import task_of
from lorasb_export.errors import DataError
from tests.rows import CHAT, CHAT_LINE, MARKED, encode
from tests.tiny import TEMPLATE


def test_loss_of_a_chat_is_on_what_the_assistant_says(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = MARKED

    def spelled(ids: list[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    turns = [("system", "add"), ("user", "1+1="), ("assistant", "2"), ("user", "2+2="), ("assistant", "4")]
    row: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
    assert spelled(encoded["input_ids"]) == "<s>add</s><s>1+1=</s><s>2</s><s>2+2=</s><s>4</s>"
    assert spelled([label for label in encoded["labels"] if label != IGNORE]) == "2</s>4</s>"
    question, answer = question_and_answer(row)
    assert spelled(prompt_ids(tokenizer, question)) == "<s>add</s><s>1+1=</s><s>2</s><s>2+2=</s><s>"
    assert answer == "4"
    row["messages"].append({"role": "user", "content": "thanks"})
    with pytest.raises(DataError, match="do not end with the assistant's answer"):
        question_and_answer(row)


def test_rows_have_the_same_tokens_whatever_the_day(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + MARKED
    dates = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %A %-d %B, %Y-%m-%d') }}{% endif %}"
    chat = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    for row in (chat, {"prompt": "1", "completion": "2"}):
        (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
        assert "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"])) == "2024<s>1</s><s>2</s>"
    asked = "".join(tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "1")))
    assert asked == f"{date.today().year}<s>1</s><s>"

    tokenizer.chat_template = dates
    written = tokenizer.apply_chat_template(chat["messages"], tokenize=False, **fixed_date(tokenizer))
    assert written == "\n26 Jul 2024, Friday 26 July, 2024-07-26"


@pytest.mark.parametrize(
    ("said", "normalizer", "learnt"),
    [
        ("cafe\N{COMBINING ACUTE ACCENT}", NFC(), "café"),  # as Qwen's
        ("cafe\N{COMBINING ACUTE ACCENT}", Sequence([NFKC()]), "café"),
        ("ok\N{SNOWMAN}", None, "ok"),  # which is no token here
        ("\N{SNOWMAN}ok", None, "ok"),
    ],
)
def test_a_turn_ends_where_it_ends_whatever_the_tokenizer_makes_of_its_letters(
    said: str, normalizer: Normalizer | None, learnt: str, llama: Path
) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_tokens(["é"])
    tokenizer.chat_template = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>", 1)
    turns = [("user", "1"), ("assistant", said), ("user", "2"), ("assistant", "3"), ("user", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (encoded,) = encode([row], tokenizer, CAUSAL_LM, [], 64)
    ids = [label for label in encoded["labels"] if label != IGNORE]
    assert tokenizer.convert_ids_to_tokens(ids) == [*learnt, "3"]


def test_chat_templates_that_do_not_do(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    rows = [json.loads(CHAT_LINE)]
    tokenizer.chat_template = MARKED + "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(DataError, match=r"the chat template refuses the messages: turns must alternate \(row 1\)"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    tokenizer.chat_template = {"rag": MARKED, "tool_use": MARKED}
    with pytest.raises(DataError, match=r"\(rag, tool_use\), and none is called 'default' \(row 1, .*Save the one"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    tokenizer.chat_template = {"default": MARKED, "rag": "{{ raise_exception('not this one') }}"}
    assert encode(rows, tokenizer, CAUSAL_LM, [], 64)


_TURN = MARKED.partition("%}")[2].partition("{% endfor")[0]


@pytest.mark.parametrize(
    "template",
    [
        f"{{% macro turn(m) %}}{_TURN}{{% endmacro %}}{{% for m in messages %}}{{{{ turn(m) }}}}{{% endfor %}}",
        f"{{% set said %}}{MARKED}{{% endset %}}{{{{ said }}}}",
        f"{{% filter trim %}}{MARKED}{{% endfilter %}}",
        "{% set said %}{% generation %} {{ messages[1]['content'] }}{% endgeneration %}{% endset %}{{ said | trim }}",
        "{% set said %}{% generation %}{{ messages[1]['content'] }} {% endgeneration %}{% endset %}{{ said | trim }}!",
    ],
)
def test_marks_whose_place_transformers_gets_wrong_are_refused(template: str, llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = template
    told = r"does not tell where the assistant's words begin and end \(row 1\)\. Let the template write .* outside of"
    with pytest.raises(DataError, match=told):
        encode([CHAT], tokenizer, CAUSAL_LM, [], 64)


def test_marks_may_be_in_a_macro_that_writes_nothing_before_them(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    said = MARKED[MARKED.index("{% generation") : MARKED.index("{% else")]
    found = []
    for template in (MARKED, "{% macro said(m) %}" + said + "{% endmacro %}" + MARKED.replace(said, "{{ said(m) }}")):
        tokenizer.chat_template = template
        found += encode([CHAT], tokenizer, CAUSAL_LM, [], 64)
    assert found[0] == found[1]


@pytest.mark.parametrize(("left", "right"), [("", ""), ("-", "-"), ("", "-"), ("-", ""), ("+", "+")])
def test_marks_take_the_white_space_that_jinja_has_them_take(left: str, right: str, llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = re.sub(r"{% ((end)?generation) %}", rf"\n  {{%{left} \1 {right}%}}\n  ", MARKED)
    (encoded,) = encode([CHAT], tokenizer, CAUSAL_LM, [], 64)
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False).input_ids


def test_what_is_no_character_may_be_said(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = MARKED
    turns = [{"role": role, "content": "a\ufdd0b"} for role in ("user", "assistant")]
    (encoded,) = encode([{"messages": turns}], tokenizer, CAUSAL_LM, [], 64)
    (without,) = encode([{"messages": [turn | {"content": "ab"} for turn in turns]}], tokenizer, CAUSAL_LM, [], 64)
    assert [label == IGNORE for label in encoded["labels"]] == [label == IGNORE for label in without["labels"]]


@pytest.mark.parametrize("line_break", ["", "\n"])
def test_without_marks_a_turn_is_from_where_it_is_asked_for_to_the_end_of_the_chat_up_to_it(
    line_break: str, llama: Path
) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    turns = [("system", "s"), ("user", "1"), ("assistant", "2 3 "), ("user", "4"), ("assistant", "5"), ("user", "6")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = []
    for template in (TEMPLATE, MARKED):
        broken = template.replace("</s>", "</s>" + line_break).replace(f"{line_break}{{% endgen", "{% endgen")
        tokenizer.chat_template = broken.replace("{% endgeneration %}", "{% endgeneration %}" + line_break)
        found += encode([row], tokenizer, CAUSAL_LM, [], 64)
    assert found[0] == found[1]
    learnt = [label for label in found[0]["labels"] if label != IGNORE]
    assert tokenizer.convert_ids_to_tokens(learnt) == [*"2 3 ", "</s>", "5", "</s>"]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (TEMPLATE.replace("prompt %}<s>", "prompt %}<s>[think]"), "ua"),  # DeepSeek-R1's, which opens thoughts
        (TEMPLATE.replace("prompt %}<s>", "prompt %}<s><think>"), "ua"),
        (TEMPLATE.replace("</s>", "{% if loop.last %}.{% endif %}</s>"), "uaua"),  # as Qwen3's in a chat's last turn
        (TEMPLATE, "au"),  # nothing is asked before
    ],
)
def test_without_marks_a_template_that_writes_a_turn_otherwise_when_it_is_asked_is_refused(
    template: str, turns: str, llama: Path
) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = template
    roles = {"u": "user", "a": "assistant"}
    row = {"messages": [{"role": roles[turn], "content": str(i)} for i, turn in enumerate(turns)]}
    told = rf"does not tell where .* in turn {turns.index('a') + 1} \(row 1\)\. Enclose them in \{{% generation %\}}"
    with pytest.raises(DataError, match=told) as error:
        encode([row], tokenizer, CAUSAL_LM, [], 64)
    assert ("or use prompt/completion rows" in str(error.value)) == ("<think>" not in template)


ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
THOUGHTS = "{% if m['KEY'] WHEN %}[{{ m['KEY'] }}]{% endif %}"


def thinking(key: str, when: str = "", template: str = MARKED) -> str:
    """A template that writes the thoughts before the words."""
    written = THOUGHTS.replace("KEY", key).replace("WHEN", when)
    return template.replace("{% generation %}", "{% generation %}" + written)


def reasoned(**given: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", **given}]}


@pytest.mark.parametrize("read", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("given", ["reasoning", "reasoning_content"])
def test_reasoning_is_learnt_by_whichever_name_it_has(read: str, given: str, llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = thinking(read)
    (encoded,) = encode([reasoned(**{given: "so"})], tokenizer, CAUSAL_LM, [], 64)
    learnt = [label for label in encoded["labels"] if label != IGNORE]
    assert "".join(tokenizer.convert_ids_to_tokens(learnt)) == "[so]2</s>"


def test_reasoning_that_a_template_never_writes_is_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    told = r"the base's chat template leaves out 'reasoning' \(row 1\)"
    for template in (MARKED, TEMPLATE, thinking("thinking")):
        tokenizer.chat_template = template
        for nothing in ("", "\n\n"):  # the latter is between Qwen3's tags where it does not think
            assert encode([reasoned(reasoning=nothing)], tokenizer, CAUSAL_LM, [], 64)
        earlier = {"messages": [*reasoned(reasoning="so")["messages"], *CHAT["messages"]]}
        for row in (reasoned(reasoning="so"), earlier):
            with pytest.raises(DataError, match=told):
                encode([row], tokenizer, CAUSAL_LM, [], 64)
    tokenizer.chat_template = thinking("reasoning", "and loop.last")  # of turns before, as many do not
    encode(
        [earlier, {"messages": [*earlier["messages"][:2], *reasoned(reasoning="so")["messages"]]}],
        tokenizer,
        CAUSAL_LM,
        [],
        64,
    )


def test_thinking_is_for_templates_that_name_it(llama: Path) -> None:
    """As gpt-oss's does; `enable_thinking` is no such name."""
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = thinking("thinking")
    (encoded,) = encode([reasoned(thinking="so")], tokenizer, CAUSAL_LM, [], 64)
    assert "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"])).endswith("[so]2</s>")
    tokenizer.chat_template = "{% if enable_thinking %}{% endif %}" + thinking("reasoning")
    with pytest.raises(DataError, match=r"leaves out 'thinking' \(row 1\)\. Call it 'reasoning'"):
        encode([reasoned(thinking="so")], tokenizer, CAUSAL_LM, [], 64)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"reasoning": ["so"]}, "the reasoning of message 2 is no text"),
        ({"reasoning": "so", "reasoning_content": "or so"}, "or differs under its two keys"),
    ],
)
def test_reasoning_that_is_given_otherwise_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        task_of("t", {"train": [reasoned(**given)]})


@pytest.mark.parametrize(
    ("names", "roles", "expected"),
    [
        ("", "dua", "system:0|user:1|assistant:2|"),
        ("", "duduas", "system:0//2//5|user:1|user:3|assistant:4|"),
        ("", "udua", "system:1|user:0|user:2|assistant:3|"),
        ("", "sdua", "system:0//1|user:2|assistant:3|"),
        ("", "ussua", "user:0|system:1|system:2|user:3|assistant:4|"),
        ("{% set role = 'developer' %}", "sdua", "system:0|developer:1|user:2|assistant:3|"),
    ],
)
def test_developers_are_written_as_vllm_writes_them(names: str, roles: str, expected: str, llama: Path) -> None:
    """As its `safe_apply_chat_template` does (integration/test_serve_shared.py asks it)."""
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = (
        names + "{% for m in messages %}{{ m['role'] + ':' + m['content'] | replace('\\n', '/') + '|' }}{% endfor %}"
    )
    turns = [{"role": ROLES[role], "content": str(i)} for i, role in enumerate(roles)]
    assert "".join(tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, turns))) == expected
    marks = "{% generation %}{{ m['content'] | replace('\\n', '/') }}{% endgeneration %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['role']", marks + "{{ m['role']")
    (encoded,) = encode([{"messages": turns}], tokenizer, CAUSAL_LM, [], 64)
    spelled = "".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"]))
    assert spelled == re.sub(r"(\w+):([^|]*)", r"\2\1:\2", expected)


def test_turns_that_a_template_leaves_out_are_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer

    def read(roles: str) -> None:
        turns = [{"role": ROLES[role], "content": str(i)} for i, role in enumerate(roles)]
        encode([{"messages": turns}] * 2, tokenizer, CAUSAL_LM, [], 64)
        prompt_ids(tokenizer, turns[:-1])

    for marked in (MARKED, TEMPLATE):
        said = "{% if m['role'] in ['user', 'assistant'] or m['role'] == 'system' and loop.first %}"
        tokenizer.chat_template = marked.replace("%}<s>", "%}" + said + "<s>", 1).replace(
            "{% endfor", "{% endif %}{% endfor"
        )
        for roles in ("ua", "sua", "uaua"):
            read(roles)
        with pytest.raises(
            DataError, match=r"leaves out what system says later on \(row 1\)\. Write it into the user's"
        ):
            read("usua")
        for roles, place in (("uatua", " later on"), ("tua", "")):
            with pytest.raises(DataError, match=rf"leaves out what tool says{place} \(row 1\)"):
                read(roles)
        with pytest.raises(DataError, match="leaves out what tool says"):
            prompt_ids(tokenizer, [{"role": "user", "content": "1"}, {"role": "tool", "content": "2"}])


def test_what_a_turn_says_is_looked_for_once_in_a_template(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = TEMPLATE + "{# of this test alone #}"
    calls = Mock(wraps=tokenizer.apply_chat_template)
    monkeypatch.setattr(tokenizer, "apply_chat_template", calls)
    counts = []
    for _ in range(2):
        calls.reset_mock()
        prompt_ids(tokenizer, CHAT["messages"][:1])
        counts.append(calls.call_count)
    assert counts == [2, 1]


def test_a_row_in_which_nothing_is_marked_is_not_called_too_long(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = BaseModel.resolve(llama).tokenizer
    tokenizer.chat_template = MARKED.replace("'assistant'", "'model'", 1)
    rows = [json.loads(CHAT_LINE)]
    with pytest.raises(DataError, match=r"no token of theirs is to be learnt \(all rows\). .*{% generation %}"):
        encode(rows, tokenizer, CAUSAL_LM, [], 64)
    encode([*rows, {"messages": [{"role": "model", "content": "2"}]}], tokenizer, CAUSAL_LM, [], 64)
    assert caplog.messages == ["1 of 2 rows left out: no token of theirs is to be learnt (row 1)"]
