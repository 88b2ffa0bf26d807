"""A whole project in one repository: `basis/`, `adapters/NAME/`, a card and an index of the adapters, in one commit.

What the repository holds of other projects stays there: people with different tasks can share one.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..bars import progress_bar
from ..basis import Basis
from ..basis_source import EMBEDDED
from ..cards import readme
from ..cards.card import base_of
from ..cards.project_card import project_card
from ..cards.sections import NOTHING
from ..errors import ArtifactError, LoraSBError, OutputError, SettingsError
from ..fetch import is_hub_id
from ..format import check_training
from ..names import name_problem, some
from ..storage import parse_json, to_json
from . import outgoing
from .adapter_basis import name_basis
from .checksums import checksums
from .folder_card import Licences, folder_card
from .hub import card_change, look, planned
from .outgoing import Files, Seen
from .repository import Head, Repository, is_stored, refuse_other

logger = logging.getLogger(__name__)

BASIS, BASES, ADAPTERS = "basis", "bases", "adapters"  # where folders go; those in the last two have names of their own
_INDEX = "lorasb.json"
_OF_TRAINING = ("evaluation", "labels", "regression")  # what the index takes from it
_ABOUT: Mapping[str, Mapping[str, Any]] = {
    "basis": {"sha256": str, "rank": int},
    "adapter": {"sha256": str, "basis_sha256": str, "task_type": str, "evaluation": dict},
}


def push_parts(
    parts: Mapping[str, Path],
    basis_of: Mapping[str, str],
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
) -> tuple[dict[str, Any], dict[str, LoraSBError]]:
    """Put bases and adapters into one repository on the Hub, in one commit.

    Args:
        parts: where each goes → its folder: `basis` and `bases/NAME` first, then `adapters/NAME`.
        basis_of: an adapter's part → that of its basis. Of one that is not here the basis lies inside, or on the Hub.
        repo and the rest: as for `push`.

    Returns:
        What `push` returns, without `basis`; and the adapters that are left out, by name, with their errors.

    Raises:
        ArtifactError: a basis cannot be published; or no adapter can.
        OutputError: as for `push`; or adapters there that are not here would lose their basis, or have another base.
        SettingsError, ServerError: as for `push`.
    """
    if not is_hub_id(repo):
        raise SettingsError("not a Hub repository", where=repo, fix="Give owner/name")
    if create_pr and revision is not None:
        raise SettingsError("create_pr and revision exclude each other", fix="Leave one out")
    repository = Repository(repo, revision)
    head, theirs = look(repository, dry_run)
    refuse_other(outgoing.PROJECT, head, public, repo)
    reader = _Reader(repository, head, public, dry_run, basis_of)
    read: dict[str, _Part] = {}
    failed: dict[str, LoraSBError] = {}
    for number, (part, folder) in enumerate(progress_bar(list(parts.items()), desc="read", leave=False), 1):
        logger.info("%d of %d: %s", number, len(parts), part)
        try:
            read[part] = reader.read(part, folder)
        except (ArtifactError, OutputError) as error:
            if not part.startswith(f"{ADAPTERS}/"):
                raise
            logger.warning("%s is left out: %s", folder.name, error)
            failed[folder.name] = error.alone()
    if len(failed) == sum(part.startswith(f"{ADAPTERS}/") for part in parts):
        raise next(iter(failed.values()))
    files = {path: file for one in read.values() for path, file in one.files.items()}
    index = _index(read, reader.base, repository, head)
    facts = reader.licences.facts(index, {}, {}) if reader.licences else NOTHING
    text = readme.merge("", theirs, project_card(index, repo, facts), where="README.md")
    files |= {_INDEX: to_json(index), "README.md": text.encode()}
    read_parts = {"", *read}
    others = {path: sha for path, sha in head.published.items() if outgoing.part_of(path) not in read_parts}
    files[outgoing.SUMS] = checksums(files, {path: sha for path, sha in others.items() if path in head.files})
    message = message or "Upload project with lorasb"
    plan = planned(repository, files, head, outgoing.PROJECT, public, message)
    plan |= {"skipped": [path for one in read.values() for path in one.skipped], "card": readme.front_matter(text)}
    if dry_run:
        return plan | card_change(theirs, text, head), failed
    seen = {path: version for one in read.values() for path, version in one.seen.items()}
    return plan | repository.commit(files, head, seen, public=public, create_pr=create_pr, message=message), failed


@dataclass(frozen=True)
class _Part:
    """What is published of one folder, by its path in the repository."""

    files: Files
    seen: Seen
    skipped: list[str]
    about: Mapping[str, Any]  # what the index says of it


class _Reader:
    """Makes parts of folders, for a repository that holds `head` now."""

    def __init__(
        self, repository: Repository, head: Head, public: bool, dry_run: bool, basis_of: Mapping[str, str]
    ) -> None:
        self._repository, self._head, self._public, self._dry_run = repository, head, public, dry_run
        self._basis_of = basis_of
        self._sha256_of: dict[str, str] = {}  # of the bases that were read
        self.licences = Licences() if head.reached else None
        self.base: Mapping[str, Any] = {}  # of all of them

    def read(self, part: str, folder: Path) -> _Part:
        """The part, checked.

        Raises:
            ArtifactError: it is damaged, holds a token, has another base than the first, or a basis nobody could find.
            OutputError: its card was edited here and there.
        """
        kind = outgoing.pushed_kind(folder)
        files, skipped = outgoing.collect(folder, kind)
        seen = outgoing.pin(files)
        if kind == "basis":
            self._sha256_of[part] = Basis.load(folder).sha256
            text = self._card(part, folder, kind, files)
        else:
            adapter = Adapter.load(folder)
            shown, stored = self._basis(part, adapter)
            _set_source(files, shown)
            text = self._card(part, folder, kind, files)
            _set_source(files, stored)
        files["README.md"] = text.encode()
        outgoing.take_out_paths(files)
        outgoing.refuse_tokens(files)
        config = json.loads(outgoing.content_of(files[f"{kind}_config.json"]))
        self._check_base(base_of(config), folder)
        return _Part({f"{part}/{path}": file for path, file in files.items()}, seen, skipped, _about(kind, config))

    def _basis(self, part: str, adapter: Adapter) -> tuple[str, str]:
        """Where the adapter's basis is, for its card and for its config."""
        beside = self._basis_of.get(part)
        if beside is None:
            if adapter.basis_source is None:
                return EMBEDDED, EMBEDDED
            found = name_basis(
                adapter,
                adapter.basis_source,
                self._repository,
                self._head,
                place=f"{part}/",
                public=self._public,
                dry_run=self._dry_run,
            )
            return found, found
        if self._sha256_of[beside] != adapter.basis_sha256:
            what = (
                f"the basis is {self._sha256_of[beside][:12]}, the adapter was trained in {adapter.basis_sha256[:12]}"
            )
            raise ArtifactError(what, where=adapter.basis_source, fix="Fit it again, or restore that basis")
        return f"{self._repository.name}/{beside}", posixpath.relpath(beside, part)

    def _card(self, part: str, folder: Path, kind: str, files: Files) -> str:
        """The published one is asked for where it is not what is made anyway."""
        name, path = f"{self._repository.name}/{part}", f"{part}/README.md"
        made = folder_card(files, kind, name, folder, "", self.licences)
        if path not in self._head.files or is_stored(made.encode(), self._head.files[path]):
            return made
        return folder_card(files, kind, name, folder, self._repository.text(self._head, path), self.licences)

    def _check_base(self, base: Mapping[str, Any], folder: Path) -> None:
        self.base = self.base or base
        if base["name_or_path"] != self.base["name_or_path"]:
            what = f"it is for the base model {base['name_or_path']}, the first here is for {self.base['name_or_path']}"
            raise ArtifactError(what, where=folder, fix="Give it a repository of its own")


