"""A row of every kind as it lies in a file, a task of such rows, and chat templates that mark what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasb_export.data import TaskData, load_task
from lorasb_export.task_source import TaskSource

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
THINKING = MARKED.replace("{% generation %}", "{% generation %}[] ")  # as Qwen3's, whose thoughts are plain tokens


def task_of(lines: str, folder: Path) -> TaskData:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(lines)
    return load_task("t", folder)


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
