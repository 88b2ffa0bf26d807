"""Which files of a folder go to the Hub, and what is taken out of them first."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..base.model import BaseModel
from ..base.side_files import LICENCES, TEXTS
from ..errors import ArtifactError
from ..files.kind import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    BASIS_CONFIG,
    BASIS_FILES,
    BASIS_WEIGHTS,
    CARD,
    RECORD,
    artifact_kind,
)
from ..files.storage import read_json, to_json, version_of
from ..format import sealed
from ..hub.ids import ADAPTERS, BASES, BASIS, PARTS
from ..provenance import MAX_COMMAND, without_folders

Files = dict[str, "Path | bytes"]  # path in the repository → the file of weights, or the content of another
Seen = dict[Path, tuple[int, ...]]  # file → what tells it from another one of its name

SUMS = "SHA256SUMS"  # made by every push, of exactly what it publishes
PROJECT = "project"  # the kind of a repository with a project's basis and adapters

_GRAPHS = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.onnx_adapter")
_ALWAYS = (CARD, *LICENCES, RECORD, "*.png")
# What a folder of each kind may publish. No pattern admits a pickle, a checkpoint or a cache.
_ALLOWED = {
    "basis": (*BASIS_FILES, *_ALWAYS),
    "adapter": (*ADAPTER_FILES, *BASIS_FILES, "training_log.jsonl", *_ALWAYS),
    "peft": ("adapter_model.safetensors", ADAPTER_CONFIG, *_ALWAYS),
    "merged": ("*.safetensors", "*.safetensors.index.json", *TEXTS, *_ALWAYS),
    "onnx": (*_GRAPHS, "genai_config.json", *TEXTS, *_ALWAYS),
    "onnx-adapters": (*_GRAPHS, "genai_config.json", *TEXTS, *_ALWAYS),
}
_PART = re.compile(rf"(?:{BASIS}|(?:{BASES}|{ADAPTERS})/[^/]+)(?=/)")
_IN_PARTS = tuple(f"{part}/{pattern}" for part, kind in PARTS.items() for pattern in _ALLOWED[kind])
# Without it a folder is of no use. The weights of the other kinds are read, and so found missing.
_NEEDED = {"peft": "adapter_model.safetensors", "onnx": "model.onnx", "onnx-adapters": "model.onnx"}
_DATA_FILE = re.compile(rb"[\w-]+\.onnx_data")  # in a graph, where names stand as they are
# Left in the repository by an earlier push, these would be loaded together with the new files.
_STALE = ("*.safetensors", "*.safetensors.index.json", BASIS_CONFIG, *_GRAPHS)
_MARKS = {
    ADAPTER_WEIGHTS: "adapter",  # first: an embedded basis lies beside it
    BASIS_WEIGHTS: "basis",
    "adapter_model.safetensors": "peft",
    "*.onnx": "onnx",
    "*.safetensors": "merged",
    **{f"{part}/{kind}.safetensors": PROJECT for part, kind in PARTS.items()},
}
_OURS = (ADAPTER_CONFIG, BASIS_CONFIG, RECORD)
_CONFIGS = ("config.json", "tokenizer_config.json")  # of transformers; the second lists all added tokens
_LOADED_FROM = ("_name_or_path", "name_or_path")
# Forms that nothing else has, as long as tokens are: vocabularies are full of their beginnings.
_TOKEN = re.compile(
    rb"\b(?:hf_\w{16}"
    rb"|sk-(?:[A-Za-z0-9]{20}|(?:proj|svcacct|admin|ant|or-v1)-[\w-]{20})"  # OpenAI, Anthropic, OpenRouter
    rb"|gh[opsru]_[A-Za-z0-9]{36}|github_pat_\w{36}|glpat-[\w-]{20}"
    rb"|xox[abpr]-[A-Za-z0-9-]{20}|AKIA[A-Z0-9]{16}\b|AIza[\w-]{35}(?![\w-]))"  # Slack, AWS, Google
    rb"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
)
_EXAMPLE = re.compile(rb"x{6}|example|your", re.IGNORECASE)  # in documentation, in a token's place
_WEIGHTS = ("*.safetensors", *_GRAPHS)
_TEXT_BYTES = 1 << 20  # a larger file is a vocabulary, not written by hand


def pushed_kind(folder: Path) -> str:
    """What is pushed. Raises ArtifactError for a folder of a kind that is not."""
    kind = artifact_kind(folder)
    if kind == PROJECT:
        fix = "Run lorasb push in it, without a folder, or name one of its adapters"
        raise ArtifactError("a whole project is not pushed as a folder", where=folder, fix=fix)
    if kind not in _ALLOWED:
        fix = f"Push a folder written by lorasb ({', '.join(_ALLOWED)})"
        raise ArtifactError(f"a folder of kind {kind!r} is not pushed", where=folder, fix=fix)
    return kind


def collect(folder: Path, kind: str) -> tuple[Files, list[str]]:
    """The files to publish by their path inside the folder, and the paths passed over.

    Raises:
        ArtifactError: a link that leads nowhere or out of the folder; weights that are damaged.
    """
    files: Files = {}
    skipped = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        inside = path.relative_to(folder).as_posix()
        if inside == SUMS:
            continue  # of another push
        if not _matches(inside, _ALLOWED[kind]):
            skipped.append(inside)
        elif not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            fix = "Replace it by the file itself"
            raise ArtifactError("a link that leads nowhere, or out of the folder", where=path, fix=fix)
        else:
            files[inside] = path
    if kind == "merged":
        BaseModel.resolve(folder).tensors  # noqa: B018  # reads and checks every header
    return files, skipped


def refuse_incomplete(files: Files, kind: str, folder: Path) -> None:
    """Raise ArtifactError for a PEFT or ONNX folder without its weights, or one of its adapters."""
    needed = {_NEEDED[kind]} if kind in _NEEDED else set()
    if "model.onnx" in needed & set(files):
        needed |= {name.decode() for name in _DATA_FILE.findall(content_of(files["model.onnx"]))}
    if kind == "onnx-adapters":
        record = read_json(folder / RECORD)
        if not record.get("routed"):  # there they lie in a data file
            needed |= {f"{name}.onnx_adapter" for name in record.get("adapters", ())}
    missing = sorted(needed - set(files))
    if missing:
        fix = "Export it again; weights in a pickle are never published"
        raise ArtifactError(f"the folder has no {' and no '.join(missing)}", where=folder, fix=fix)


def pin(files: Files) -> Seen:
    """Read all but weights now, and remember which files they are: a folder may be replaced while it is pushed."""
    seen = {file: version_of(file) for file in files.values() if isinstance(file, Path)}
    for name, file in files.items():
        if not any(fnmatch(name, pattern) for pattern in _WEIGHTS):
            files[name] = content_of(file)
    return seen


def refuse_replaced(seen: Seen) -> None:
    """Raise ArtifactError when a file is not the one that was pinned: what was read may be half of each folder."""
    for path, before in seen.items():
        if not path.exists() or version_of(path) != before:
            raise replaced_meanwhile(path.parent)


def replaced_meanwhile(folder: Path) -> ArtifactError:
    """To raise when `folder` is not what it was when the push began."""
    fix = "Push again: nothing was published"
    return ArtifactError("the folder was replaced while it was pushed", where=folder, fix=fix)


def content_of(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def size_of(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def is_publishable(path: str) -> bool:
    """Whether a folder of some kind, or a project, may publish this; never a path that leaves the folder."""
    return any(_matches(path, patterns) for patterns in (*_ALLOWED.values(), _IN_PARTS))


def take_out_paths(files: Files) -> None:
    """Put in place of every absolute path in the JSON files its last part: folders are their owner's business.

    Of files that are not ours only the keys in which transformers keeps the folder a model was loaded from, of a part
    too (`text_config`); one that is no JSON is published as it is.

    Raises:
        ArtifactError: a file of ours is no JSON.
    """
    for name, file in files.items():
        if not name.endswith(".json") or (name not in (*_OURS, *_CONFIGS) and size_of(file) > _TEXT_BYTES):
            continue
        try:
            content = json.loads(content_of(file))
            clean = _without_paths(content) if name in _OURS else _without_origin(content)
        except (ValueError, RecursionError) as error:
            if name not in _OURS:
                continue
            raise ArtifactError(f"unreadable JSON: {error}", where=name, fix="Write the folder again") from None
        if not isinstance(content, dict):
            continue
        if name in _OURS and "config_sha256" in content:
            clean = sealed(clean)
        if clean != content:
            files[name] = to_json(clean)


def refuse_tokens(files: Files) -> None:
    """Raise ArtifactError for a text file that holds an access token; its name is given, the token is not.

    Found are the Hub token in use, whatever it looks like, and what has one of the forms of `_TOKEN`.
    """
    from huggingface_hub import get_token

    in_use = (get_token() or "").encode()
    for name, file in files.items():
        if any(fnmatch(name, pattern) for pattern in _WEIGHTS):
            continue
        text = content_of(file)
        tokens = (found[0] for found in _TOKEN.finditer(text) if not _EXAMPLE.search(found[0]))
        if any(tokens) or (in_use and in_use in text):
            raise ArtifactError("an access token is in this file", where=name, fix="Take it out, and revoke it")


def stale(there: Iterable[str], published: Collection[str], files: Files) -> list[str]:
    """Paths of the repository that must go: the folder no longer has them, and they are weights or `published` once.

    Of a project's repository only what lies in the parts that are among `files`: others may be of other people, and
    what lies beside the parts was put there by hand.
    """
    parts = {part_of(path) for path in files}

    def is_stale(path: str) -> bool:
        if path in files or (part := part_of(path)) not in parts:
            return False
        inside = path.removeprefix(f"{part}/")
        return path in published or (_matches(inside, _STALE) and (part != "" or parts == {""}))

    return [path for path in there if is_stale(path)]


def part_of(path: str) -> str:
    """The basis or adapter that a file in a project's repository is of, as in `adapters/a`; empty of all else."""
    found = _PART.match(path)
    return found[0] if found else ""


