"""How a base's chat template writes a chat, and where in it the assistant speaks."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import DataError, some
from .chat import REASONING, Chat, Turn, calls_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENED_THOUGHTS = re.compile(r"<[\w:]*(think|thought|reason)\w*>(?=\s*$)")  # at the end of a question
_UNTOLD = "the chat template does not tell where the assistant's words begin and end"
_STARTS = re.compile(r"(\{%[-+]?\s*generation\s*)([-+]?%\})")
_ENDS = re.compile(r"(\{%[-+]?\s*)(endgeneration\s*[-+]?%\})")
# A macro of the name of transformers' function, which it takes no other for. The expression at its end is nothing: a
# line break after a block would be left out.
_DATES = "".join(f"|replace('%{code}', '{date(2024, 7, 26):%{code}}')" for code in ("-d", "-m", *"aAbBdejmyYHIMSp"))
_ONE_DAY = "{% macro strftime_now(format) %}{{ format" + _DATES + " }}{% endmacro %}{{ '' }}"

# (template, role, first or not, and whether that role speaks before and after) of turns whose words a chat was seen to
# have: once, since it takes a rendering.
_SEEN_WRITTEN: set[tuple[str, str, bool, bool, bool]] = set()

_Written = tuple[str, list[tuple[int, int]]]  # as it is written, and where (characters) in it the assistant speaks


def require_template(
    tokenizer: PreTrainedTokenizerBase, where: object = None, tools: list[dict[str, Any]] | None = None
) -> None:
    """Raise DataError where nothing says how the turns of a chat, or of one with tools, are written."""
    place = f"{where}, {tokenizer.name_or_path}" if where else tokenizer.name_or_path
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" not in template and not (tools and "tool_use" in template):
        what = f"the tokenizer has several chat templates ({some(sorted(template))}), and none is called 'default'"
        raise DataError(what, where=place, fix="Save the one to be used as chat_template.jinja")
    if template is None:
        fix = "Use rows of prompts and no system message, or give the base a chat template"
        raise DataError("messages are given, but the tokenizer has no chat template", where=place, fix=fix)


def fixed_date(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None = None) -> dict[str, str]:
    """What makes the chat template, or the one for chats with tools, write one and the same date every day.

    Some put today's before every prompt. Rows get Llama 3's own default instead, so that a run trains on the same
    tokens whenever it is started or resumed.
    """
    if tokenizer.chat_template is None:
        return {}
    return {"chat_template": _ONE_DAY + tokenizer.get_chat_template(tools=tools)}


def _as_served(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Chat:
    """With turns of a role `developer` as vLLM gives them to a template that does not name it: they are the system's,
    and all that the system says is one turn, the first."""
    template = tokenizer.get_chat_template(tools=chat.tools)
    if not any(turn["role"] == "developer" for turn in chat.turns) or re.search("""(["'])developer\\1""", template):
        return chat
    system = [turn for turn in chat.turns if turn["role"] in ("system", "developer")]
    others = [turn for turn in chat.turns if turn["role"] not in ("system", "developer")]
    if system == chat.turns[:1]:  # it keeps its other keys
        return chat._replace(turns=[{**_less(system[0], "tools"), "role": "system"}, *others])
    said = "\n\n".join(turn["content"] for turn in system if turn["content"])
    return chat._replace(turns=[{"role": "system", "content": said}, *others])


def chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, where: object, *, asked: bool, of_row: bool) -> list[int]:
    """Token ids of a chat as the template writes it.

    Args:
        asked: whether the assistant is to go on.
        of_row: whether it is of a row, and has the date of those (`fixed_date`).

    Raises:
        DataError: there is no template, it refuses the chat, or leaves out its tools, calls, reasoning or turns.
    """
    require_template(tokenizer, where, chat.tools)
    chat = _as_served(tokenizer, chat)
    with _refusals(where):
        text = _written(tokenizer, chat, asked=asked, of_row=of_row)
        _require_all_written(tokenizer, chat, text, where, asked=asked, of_row=of_row)
    return tokenizer(text, add_special_tokens=False).input_ids


