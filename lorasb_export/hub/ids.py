"""What a folder, a dataset or a part of a project's repository is called on the Hub; nothing here asks it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

# The folders of the repository of a whole project; in the last two lie folders with names, as names.name_problem has
# them. A path of any other form is one of this disk.
BASIS, BASES, ADAPTERS = "basis", "bases", "adapters"
PARTS = {BASIS: "basis", f"{BASES}/*": "basis", f"{ADAPTERS}/*": "adapter"}  # and what each is

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"  # of an adapter, and of a folder in a repository
_REPO, _REVISION = r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", r"(?:@([\w./-]+))?"
_PART = rf"{BASIS}|(?:{BASES}|{ADAPTERS})/{NAME}"
_HUB_FOLDER = re.compile(rf"{_REPO}(?:/({_PART}))?{_REVISION}")
_HUB_ADAPTERS = re.compile(rf"{_REPO}/{ADAPTERS}{_REVISION}")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?(?:@[\w./-]+)?")
_FILE_ENDINGS = (".jsonl", ".json", ".csv")


def kind_of_part(part: str) -> str:
    """`adapter` of `adapters/NAME`, `basis` of `basis` and `bases/NAME`."""
    return "adapter" if part.startswith(f"{ADAPTERS}/") else "basis"


class HubFolder(NamedTuple):
    """A folder of a repository on the Hub; `path` is empty for the repository itself."""

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repo, self.path))) + (f"@{self.revision}" if self.revision else "")


def parse_hub_folder(source: str | Path) -> HubFolder | None:
    """What reads like a Hub id, or like a basis or an adapter in such a repository: `owner/name/basis`,
    `owner/name/adapters/a`. All with or without `@revision`."""
    match = _HUB_FOLDER.fullmatch(str(source))
    if match is None or ".." in str(source):
        return None
    return HubFolder(match.group(1), match.group(2) or "", match.group(3))


def parse_hub_id(source: str | Path) -> HubFolder | None:
    """As `parse_hub_folder`, but of a whole repository."""
    found = parse_hub_folder(source)
    return None if found is None or found.path else found


def parse_hub_adapters(source: str) -> HubFolder | None:
    """The repository of `owner/name/adapters`, with or without `@revision`: all the adapters of a project."""
    match = _HUB_ADAPTERS.fullmatch(source)
    return None if match is None else HubFolder(match.group(1), revision=match.group(2))


def is_hub_id(name: object) -> bool:
    """Whether `name` can be a Hub repository, `owner/name`. A bare name is none: a push shortens paths to that."""
    return isinstance(name, str) and parse_hub_id(name) == HubFolder(name)


def may_be_dataset(source: str, folder: Path) -> bool:
    """Whether `source`, of which there is no file, may be a dataset's id, `owner/name` or `name`, with or without
    `@revision`, rather than a mistyped path: one with a file's ending, or into a folder that `folder` has."""
    is_id = _DATASET_ID.fullmatch(source) is not None and not source.lower().endswith(_FILE_ENDINGS)
    return is_id and not ("/" in source and (folder / source.partition("/")[0]).is_dir())


def is_mistyped_path(source: str, folder: Path | None = None) -> bool:
    """Whether `source`, which reads like a Hub id and of which there is no folder, is a path even so: into a folder
    that `folder`, or the current folder, has. The Hub would learn the name, and whoever registers it be trusted."""
    first, slash, _ = source.partition("/")
    return bool(slash) and "@" not in source and ((folder or Path()) / first).is_dir()
