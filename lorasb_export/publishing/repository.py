"""A repository on the Hub: what it holds now, and one commit on top of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, LoraSBError, OutputError, ServerError
from ..files.kind import CARD
from ..files.storage import utf8
from ..hub.cache import git_hash
from ..hub.calls import hub_errors, retry_after, status_of, wait_for, with_retries
from ..hub.newest import ask_again
from .checksums import digest, parse
from .outgoing import PROJECT, SUMS, Files, Seen, content_of, kind_of_files, part_of, refuse_replaced, size_of, stale

_TRIES = 4  # of a commit
_IGNORED = "# nothing"  # else the Hub goes by the repository's own .gitignore, and files are left out without a word


@dataclass(frozen=True)
class Stored:
    """A file there: sha256 of a large one, git's hash of a small one."""

    digest: str
    large: bool
    size: int


@dataclass(frozen=True)
class Head:
    """The state a push starts from.

    Attributes:
        commit: None where the repository is still to be made.
        reached: whether the Hub answered.
        published: what its SHA256SUMS lists, path → sha256; anything else was put there by hand.
    """

    commit: str | None = None
    private: bool = True
    files: Mapping[str, Stored] = field(default_factory=dict)
    has_branch: bool = True
    reached: bool = True
    published: Mapping[str, str] = field(default_factory=dict)

    def stays_private(self, public: bool) -> bool:
        """Whether it is private after a push, which makes a `public` one but opens none that is there."""
        return not public if self.commit is None else self.private


@dataclass(frozen=True)
class Changes:
    """What makes a repository equal to the files of a push; nothing, where it already is."""

    written: list[str]
    deleted: list[str]

    def __bool__(self) -> bool:
        return bool(self.written or self.deleted)


