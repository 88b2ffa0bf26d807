"""A row of every kind as it lies in a file, a task of such rows, and chat templates that mark what is answered."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from lorasb_export.data import encoding
from lorasb_export.data.source import TaskSource
from lorasb_export.data.task import TaskData, load_task

PAIR = {"prompt": "question", "completion": "answer"}  # columns of other names
GOOD = '{"prompt": "1+1=", "completion": "2"}\n'
CLASS = '{"text": "a", "label": "yes"}\n'
CHAT_LINE = '{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}\n'
CHAT = json.loads(CHAT_LINE)
MARKED = (  # tests.tiny.TEMPLATE that says what the assistant says
    "{% for m in messages %}<s>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
TOOLED = (  # with tools, and calls of them as the assistant's words
    "{% if tools %}<s>{% for t in tools %}{{ t['function'] | tojson }}{% endfor %}</s>{% endif %}"
    + MARKED.replace(
        "{{ m['content'] }}</s>{% endg",
        "{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function']['name'] }}"
        "{{ c['function']['arguments'] | tojson }}{% endfor %}</s>{% endg",
    )
)
encode = partial(encoding.encode, embeddings=math.inf)  # for a base that has one of every token
THINKING = MARKED.replace("{% generation %}", "{% generation %}[] ")  # as Qwen3's, whose thoughts are plain tokens


def task_of(lines: str, folder: Path) -> TaskData:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(lines)
    return load_task("t", folder)


def tool_row(name: str, **arguments: str) -> dict[str, Any]:
    """A chat that calls a tool, which takes texts."""
    properties = {key: {"type": "string"} for key in arguments}
    parameters = {"type": "object", "properties": properties}
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            {"role": "assistant", "content": "It is 7."},
        ],
        "tools": [{"type": "function", "function": {"name": name, "description": "now", "parameters": parameters}}],
    }


def rows_of(path: Path, **source: Any) -> list[dict[str, Any]]:
    return list(load_task("t", TaskSource(str(path), **source)).rows("train"))


def in_json(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_csv(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
