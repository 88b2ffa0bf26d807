"""Chats as a chat template takes them: the turns, and the tools that may be called in them.

Both become what vLLM makes of a request with OpenAI's fields, so that a row reads as the request that a server is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import DataError

Turn = Mapping[str, Any]  # "role" and "content"; of the assistant maybe "tool_calls" and "reasoning"
REASONING = ("reasoning", "reasoning_content")  # what the assistant thought: of the two keys templates read one
_TOOL = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
_CALL = '{"type": "function", "function": {"name": …, "arguments": {…}}}'
_ALWAYS, _IF_GIVEN = ("name", "description", "parameters"), ("strict", "defer_loading")  # of a function, in this order


class Chat(NamedTuple):
    """What a chat template is given; None where there are no tools, since some templates write of an empty list."""

    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def chat_of(prompt: Sequence[Turn] | Mapping[str, Any], where: object = None) -> Chat:
    """The chat of turns, or of a row with `messages` and maybe `tools`.

    Raises:
        DataError: tools or calls that are not of OpenAI's form, or reasoning that is no text.
    """
    turns, tools = (prompt["messages"], prompt.get("tools")) if isinstance(prompt, Mapping) else (prompt, None)
    return Chat([_turn(turn, number, where) for number, turn in enumerate(turns, 1)], _tools(tools, where))


def calls_tools(turn: Turn) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("tool_calls"))


def says_something(turn: Turn) -> bool:
    """Whether a turn that `chat_of` takes has words, reasoning or calls."""
    return calls_tools(turn) or any((turn.get(key) or "").strip() for key in ("content", *REASONING))


def _tools(tools: Any, where: object) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):  # as datasets of the Hub have them, whose columns are of one type
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise DataError("'tools' is text and no JSON", where=where, fix=f"Give a list of {_TOOL}") from None
    if not isinstance(tools or [], list):
        raise DataError("'tools' is not a list", where=where, fix=f"Give a list of {_TOOL}")
    return [_tool(tool, number, where) for number, tool in enumerate(tools or [], 1)] or None


def _tool(tool: Any, number: int, where: object) -> dict[str, Any]:
    function = _function(tool)
    if function is None:
        raise DataError(f"tool {number} is no function with a name", where=where, fix=f"Write {_TOOL}")
    given = {key: function[key] for key in _IF_GIVEN if function.get(key) is not None}
    return {"type": "function", "function": {key: function.get(key) for key in _ALWAYS} | given}


def _turn(turn: Turn, number: int, where: object) -> dict[str, Any]:
    """Without what is null, as the content of a call is in what OpenAI answers."""
    written = {key: value for key, value in turn.items() if value is not None} | _reasoning(turn, number, where)
    if not calls_tools(turn):
        written.pop("tool_calls", None)
        return written
    calls = turn["tool_calls"]
    if not isinstance(calls, list):
        raise DataError(f"'tool_calls' of message {number} is not a list", where=where, fix=f"Use [{_CALL}, …]")
    return {"content": ""} | written | {"tool_calls": [_call(call, number, where) for call in calls]}


def _reasoning(turn: Turn, number: int, where: object) -> dict[str, str]:
    """What the assistant thought, under both keys, whichever it is given under."""
    given = [turn[key] for key in REASONING if turn["role"] == "assistant" and turn.get(key) is not None]
    if not given:
        return {}
    if not isinstance(given[0], str) or given[-1] != given[0]:
        what = f"the reasoning of message {number} is no text, or differs under its two keys"
        raise DataError(what, where=where, fix='Write it as "reasoning": "…"')
    return dict.fromkeys(REASONING, given[0])


def _call(call: Any, number: int, where: object) -> dict[str, Any]:
    function = _function(call)
    if function is None:
        raise DataError(f"a call in message {number} names no function", where=where, fix=f"Write {_CALL}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # as OpenAI's are; templates take an object
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        what = f"the arguments of {function['name']} in message {number} are no JSON object"
        raise DataError(what, where=where, fix=f"Write {_CALL}")
    return {**call, "function": {**function, "arguments": arguments}}


def _function(value: Any) -> dict[str, Any] | None:
    """What is under `function` of a tool or a call, if it has a name."""
    function = value.get("function") if isinstance(value, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return function if named and value.get("type") in (None, "function") else None