def _written(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, asked: bool = False, of_row: bool = True) -> str:
    day = fixed_date(tokenizer, chat.tools) if of_row else {}
    options: Any = {"tools": chat.tools, "tokenize": False, "add_generation_prompt": asked, **day}
    return str(tokenizer.apply_chat_template(chat.turns, **options))


def _is_written(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, *, asked: bool, of_row: bool) -> bool:
    """Whether it is this text that the template makes of the chat."""
    try:
        return text == _written(tokenizer, chat, asked=asked, of_row=of_row)
    except (TemplateError, TypeError):  # Mistral's refuses an answer of neither words nor calls
        return False


def _require_all_written(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, where: object, *, asked: bool, of_row: bool
) -> None:
    """Raise DataError where `text`, the chat as it is written, lacks a part of it."""
    _require_tools_and_reasoning(tokenizer, chat, text, where, asked=asked, of_row=of_row)
    _require_words_of_roles(tokenizer, chat, text, where, asked=asked, of_row=of_row)


def _require_tools_and_reasoning(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, where: object, *, asked: bool, of_row: bool
) -> None:
    """Raise DataError where the text is the same without the tools, or without the calls of them.

    Or where the chat up to the last turn with reasoning is the same without that: of turns before the last many
    templates leave it out, as they do where a server asks.
    """
    without = {}
    if chat.tools:
        without["tools"] = Chat(chat.turns, None)
    if any(map(calls_tools, chat.turns)):
        without["tool_calls"] = Chat([_less(turn, "tool_calls") for turn in chat.turns], chat.tools)
    left_out = [
        key for key, other in without.items() if _is_written(tokenizer, other, text, asked=asked, of_row=of_row)
    ]
    if thought := [n for n, turn in enumerate(chat.turns, 1) if turn["role"] == "assistant" and _thoughts(turn)]:
        *before, last = chat.turns[: thought[-1]]
        upto = _written(tokenizer, Chat([*before, last], chat.tools), of_row=of_row)
        unreasoned = Chat([*before, _less(last, *REASONING)], chat.tools)
        if _is_written(tokenizer, unreasoned, upto, asked=False, of_row=of_row):
            left_out.append("reasoning")
    template = tokenizer.get_chat_template(tools=chat.tools)
    if any(turn.get("thinking") for turn in chat.turns) and not re.search(r"\bthinking\b", template):
        what, fix = "the base's chat template leaves out 'thinking'", "Call it 'reasoning', as servers do"
        raise DataError(what, where=where, fix=fix)
    if left_out:
        fix = "Write them into a message's content and leave the key out, or take a base whose template has them"
        raise DataError(f"the base's chat template leaves out {left_out[0]!r}", where=where, fix=fix)


def _require_words_of_roles(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, where: object, *, asked: bool, of_row: bool
) -> None:
    """Raise DataError where the text is the same whatever another than the assistant says."""
    template = tokenizer.get_chat_template(tools=chat.tools)
    roles = [turn["role"] for turn in chat.turns]
    for place, turn in enumerate(chat.turns):
        role, words = turn["role"], turn.get("content")
        key = template, role, place == 0, role in roles[:place], role in roles[place + 1 :]
        if role == "assistant" or not words or key in _SEEN_WRITTEN:
            continue
        otherwise = Chat([*chat.turns[:place], {**turn, "content": f"{words}0"}, *chat.turns[place + 1 :]], chat.tools)
        if _is_written(tokenizer, otherwise, text, asked=asked, of_row=of_row):
            what = f"the base's chat template leaves out what {role} says{' later on' if place else ''}"
            fix = "Write it into the user's messages, or take a base whose template has it"
            raise DataError(what, where=where, fix=fix)
        _SEEN_WRITTEN.add(key)


def _thoughts(turn: Turn) -> str:
    return str(turn.get("reasoning") or "").strip()


def _less(turn: Turn, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in keys}


