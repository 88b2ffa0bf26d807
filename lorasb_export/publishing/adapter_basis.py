"""Where a pushed adapter's basis is: inside of it, or on the Hub at a commit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..adapter import Adapter
from ..basis_source import EMBEDDED
from ..errors import ArtifactError, ServerError
from ..files.kind import ADAPTER_CONFIG, BASIS_CONFIG, BASIS_FILES, BASIS_WEIGHTS
from ..files.storage import parse_json, read_json, to_json
from ..format import read_basis_config
from ..hub.calls import hub_errors, with_retries
from ..hub.fetch import resolve_folder
from ..hub.ids import HubFolder, parse_hub_folder
from . import outgoing
from .checksums import digest
from .outgoing import Files, Seen
from .repository import Head, Repository


class AdapterBases:
    """Settles where the bases of adapters are that are pushed to one repository, which holds `head` now."""

    def __init__(self, repository: Repository, head: Head, *, public: bool, dry_run: bool) -> None:
        self._repository, self._head, self._dry_run = repository, head, dry_run
        self._private = head.stays_private(public)
        # What was asked of the Hub.
        self._pinned: dict[tuple[HubFolder, str], str | None] = {}
        self._commits: dict[tuple[str, str | None], str] = {}

    def settle(
        self, adapter: Adapter, files: Files, source: str, *, place: str = "", to_come: bool = False
    ) -> tuple[str, Seen]:
        """What `basis.source` of the published adapter says; its files get the basis, or lose one, accordingly.

        Args:
            source: `embedded`, or where the basis is looked for.
            place: of the adapter in its repository, as in `adapters/a/`.
            to_come: in a dry run do not look for it: it is pushed before the adapter.

        Returns:
            that source, and the basis's own files, none if they lie in the adapter's folder.

        Raises:
            ArtifactError: nobody else could find it, it is damaged, another one, or private and the adapter is not.
            ServerError: the Hub refuses, fails or cannot be reached.
        """
        if source == EMBEDDED:
            return EMBEDDED, _embed(adapter, files)
        for name in BASIS_FILES:
            files.pop(name, None)
        return self._name(adapter, source, place, to_come), {}

    def _name(self, adapter: Adapter, source: str, place: str, to_come: bool) -> str:
        """`owner/name@commit` of the adapter's basis; the one published before, as long as it holds the same basis.

        A dry run takes a basis whose repository is not there as one that is still to be pushed.
        """
        basis = parse_hub_folder(source)
        if basis is None:
            fix = "Push the basis first and name it with --basis-repo, or upload it in the adapter with --with-basis"
            raise ArtifactError("nobody else could find this adapter's basis, a local folder", where=source, fix=fix)
        if not self._head.reached:
            return source
        try:
            if basis.revision is None:
                published = _published_basis(self._repository.text(self._head, f"{place}{ADAPTER_CONFIG}"))
                before = parse_hub_folder(str(published.get("source")))
                is_same = published.get("sha256") == adapter.basis_sha256
                if is_same and before and before._replace(revision=None) == basis and self._is_there(before):
                    basis = before
            if self._dry_run and to_come and basis.revision is None:
                return source
            key = basis, adapter.basis_sha256
            if key not in self._pinned:
                self._pinned[key] = self._pin(*key)
        except ServerError as error:
            if not (self._dry_run and error.silent):
                raise
            return source
        return self._pinned[key] or source

    def _is_there(self, basis: HubFolder) -> bool:
        """Whether the Hub has that commit still: what lies in the cache is there also when the repository was deleted,
        or its history squashed."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with hub_errors(str(basis), ServerError, "the adapter's basis: "):
            try:
                self._commit_of(basis.repo, basis.revision)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return False
        return True

    def _pin(self, basis: HubFolder, sha256: str) -> str | None:
        """`owner/name@commit` of a basis on the Hub: the one with this digest, and not private if its adapter is
        public. None where a dry run finds none."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

        name = str(basis._replace(revision=None))
        with hub_errors(name, ServerError, "the adapter's basis: "):
            try:
                path, commit = self._config_of(basis)
            except (RepositoryNotFoundError, RemoteEntryNotFoundError) as error:
                if not self._dry_run or isinstance(error, GatedRepoError):
                    raise
                return None
            open_to_all = basis.repo != self._repository.name and not self._private
            if open_to_all and with_retries(lambda: HfApi().model_info(basis.repo)).private:
                fix = "Make the basis public in its settings, or push the adapter privately"
                raise ArtifactError("the adapter would be public, its basis is private", where=name, fix=fix)
        found = read_json(path).get("sha256")
        if found != sha256:
            what = f"the basis there is {str(found)[:12]}, the adapter was trained in {sha256[:12]}"
            raise ArtifactError(what, where=name, fix="Push the adapter's own basis first")
        return str(basis._replace(revision=commit))

    def _config_of(self, basis: HubFolder) -> tuple[Path, str]:
        """It, and the commit: at its revision; without one on the branch that is pushed to, if there is such, else on
        main."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RevisionNotFoundError

        inside, branch = PurePosixPath(basis.path) / BASIS_CONFIG, self._repository.revision

        def get(at: str | None) -> tuple[Path, str]:
            commit = self._commit_of(basis.repo, at)
            return Path(with_retries(lambda: hf_hub_download(basis.repo, str(inside), revision=commit))), commit

        if basis.revision is None and branch is not None:
            with suppress(RevisionNotFoundError):
                return get(branch)
        return get(basis.revision)

    def _commit_of(self, repo: str, revision: str | None) -> str:
        """The commit that a revision is on the Hub now, main where None. (A download would be answered from the cache
        where the Hub fails or is not asked.)"""
        from huggingface_hub import HfApi

        if (repo, revision) not in self._commits:
            commit = with_retries(lambda: HfApi().model_info(repo, revision=revision, expand=["sha"])).sha
            assert commit is not None
            self._commits[repo, revision] = commit
        return self._commits[repo, revision]


def name_in_config(files: Files, source: str) -> None:
    """Write `source` as where the adapter's basis is."""
    config = parse_json(outgoing.content_of(files[ADAPTER_CONFIG]))
    config["basis"]["source"] = source
    files[ADAPTER_CONFIG] = to_json(config)


def _embed(adapter: Adapter, files: Files) -> Seen:
    """Put the adapter's basis among the files; returns the basis's own files, none if they lie in its folder."""
    if adapter.basis_source is None:
        adapter.load_basis()
        return {}
    folder, _ = resolve_folder(adapter.basis_source, BASIS_FILES)
    # The adapters of a project share one. Its digest, which is taken once, says that it is what they were trained in.
    is_whole = all((folder / name).is_file() for name in BASIS_FILES)
    if not is_whole or digest(folder / BASIS_WEIGHTS) != adapter.basis_sha256:
        adapter.load_basis()  # says what is wrong
    found: Files = {name: folder / name for name in BASIS_FILES}
    seen = outgoing.pin(found)
    if read_basis_config(folder)[0]["sha256"] != adapter.basis_sha256:
        raise outgoing.replaced_meanwhile(folder)
    files |= found
    return seen


def _published_basis(config: str) -> Mapping[str, Any]:
    """What the `adapter_config.json` of a repository says of its basis; empty where it is missing, or not of ours."""
    try:
        found = parse_json(config).get("basis")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
