"""README.md: a generated block and front matter, around whatever the user wrote there."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import ArtifactError, OutputError
from ..files.kind import CARD

BEGIN, END = "<!-- lorasb:begin -->", "<!-- lorasb:end -->"
_BLOCK = re.compile(rf"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_STAMP = re.compile(r"<!-- lorasb:text ([0-9a-f]{16}) -->\n")  # of the folder's own text, when it was pushed
LICENCE_KEYS = ("license", "license_name", "license_link")
_DEPTH = 20  # a model-index has seven
# Every key that a card of ours may have; what else is in a front matter is the user's own.
_GENERATED = {"library_name", "base_model", "base_model_relation", "pipeline_tag", "tags", "datasets", "metrics"}
_GENERATED |= {"model-index", *LICENCE_KEYS}


def assemble(keys: Mapping[str, Any], text: str) -> str:
    """A card of our own: its front matter, and its text inside the marks."""
    return f"---\n{_dump(keys)}---\n{BEGIN}\n{text}{END}\n"


def update(old: str, card: str, *, where: object = None) -> str:
    """The text `old` with its generated block and keys replaced by those of `card`.

    A generated key that `card` lacks goes too: it was true of what the folder held before. A licence stays.

    Raises:
        ArtifactError: its front matter is not valid YAML.
    """
    if not old.strip():
        return card
    user_keys, user_text = _split(old)
    new_keys, new_text = front_matter(card), _split(card)[1]
    new_keys["tags"] += [tag for tag in _tags(front_matter(old, where), where) if tag not in new_keys["tags"]]
    gone = _GENERATED if set(LICENCE_KEYS) & set(new_keys) else _GENERATED.difference(LICENCE_KEYS)
    # The user's keys are kept as text, not parsed and dumped: comments and spelling (`language: no`) survive.
    kept = "".join(entry for entry in _entries(user_keys) if _key(entry) not in gone)
    if _BLOCK.search(user_text):
        text = _BLOCK.sub(lambda _: new_text.strip(), user_text, count=1)
    else:
        text = f"{user_text.rstrip()}\n\n{new_text}"
    return f"---\n{_dump(new_keys)}{kept}---\n{text}"


def merge(mine: str, theirs: str, generated: str, *, where: str = CARD) -> str:
    """The card to publish: `generated`, with what the user wrote in the folder's card and in the one on the Hub.

    The published block keeps a hash of the text that the folder had then. So a text edited on the Hub alone stays,
    one edited in the folder alone replaces it, and where the folder has none the Hub's stays. A licence stays as
    published until the folder's card says another.

    Args:
        mine, theirs: README.md of the folder and of the repository; empty where there is none.

    Raises:
        OutputError: both were edited, differently.
        ArtifactError: a front matter is not valid YAML.
    """
    ours, there = _own_text(mine), _own_text(theirs)
    stamp = _STAMP.search(theirs)
    published = stamp.group(1) if stamp else None
    if not ours or _hash(ours) == published:
        start, stamped = theirs or mine, published or _hash(ours)
    elif there in ("", ours) or _hash(there) == published:
        start, stamped = mine, _hash(ours)
    else:
        fix = "Copy what you want to keep from the one into the other, until both texts are the same"
        raise OutputError("README.md was edited here and on the Hub, differently", where=where, fix=fix)
    keys = front_matter(generated)
    at_theirs = f"{where} on the Hub"
    old, published_keys = front_matter(mine, where), front_matter(theirs, at_theirs)
    licence = next((k for k in (old, published_keys) if "license" in k), keys)
    keys = {key: value for key, value in keys.items() if key not in LICENCE_KEYS}
    keys |= {key: licence[key] for key in LICENCE_KEYS if key in licence}
    keys["tags"] += [tag for tag in _tags(published_keys, at_theirs) if tag not in keys["tags"]]
    text = update(start, f"---\n{_dump(keys)}---\n{_split(generated)[1]}", where=where)
    text = _STAMP.sub("", text)
    return text.replace(END, f"<!-- lorasb:text {stamped} -->\n{END}", 1)


def _own_text(card: str) -> str:
    """What the user wrote: text outside the block, and front matter that is never generated."""
    keys, text = _split(card)
    kept = [entry for entry in _entries(keys) if _key(entry) not in _GENERATED]
    before, _, after = _BLOCK.sub("\0", text, count=1).partition("\0")
    return "\n".join(part for part in ("".join(kept).strip(), before.strip(), after.strip()) if part)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def front_matter(card: str, where: object = None) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        ArtifactError: somebody has edited it into no YAML, into what JSON cannot hold, has used an alias, or nests it
            more than twenty deep.
    """
    try:
        keys = dict(_Loader(_split(card)[0]).get_single_data() or {})
        json.dumps(keys, default=str)  # as --json prints it: no number of thousands of digits, no date for a key
        return keys
    except _TooLargeError as error:
        what, fix = error.args
    except Exception:  # PyYAML lets through whatever its conversions raise: of `!!int ""` an IndexError
        what, fix = "is not valid YAML, or JSON cannot hold it", "Correct the lines between the first two `---`"
    raise ArtifactError(f"the card's front matter {what}", where=where, fix=fix)


def licence_of(card: str, where: object = None) -> dict[str, Any]:
    """Those of LICENCE_KEYS that a card has, whatever the rest of its front matter is. Raises as `front_matter`."""
    entries = [entry for entry in _entries(_split(card)[0]) if _key(entry) in LICENCE_KEYS]
    return front_matter(f"---\n{''.join(entries)}\n---\n", where)


class _TooLargeError(Exception):
    """What a card has, and what to do."""


class _Loader(yaml.SafeLoader):
    """For a stranger's few lines, which could stand for gigabytes (aliases) or take minutes to read (brackets)."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _TooLargeError("has an alias (`*name`)", "Write out there what it stands for")
        if self.depth > _DEPTH:
            raise _TooLargeError(f"is nested more than {_DEPTH} deep", "Correct the lines between the first two `---`")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _tags(keys: Mapping[str, Any], where: object) -> list[str]:
    """The tags of a front matter: a list, or one without brackets."""
    found = keys.get("tags") or []
    tags = found if isinstance(found, list) else [found]
    if not all(isinstance(tag, str) for tag in tags):
        what = f"the card's tags are {reprlib.repr(found):.60}, not words"
        raise ArtifactError(what, where=where, fix="Put them in quotes")
    return tags


def _entries(front_matter: str) -> list[str]:
    """The text of every key with its value."""
    return re.split(r"(?m)^(?=[^\s#-])", front_matter)


def _key(entry: str) -> str:
    return entry.partition(":")[0].strip("'\" ")


def _split(card: str) -> tuple[str, str]:
    match = _FRONT_MATTER.match(card)
    return (match.group(1), card[match.end() :]) if match else ("", card)


def _dump(keys: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True))