def _set_source(files: Files, source: str) -> None:
    config = json.loads(outgoing.content_of(files["adapter_config.json"]))
    config["basis"]["source"] = source
    files["adapter_config.json"] = to_json(config)


def _about(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "basis":
        return {"sha256": config["sha256"], "rank": config["rank"]}
    training = {key: config["training"][key] for key in _OF_TRAINING if key in config["training"]}
    found = {"sha256": config["sha256"], "basis_sha256": config["basis"]["sha256"], "task_type": config["task_type"]}
    return found | {"evaluation": {}, **training}


def _index(read: Mapping[str, _Part], base: Mapping[str, Any], repository: Repository, head: Head) -> dict[str, Any]:
    """`lorasb.json`: what is said of each basis and adapter; of those that are there and not here, what it said.

    Raises:
        OutputError: those are of another base, or would lose their basis.
    """
    said = _index_there(repository, head)
    there = {part for part in map(outgoing.part_of, head.files) if part and part not in read}
    kept = {part: about for part, about in said["parts"].items() if part in there}
    others = sorted(part.partition("/")[2] for part in there if part.startswith(f"{ADAPTERS}/"))
    if others and said["base"] != base["name_or_path"]:
        what = f"adapters there ({some(others)}) are for another base model ({said['base']})"
        raise OutputError(what, where=repository.name, fix="Choose another repository")
    replaced = {said["parts"].get(part, one.about)["sha256"] for part, one in read.items()}
    replaced -= {one.about["sha256"] for one in read.values()}
    orphans = [name for name in others if kept.get(f"{ADAPTERS}/{name}", {}).get("basis_sha256") in replaced]
    if orphans:
        what = f"adapters there that are not here ({some(orphans)}) were trained in a basis that this push replaces"
        raise OutputError(what, where=repository.name, fix="Choose another repository, or delete them in that one")
    return {
        "kind": outgoing.PROJECT,
        "base": {"name_or_path": base["name_or_path"], "revision": base.get("revision")},
        "parts": dict(sorted({**kept, **{part: dict(one.about) for part, one in read.items()}}.items())),
    }


def _index_there(repository: Repository, head: Head) -> dict[str, Any]:
    """The index as it is there, without what no push has written: `base`, its name, and `parts`."""
    try:
        found = parse_json(repository.text(head, _INDEX))
    except ValueError:
        found = {}
    base, parts = found.get("base"), found.get("parts")
    return {
        "base": base.get("name_or_path") if isinstance(base, dict) else None,
        "parts": {
            part: about for part, about in (parts if isinstance(parts, dict) else {}).items() if _is_about(part, about)
        },
    }


def _is_about(part: str, about: Any) -> bool:
    kind = "basis" if part == BASIS or part.startswith(f"{BASES}/") else "adapter"
    if not isinstance(about, dict) or name_problem(part.rpartition("/")[2]):
        return False
    if not all(isinstance(about.get(key), kinds) for key, kinds in _ABOUT[kind].items()):
        return False
    try:
        check_training({key: about[key] for key in _OF_TRAINING if key in about}, _INDEX)
    except ArtifactError:
        return False
    return True
