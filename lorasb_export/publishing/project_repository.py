"""A whole project in one repository: `basis/`, `adapters/NAME/`, a card and an index of the adapters.

In one commit; more files than the Hub may take at a time in several, of which each leaves whole what is there. What the
repository holds of other projects stays there: people with different tasks can share one.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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
from ..choices import SEQ_CLS
from ..errors import ArtifactError, LoraSBError, OutputError, Problems, ServerError
from ..files.kind import ADAPTER_CONFIG, BASIS_FILES, BASIS_WEIGHTS, CARD, RECORD
from ..files.storage import to_json
from ..hub.ids import kind_of_part
from ..names import name_problem
from . import outgoing
from .adapter_basis import AdapterBases, name_in_config
from .checksums import checksums
from .folder_card import Licences, folder_card
from .outgoing import PROJECT, SUMS, Files, Seen
from .project_index import About, about, labels_of, make_index, others, refuse_lost
from .push import check_target, planned
from .repository import Head, Repository, Stored, compare, is_of_one, is_stored, refuse_other

logger = logging.getLogger(__name__)

_MANY = 1000  # huggingface_hub's own uploads put no more into a commit, "to stay below server-side commit timeouts"

# https://huggingface.co/docs/hub/repositories-recommendations: fewer entries of a folder, fewer files of a repository
_ENTRIES, _FILES = 10_000, 100_000


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
    """Put bases and adapters into one repository on the Hub.

    In one commit, or in several if more files change than the Hub may take at a time: the bases first, then some
    adapters in each. A pull request, and a basis that takes another's place with all its adapters, is always one.

    Args:
        parts: where each goes → its folder: `basis` and `bases/NAME` first, then `adapters/NAME`.
        basis_of: an adapter's part → that of its basis. Of one that is not here the basis lies inside, or on the Hub.
        repo and the rest: as for `push`.

    Returns:
        What `push` returns, without `basis`, and `commits`, how many it takes; and the adapters that are left out, by
            name, with their errors.

    Raises:
        ArtifactError: a basis cannot be published; or no adapter can.
        OutputError: as for `push`; or adapters there that are not here would lose their basis, or have another base.
        SettingsError, ServerError: as for `push`.
    """
    check_target(repo, revision, create_pr)
    repository = Repository(repo, revision)
    head, theirs = repository.look(dry_run)
    refuse_other(PROJECT, head, public, repo)
    if SUMS in head.files and not head.published:
        fix = "Put back what the last push wrote: it says what others have there"
        raise OutputError(f"{SUMS} there is not as a push writes it", where=repo, fix=fix)
    reader = _Reader(repository, head, basis_of, public=public, dry_run=dry_run)
    read: dict[str, _Part] = {}
    failed: dict[str, LoraSBError] = {}
    for number, (part, folder) in enumerate(progress_bar(list(parts.items()), desc="read", leave=False), 1):
        logger.info("%d of %d: %s", number, len(parts), part)
        try:
            read[part] = reader.read(part, folder)
        except LoraSBError as error:
            if kind_of_part(part) == "basis" or not is_of_one(error):
                raise
            logger.warning("%s is left out: %s", folder.name, error)
            failed[folder.name] = error.alone()
    if not any(kind_of_part(part) == "adapter" for part in read):
        Problems(failed.values()).raise_all("nothing was pushed")
    files = reader.together(read, head, theirs)
    skipped = [path for one in read.values() for path in one.skipped]
    plan = planned(repository, head, theirs, PROJECT, files, skipped, public=public, message=message, dry_run=dry_run)
    changed = sum(file["change"] != "same" for file in plan["files"]) + len(plan["deleted"])
    early = reader.early(read, head) if changed > _MANY and not create_pr else []
    plan["commits"] = len(early) + 1
    if changed > _MANY and not early:
        logger.warning("%d files in one commit may be too much for the Hub", changed)
    _warn_of_size({*head.files, *files} - set(plan["deleted"]))
    if dry_run:
        return plan, failed
    for number, some_parts in enumerate([*early, read], 1):
        try:
            if early:
                logger.info("commit %d of %d", number, len(early) + 1)
                files = reader.together(some_parts, head, theirs)
            seen = {path: version for one in some_parts.values() for path, version in one.seen.items()}
            done = repository.commit(files, head, seen, public=public, create_pr=create_pr, message=plan["message"])
            if some_parts is not read:
                head, theirs = repository.look(dry_run)
                if head.commit != done["commit"]:  # what was read of cards there would be undone
                    raise ServerError("somebody else committed meanwhile", where=repo, fix="")
        except LoraSBError as error:
            if early:
                error.fix = f"Of {len(early) + 1} commits those before are there, each whole: push again"
            raise
    return plan | done, failed


def _warn_of_size(paths: Collection[str]) -> None:
    """Of a repository that will hold more than the Hub recommends."""
    adapters = sum(kind_of_part(part) == "adapter" for part in {outgoing.part_of(path) for path in paths} - {""})
    if adapters >= _ENTRIES or len(paths) >= _FILES:
        what = "The repository will hold %s adapters, %s files; the Hub recommends fewer than %s in a folder, %s in all"
        logger.warning(what, *(f"{number:,}" for number in (adapters, len(paths), _ENTRIES, _FILES)))


@dataclass(frozen=True)
class _Part:
    """What is published of one folder, by its path in the repository; and what the index says of it."""

    files: Files
    seen: Seen
    skipped: list[str]
    about: About


class _Reader:
    """Makes parts of folders, for a repository that holds `head` now."""

    def __init__(
        self, repository: Repository, head: Head, basis_of: Mapping[str, str], *, public: bool, dry_run: bool
    ) -> None:
        self._repository, self._head, self._basis_of = repository, head, basis_of
        self._bases = AdapterBases(repository, head, public=public, dry_run=dry_run)
        self._sha256_of: dict[str, str] = {}  # of the bases that were read
        self.licences = Licences() if head.reached else None
        self.base: Mapping[str, Any] = {}  # that of the first; all others have the same, at another commit perhaps
        self._weights: dict[frozenset[str], str] = {}  # the fingerprint of the base, by the modules that it is of

    def read(self, part: str, folder: Path) -> _Part:
        """The part, checked.

        Raises:
            ArtifactError: it is badly named or damaged, holds a token, has another base model than the first, or a
                basis that nobody could find.
            OutputError: its card was edited here and there.
            ServerError: the Hub refuses, fails or cannot be reached.
        """
        kind = kind_of_part(part)
        if problem := name_problem(posixpath.basename(part), "name a folder on the Hub"):
            raise ArtifactError(problem, where=folder, fix="Rename it")
        files, skipped = outgoing.collect(folder, kind)
        seen = outgoing.pin(files)
        if kind == "basis":
            self._sha256_of[part] = Basis.load(folder).sha256
            text = self._card(part, folder, files)
        else:
            shown, stored, of_basis = self._settle(part, Adapter.load(folder), files)
            seen |= of_basis
            name_in_config(files, shown)
            text = self._card(part, folder, files)
            name_in_config(files, stored)
        files[CARD] = text.encode()
        outgoing.take_out_paths(files)
        placed: Files = {f"{part}/{path}": file for path, file in files.items()}
        outgoing.refuse_tokens(placed)
        config = json.loads(outgoing.content_of(files[f"{kind}_config.json"]))
        self._check_base(config, folder)
        return _Part(placed, seen, [f"{part}/{path}" for path in skipped], about(kind, config))

    def early(self, read: Mapping[str, _Part], head: Head) -> list[Mapping[str, _Part]]:
        """What the commits before the last one bring, each with the parts of those before it.

        None has more than _MANY files, but for the first, with all bases, if those are so many. There are no such
        commits where a basis is replaced, or the base model: without the new ones adapters there would be of no use.
        """
        there = others(self._repository, head, ())
        adapters = [about for part, about in there.items() if kind_of_part(part) == "adapter"]
        if any(about["base_model"] != self.base["name_or_path"] for about in adapters):
            return []
        files: dict[str, dict[str, Stored]] = {}
        for path, stored in head.files.items():
            files.setdefault(outgoing.part_of(path), {})[path] = stored
        early: list[Mapping[str, _Part]] = []
        so_far: dict[str, _Part] = {}
        room = most = _MANY - len((RECORD, SUMS, CARD))
        for part, one in read.items():
            changes = compare(one.files, replace(head, files=files.get(part, {})))
            weights, is_basis = f"{part}/{BASIS_WEIGHTS}", kind_of_part(part) == "basis"
            if is_basis and weights in changes.written and weights in head.files:
                return []
            count = len(changes.written) + len(changes.deleted)
            if count > room and any(kind_of_part(before) == "adapter" for before in so_far):
                early.append(dict(so_far))
                room = most
            so_far[part] = one
            room -= count
        return early

    def together(self, parts: Mapping[str, _Part], head: Head, theirs: str) -> Files:
        """The files of a commit on `head`, whose card is `theirs`, that brings `parts`.

        The index, the card and the checksums are of all that is there then.

        Raises:
            OutputError: adapters there would lose their basis, or have another base; or the card was edited here too.
        """
        repo = self._repository.name
        mine, there = {part: one.about for part, one in parts.items()}, others(self._repository, head, parts)
        refuse_lost(mine, there, repo)
        index = make_index(self.base, {**there, **mine})
        facts = self.licences.facts(index, {}, {}) if self.licences else NOTHING
        files = {path: file for one in parts.values() for path, file in one.files.items()}
        shown = index | {"parts": self._with_labels(index["parts"], files, head)}
        text = readme.merge("", theirs, project_card(shown, repo, facts), where=CARD)
        files |= {RECORD: to_json(index), CARD: text.encode()}
        kept = {path: sha for path, sha in head.published.items() if outgoing.part_of(path) not in {"", *parts}}
        files[SUMS] = checksums(files, {path: sha for path, sha in kept.items() if path in head.files})
        return files

    def _with_labels(self, parts: Mapping[str, About], files: Files, head: Head) -> dict[str, About]:
        """What the index says of `parts`, and the labels of the first adapter, which the card shows how to load."""
        first = next(part for part in parts if kind_of_part(part) == "adapter")
        if parts[first]["task_type"] != SEQ_CLS:
            return dict(parts)
        path, config = f"{first}/{ADAPTER_CONFIG}", ""
        with suppress(ArtifactError):  # somebody else's, and not UTF-8
            config = outgoing.content_of(files[path]).decode() if path in files else self._repository.text(head, path)
        return {**parts, first: {**parts[first], "labels": labels_of(config)}}

    def _settle(self, part: str, adapter: Adapter, files: Files) -> tuple[str, str, Seen]:
        """Where the adapter's basis is, for its card and for its config; and the basis's own files."""
        beside = self._basis_of.get(part)
        if beside is None:
            found, of_basis = self._bases.settle(adapter, files, adapter.basis_source or EMBEDDED, place=f"{part}/")
            return found, found, of_basis
        found, trained_in = (sha256[:12] for sha256 in (self._sha256_of[beside], adapter.basis_sha256))
        if found != trained_in:
            what = f"the basis is {found}, the adapter was trained in {trained_in}"
            raise ArtifactError(what, where=adapter.basis_source, fix="Fit it again, or restore that basis")
        for name in BASIS_FILES:
            files.pop(name, None)
        return f"{self._repository.name}/{beside}", posixpath.relpath(beside, part), {}

    def _card(self, part: str, folder: Path, files: Files) -> str:
        """Its README.md. The published one is asked for where it is not what is made anyway."""
        name, path = f"{self._repository.name}/{part}", f"{part}/{CARD}"
        made = folder_card(files, kind_of_part(part), name, folder, "", self.licences, path)
        if path not in self._head.files or is_stored(made.encode(), self._head.files[path]):
            return made
        theirs = self._repository.text(self._head, path)
        return folder_card(files, kind_of_part(part), name, folder, theirs, self.licences, path)

    def _check_base(self, config: Mapping[str, Any], folder: Path) -> None:
        """Its base has the name of the first one's, and the weights, as far as others here have the same modules. The
        commit may be another: one that changes the base's card alone would keep the next basis out for ever."""
        base, own = base_of(config), "Give it a repository of its own"
        name, first = base["name_or_path"], self.base or base
        if name != first["name_or_path"]:
            what = f"it is for the base model {name}, the first one here for {first['name_or_path']}"
            raise ArtifactError(what, where=folder, fix=own)
        if base["fingerprint"] != self._weights.setdefault(frozenset(config["target_modules"]), base["fingerprint"]):
            raise ArtifactError(f"it is for other weights of {name} than others here", where=folder, fix=own)
        self.base = first