def kind_of_files(paths: Iterable[str]) -> str | None:
    """The kind of artifact that a listing holds, as far as weights from two kinds must not mix."""
    names = list(paths)
    return next((kind for pattern, kind in _MARKS.items() if any(_matches(p, [pattern]) for p in names)), None)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _CLEANED.get(key, _without_paths)(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(os.path.normpath(value))
    return value


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_paths(entry) if key in _LOADED_FROM else _without_origin(entry)
            for key, entry in value.items()
        }
    return [_without_origin(entry) for entry in value] if isinstance(value, list) else value


def _without_folders(command: Any) -> Any:
    """A recorded command as `provenance.command` makes it, whoever wrote this one."""
    if not isinstance(command, str):  # of another program than ours it is None
        return _without_paths(command)
    command = command[: 2 * MAX_COMMAND]  # ours are shorter; to split a word takes the square of its length
    try:
        return shlex.join(map(without_folders, shlex.split(command)))
    except ValueError:  # cut short in a quotation, or no command
        return " ".join(map(without_folders, command.split()))


_CLEANED: Mapping[str, Callable[[Any], Any]] = {
    "labels": lambda labels: labels,
    "data_read": lambda read: read,  # names of columns, or their templates: "/no_think {question}" is no path
    "command": _without_folders,
}


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return not any(part.startswith(".") for part in path.split("/")) and any(
        fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns
    )