@contextmanager
def _refusals(where: object) -> Iterator[None]:
    """What a chat template refuses, as a DataError: many insist on turns that alternate, or on no system message."""
    try:
        yield
    except (TemplateError, TypeError) as error:  # the latter of a template that takes a call's arguments for text
        fix = "Write the messages as the base's template takes them"
        raise DataError(f"the chat template refuses the messages: {error}", where=where, fix=fix) from None


def chat_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[slice]]:
    """Token ids of a chat, uncut, and where in them the assistant speaks.

    Raises:
        DataError: there is no template, it refuses the chat, leaves out its tools, calls, reasoning or turns, or does
            not tell where the assistant speaks.
    """
    require_template(tokenizer, where, chat.tools)
    chat = _as_served(tokenizer, chat)
    with _refusals(where):
        if _STARTS.search(tokenizer.get_chat_template(tools=chat.tools)):
            text, spans = _marked(chat, tokenizer, where)
        else:
            text, spans = _bounded(chat, tokenizer, where)
        _require_all_written(tokenizer, chat, text, where, asked=False, of_row=True)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = tokens["input_ids"], tokens["offset_mapping"]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    # By the tokens that overlap what is marked: its last character may have none of its own, and transformers' mask,
    # which looks for that one, then goes on to the end of the chat.
    return ids, [slice(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]


def _marked(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> _Written:
    """By a template that marks what the assistant says with {% generation %}.

    Raises:
        DataError: it is not where transformers has it, which counts what the template has written before: what a macro,
            {% set %} or {% filter %} writes it gets only where that ends.
    """
    told: Any = {**tokenizer.special_tokens_map, **fixed_date(tokenizer, chat.tools), "tools": chat.tools}
    rendered: Any = render_jinja_template([chat.turns], return_assistant_tokens_mask=True, **told)
    (text,), (spans,) = rendered
    mark = next(sign for sign in map(chr, range(0xFDD0, 0xFDF0)) if sign not in text)  # they are no characters
    rendered = render_jinja_template([chat.turns], **told | {"chat_template": _seen(told["chat_template"], mark)})
    (seen,), _ = rendered
    places = [found.start() - before for before, found in enumerate(re.finditer(mark, seen))]
    if seen.replace(mark, "") != text or places != [place for span in spans for place in span]:
        fix = "Let the template write {% generation %} outside of macros, {% set %} and {% filter %}"
        raise DataError(_UNTOLD, where=where, fix=fix)
    return text, spans


def _seen(template: str, mark: str) -> str:
    """With `mark` on both sides of what each {% generation %} encloses. New tags stand where its own take white space
    away."""
    first = f"replace('', '{mark}', 1)"
    opened = _STARTS.sub(rf"\1%}}{{% filter {first}|reverse|{first}|reverse \2", template)
    return _ENDS.sub(r"\1endfilter %}{% \2", opened)


def _bounded(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> _Written:
    """By a template without marks: a turn begins where it is asked for, and ends where the chat up to it does.

    White space behind that end, as a line break after the token that ends a turn, is nothing that is said.

    Raises:
        DataError: the chat's text does not begin with that of a part of it.
    """

    def written(turns: int, *, asked: bool = False) -> str:
        return _written(tokenizer, Chat(chat.turns[:turns], chat.tools), asked=asked)

    text, spans = written(len(chat.turns)), []
    for i, turn in enumerate(chat.turns):
        if turn["role"] != "assistant":
            continue
        asked, said = (written(i, asked=True) if i else ""), written(i + 1).rstrip()
        if not i or not (text.startswith(said) and said.startswith(asked) and len(asked) < len(said)):
            fix = "Enclose them in {% generation %} in the template"
            if not OPENED_THOUGHTS.search(asked):  # in which a completion would be learnt
                fix += ", or use prompt/completion rows for single turns"
            raise DataError(f"{_UNTOLD} in turn {i + 1}", where=where, fix=fix)
        spans.append((len(asked), len(said)))
    return text, spans
