"""Which chat template the rows of a training were written with.

The fingerprint of a base is of its weights alone: a folder of the user's with a template of its own has the same, and a
newer revision may have.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError
from ..files.storage import read_json, utf8
from .rows import CHAT, COMPLETION

if TYPE_CHECKING:
    from .task import TaskData

TEMPLATE_KEY = "chat_template_sha256"  # of what an adapter says of its training


def template_sha256(folder: Path) -> str | None:
    """Digest of the chat template of a model folder, wherever the tokenizer has it; None without one."""
    with suppress(ArtifactError, KeyError, TypeError):  # of a damaged one: who loads the tokenizer is told
        template = _template_in(folder)
        if template is not None:
            return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return None


def _template_in(folder: Path) -> str | dict[str, str] | None:
    """As transformers finds it, which takes a second to import: a text, or several by their names."""
    more = {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    paths = {"default": folder / "chat_template.jinja", **more}
    found = {name: _text(path) for name, path in paths.items() if path.is_file()}
    if found:
        return found["default"] if list(found) == ["default"] else found
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    return {one["name"]: one["template"] for one in template} if isinstance(template, list) else template


def _text(path: Path) -> str:
    return utf8(path.read_bytes(), path).replace("\r\n", "\n")


def recorded_template(folder: Path, *tasks: TaskData) -> dict[str, str | None]:
    """What a training on the base in `folder` records of the template; nothing where no row is written with one."""
    asked = any(task.kind in (COMPLETION, CHAT) for task in tasks)
    return {TEMPLATE_KEY: template_sha256(folder)} if asked else {}
