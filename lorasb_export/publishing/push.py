"""Push a folder to the Hub. Tokens are left to huggingface_hub and never shown."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..basis import Basis
from ..basis_source import EMBEDDED
from ..cards import readme
from ..errors import SettingsError
from ..files.kind import CARD
from ..files.storage import absolute
from ..hub.ids import is_hub_id, parse_hub_folder
from . import outgoing
from .adapter_basis import AdapterBases, name_in_config
from .checksums import checksums
from .folder_card import Licences, folder_card
from .outgoing import Files
from .repository import Head, Repository, compare, refuse_other


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    basis_repo: str | None = None,
    with_basis: bool = False,
    basis_to_come: bool = False,
    dry_run: bool = False,
    licences: Licences | None = None,
) -> dict[str, Any]:
    """Make a repository on the Hub equal to one of our folders, with its card, in one commit.

    An adapter's `basis.source` in what is uploaded is a Hub id at a commit, or "embedded". The folder itself is not
    changed. What the repository already holds is not sent again, and where that is everything there is no commit.

    Args:
        folder: of a basis, an adapter, a merged model or an export.
        repo: `owner/name`; made if missing.
        public: make it public. Without this, an existing public repository is refused.
        revision: commit to this branch; made if missing.
        create_pr: open a pull request against the main branch instead.
        message: of the commit.
        basis_repo: `owner/name[@revision]` that holds this adapter's basis. Without a revision: the branch that the
            adapter goes to, if there is one of that name, else main.
        with_basis: upload the adapter's basis inside the adapter's repository.
        basis_to_come: in a dry run do not look for that basis: it is pushed before the adapter.
        dry_run: only plan. Reads the Hub where it can be reached, writes nothing.
        licences: what was asked for other folders of one base; give several pushes the same.

    Returns:
        repo, url, kind, private, files [{path, bytes, change: "added", "changed" or "same"}], deleted, bytes (of all
        files), sent (of those that change), skipped, message, parent (the commit this one is on top of), card (its
        front matter), basis (of an adapter: where the uploaded copy finds it), and commit and changed, or with
        `dry_run` card_diff (of README.md) and reached (whether the Hub answered).

    Raises:
        ArtifactError: the folder is damaged, of a kind that is not pushed, links to files outside it, holds an access
            token, or is an adapter whose basis nobody else could find; or a card is not UTF-8.
        SettingsError: a malformed repository name, or options that exclude each other.
        OutputError: the repository is public, renamed, or holds another kind of artifact; or its card and the
            folder's were both edited: nothing was written.
        ServerError: somebody else committed meanwhile, or the Hub refuses, fails or cannot be reached.
    """
    folder = absolute(folder)
    kind = outgoing.pushed_kind(folder)
    check_target(repo, revision, create_pr)
    _check_basis_options(folder, kind, basis_repo, with_basis)
    files, skipped = outgoing.collect(folder, kind)
    outgoing.refuse_incomplete(files, kind, folder)
    seen = outgoing.pin(files)
    repository = Repository(repo, revision)
    head, theirs = repository.look(dry_run)
    refuse_other(outgoing.kind_of_files(files), head, public, repo)
    basis = None
    if kind == "basis":
        Basis.load(folder)
    elif kind == "adapter":
        adapter = Adapter.load(folder)
        source = EMBEDDED if with_basis else basis_repo or adapter.basis_source or EMBEDDED
        bases = AdapterBases(repository, head, public=public, dry_run=dry_run)
        basis, of_basis = bases.settle(adapter, files, source, to_come=basis_to_come)
        seen |= of_basis
        name_in_config(files, basis)
    licences = (licences or Licences()) if head.reached else None
    files[CARD] = folder_card(files, kind, repo, folder, theirs, licences).encode()
    outgoing.take_out_paths(files)
    outgoing.refuse_tokens(files)
    files[outgoing.SUMS] = checksums(files)
    plan = planned(repository, head, theirs, kind, files, skipped, public=public, message=message, dry_run=dry_run)
    plan |= {"basis": basis} if basis else {}
    if dry_run:
        return plan
    return plan | repository.commit(files, head, seen, public=public, create_pr=create_pr, message=plan["message"])


def _check_basis_options(folder: Path, kind: str, basis_repo: str | None, with_basis: bool) -> None:
    if basis_repo and parse_hub_folder(basis_repo) is None:
        raise SettingsError("not a Hub repository", where=basis_repo, fix="Give owner/name")
    if basis_repo and with_basis:
        raise SettingsError("basis_repo and with_basis exclude each other", fix="Leave one out")
    if (basis_repo or with_basis) and kind != "adapter":
        raise SettingsError("basis_repo and with_basis are for adapters", where=folder, fix="Leave it out")


def check_target(repo: str, revision: str | None, create_pr: bool) -> None:
    """Raise SettingsError for what is no repository, or options that exclude each other."""
    if not is_hub_id(repo):
        fix = "Give owner/name"
        if (found := parse_hub_folder(repo)) and found.path:
            fix = f"Push the project to {found.repo}"
        raise SettingsError("not a Hub repository", where=repo, fix=fix)
    if create_pr and revision is not None:
        raise SettingsError("create_pr and revision exclude each other", fix="Leave one out")


def planned(
    repository: Repository,
    head: Head,
    theirs: str,
    kind: str,
    files: Files,
    skipped: Sequence[str],
    *,
    public: bool,
    message: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    """What `push` returns, but for `basis`, before its commit on `head`, where the card is still `theirs`."""
    changes = compare(files, head)
    sizes = {path: outgoing.size_of(file) for path, file in sorted(files.items())}
    card = outgoing.content_of(files[CARD]).decode()

    def change(path: str) -> str:
        if path not in changes.written:
            return "same"
        return "changed" if path in head.files else "added"

    plan: dict[str, Any] = {
        "repo": repository.name,
        "url": repository.url,
        "kind": kind,
        "private": head.stays_private(public),
        "files": [{"path": path, "bytes": size, "change": change(path)} for path, size in sizes.items()],
        "deleted": changes.deleted,
        "bytes": sum(sizes.values()),
        "sent": sum(sizes[path] for path in changes.written),
        "skipped": skipped,
        "message": message or f"Upload {kind} with lorasb",
        "parent": head.commit,
        "card": readme.front_matter(card),
    }
    if dry_run:
        diff = difflib.unified_diff(theirs.splitlines(), card.splitlines(), "on the Hub", "to be pushed", lineterm="")
        plan |= {"card_diff": "\n".join(diff), "reached": head.reached}
    return plan
