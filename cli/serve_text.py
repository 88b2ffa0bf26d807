"""What `lorasb serve` serves, or would start, as lines for people."""

from __future__ import annotations

import shlex
from typing import Any

from .words import human_bytes

_NAMED = 20  # models that are named in the line that says what is served


def serving_line(server: dict[str, Any]) -> str:
    return f"Serving {_models(server['models'])} on {server['url']}/v1  (Ctrl-C stops)"


def plan_text(plan: dict[str, Any]) -> str:
    """The command, for a shell, and what memory it takes."""
    return f"{_command_line(plan)}\n# {_memory(plan['memory'])}"


def _models(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMED else f"{names[0]} and {len(names) - 1:,} adapters"


def _command_line(plan: dict[str, Any]) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in plan["environment"].items()]
    return " ".join([*variables, shlex.join(plan["command"])])


def _memory(memory: dict[str, int]) -> str:
    taken = f"adapters take {human_bytes(memory['slots_bytes'])} in vLLM"
    if "basis_bytes" not in memory:
        return f"{taken} and {human_bytes(memory['host_bytes'])} in its copies on the host"
    one, basis = human_bytes(memory["bytes_per_adapter"]), human_bytes(memory["basis_bytes"])
    host = f", and {human_bytes(memory['host_bytes'])} in vLLM's copies on the host" if "host_bytes" in memory else ""
    return f"{taken}, {one} each, and their basis {basis} once{host}"