class Repository:
    """`owner/name` at a branch (main when None). No method shows a token: huggingface_hub finds it."""

    def __init__(self, name: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.name, self.revision = name, revision
        self._api = HfApi(library_name="lorasb")
        self.url = f"{self._api.endpoint}/{name}" + (f"/tree/{revision}" if revision else "")

    def read(self) -> Head:
        """What it holds now.

        Raises:
            OutputError: the repository was renamed.
            ServerError: the Hub refuses, fails or cannot be reached.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with hub_errors(self.name, ServerError):
            has_branch = True
            try:
                info = with_retries(lambda: self._api.model_info(self.name, revision=self.revision))
            except RepositoryNotFoundError:
                return Head(has_branch=self.revision is None)
            except RevisionNotFoundError:
                has_branch = False  # it will start from main
                info = with_retries(lambda: self._api.model_info(self.name))
            if info.id != self.name:
                raise OutputError("the repository was renamed", where=self.name, fix=f"Push to {info.id}")
            assert info.sha is not None
            head = Head(info.sha, bool(info.private), self._files(info.sha), has_branch)
            return replace(head, published=self._published(head))

    def look(self, dry_run: bool) -> tuple[Head, str]:
        """What it holds now, and its card; a dry run does without, where the Hub cannot be reached or fails.

        Raises:
            OutputError, ServerError: as for `read`; ArtifactError: the card is not UTF-8.
        """
        try:
            head = self.read()
            return head, self.text(head, CARD)
        except ServerError as error:
            if not (dry_run and error.silent):
                raise
            return Head(reached=False), ""

    def _files(self, commit: str) -> dict[str, Stored]:
        from huggingface_hub import RepoFile

        tree = with_retries(lambda: list(self._api.list_repo_tree(self.name, recursive=True, revision=commit)))
        return {
            item.path: Stored(item.lfs.sha256 if item.lfs else item.blob_id, item.lfs is not None, item.size)
            for item in tree
            if isinstance(item, RepoFile)
        }

    def _published(self, head: Head) -> Mapping[str, str]:
        try:
            text = self.text(head, SUMS)
            return parse(text, f"{self.name}/{SUMS}") if text else {}
        except ArtifactError:  # not written by a push: it says nothing of what one left
            return {}

    def text(self, head: Head, path: str) -> str:
        """A text file as it is there; empty where there is none.

        Raises:
            ArtifactError: it is not UTF-8.
            ServerError: the Hub refuses, fails or cannot be reached.
        """
        from huggingface_hub import hf_hub_download

        if path not in head.files:
            return ""
        with hub_errors(self.name, ServerError):
            found = with_retries(lambda: hf_hub_download(self.name, path, revision=head.commit))
        return utf8(Path(found).read_bytes(), f"{self.name}/{path}")

    def commit(
        self,
        files: Files,
        head: Head,
        seen: Seen,
        *,
        public: bool,
        create_pr: bool,
        message: str,
    ) -> dict[str, Any]:
        """Make the repository equal to `files`, in one commit on top of `head`, or in none where it is so already.

        What the Hub fails to do is tried again. Uploaded files wait on the Hub for the commit that names them, so a
        push that is cut short publishes nothing and the next one sends what is missing.

        Args:
            seen: the files that must still be there as they were, or nothing is committed.

        Returns:
            commit, changed, private, url.

        Raises:
            ArtifactError: the folder was replaced meanwhile.
            OutputError: the repository is public and `public` is false, or it holds another kind: nothing was written.
            ServerError: somebody else committed meanwhile, or the Hub refuses, fails or cannot be reached.
        """
        ask_again(self.name)
        with hub_errors(self.name, ServerError):
            head = self._prepare(files, head, public)
            if not (changes := compare(files, head)):
                return self._result(head.commit, head, changed=False)
            for attempt in range(1, _TRIES + 1):
                try:
                    done = self._send(files, changes, head, seen, create_pr, message)
                    return self._result(done.oid, head, changed=True) | ({"url": done.pr_url} if done.pr_url else {})
                except Exception as error:
                    if attempt > 1 and status_of(error) == 412:  # an earlier try may have landed after we looked
                        return self._landed(files, self.read())
                    pause = retry_after(error)
                    if pause is None or create_pr or attempt == _TRIES:  # a second try may open a second request
                        raise
                    wait_for(pause or attempt)
                    now = self.read()
                    if now.commit != head.commit:
                        return self._landed(files, now)
        raise AssertionError("the last try returns or raises")

    def _prepare(self, files: Files, head: Head, public: bool) -> Head:
        """Make repository and branch where they are missing."""
        if head.commit is None:
            with_retries(lambda: self._api.create_repo(self.name, private=not public, exist_ok=True))
            head = self.read()
            if set(head.files) - {".gitattributes"} and compare(files, head):
                raise self._changed()  # made by somebody else since we looked; what we send was made for an empty one
        refuse_other(kind_of_files(files), head, public, self.name)
        if self.revision and not head.has_branch:
            branch = self.revision
            with_retries(lambda: self._api.create_branch(self.name, branch=branch, exist_ok=True))
        return head

    def _send(self, files: Files, changes: Changes, head: Head, seen: Seen, create_pr: bool, message: str) -> Any:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = [CommitOperationAdd(path, files[path]) for path in changes.written]
        self._api.preupload_lfs_files(
            self.name,
            added,
            revision=self.revision,
            create_pr=create_pr,
            free_memory=False,
            gitignore_content=_IGNORED,
        )
        refuse_replaced(seen)  # all of them have been read now
        # One commit, not upload_folder: that splits large folders, and a reader could see half of one.
        return self._api.create_commit(
            self.name,
            [*added, *(CommitOperationDelete(path) for path in changes.deleted)],
            commit_message=message,
            revision=self.revision,
            create_pr=create_pr,
            parent_commit=head.commit,
        )

    def _landed(self, files: Files, now: Head) -> dict[str, Any]:
        """After a failed try the branch has moved, by our commit, whose answer was lost, or by somebody else's."""
        if compare(files, now):
            raise self._changed()
        return self._result(now.commit, now, changed=True)

    def _changed(self) -> ServerError:
        what = "the repository changed meanwhile; nothing was committed on top of that"
        return ServerError(what, where=self.name, fix="Push again: no file is sent twice")

    def _result(self, commit: str | None, head: Head, *, changed: bool) -> dict[str, Any]:
        return {"commit": commit, "changed": changed, "private": head.private, "url": self.url}


def compare(files: Files, head: Head) -> Changes:
    """What would change."""
    written = [path for path, file in sorted(files.items()) if not is_stored(file, head.files.get(path))]
    return Changes(written, stale(head.files, head.published, files))


def refuse_other(kind: str | None, head: Head, public: bool, name: str) -> None:
    """Raise OutputError before anything is written to a repository that is public unasked, or of another kind."""
    if head.commit is not None and not head.private and not public:
        raise OutputError("the repository is public", where=name, fix="Pass --public, or choose another one")
    there = PROJECT if any(map(part_of, head.published)) else kind_of_files(head.files)
    if there not in (None, kind):
        fix = "Give each artifact a repository of its own"
        if there == PROJECT:
            fix = "Name no folder, to push the project; or choose another repository"
        if there == PROJECT and kind == "adapter":
            fix += ". To push an adapter alone, set [hub] repo in lorasb.toml and leave out --repo"
        raise OutputError(f"the repository holds another kind ({there})", where=name, fix=fix)


def is_of_one(error: LoraSBError) -> bool:
    """Whether an adapter's error is of its files or its repository, and the next one may fare better."""
    if isinstance(error, ServerError):
        return not error.of_every_repository
    return isinstance(error, ArtifactError | OutputError)


def is_stored(file: Path | bytes, there: Stored | None) -> bool:
    if there is None or there.size != size_of(file):
        return False
    if there.large:
        return digest(file) == there.digest
    return git_hash(content_of(file)) == there.digest
