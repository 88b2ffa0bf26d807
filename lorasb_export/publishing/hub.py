"""Push a folder to the Hub. Tokens are left to huggingface_hub and never shown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..basis import Basis
from ..basis_source import EMBEDDED
from ..cards import card, readme
from ..cards.sections import Facts
from ..errors import ArtifactError, ServerError, SettingsError
from ..fetch import BASIS_FILES, is_hub_id, parse_hub_id, resolve_folder
from ..format import read_basis_config
from ..hub_calls import hub_errors, with_retries
from ..storage import absolute, parse_json, read_json, to_json, utf8
from . import outgoing
from .checksums import checksums, digest
from .licence import licence
from .outgoing import Files, Seen
from .repository import Head, Repository, compare, refuse_other

# kind → its card, and the file that it is made from
_CARDS: Mapping[str, tuple[Any, str]] = {
    "basis": (card.basis_card, "basis_config.json"),
    "adapter": (card.adapter_card, "adapter_config.json"),
    "peft": (card.peft_card, "adapter_config.json"),
    "merged": (card.merged_card, "lorasb.json"),
    "onnx": (card.onnx_card, "lorasb.json"),
    "onnx-adapters": (card.onnx_card, "lorasb.json"),
}


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
    _check_options(folder, kind, repo, basis_repo, with_basis, create_pr and revision is not None)
    files, skipped = outgoing.collect(folder, kind)
    outgoing.refuse_incomplete(files, kind, folder)
    seen = outgoing.pin(files)
    repository = Repository(repo, revision)
    head, theirs = _look(repository, dry_run)
    refuse_other(files, head, public, repo)
    basis = None
    if kind == "basis":
        Basis.load(folder)
    elif kind == "adapter":
        adapter = Adapter.load(folder)
        source = basis_repo or adapter.basis_source or EMBEDDED
        if with_basis or source == EMBEDDED:
            basis = EMBEDDED
            seen |= _embed(adapter, files)
        else:
            basis = _name_basis(adapter, source, repository, head, public, basis_to_come, dry_run)
            for name in BASIS_FILES:
                files.pop(name, None)
        config = read_json(folder / "adapter_config.json")
        config["basis"]["source"] = basis
        files["adapter_config.json"] = to_json(config)
    text = _readme(files, kind, repo, folder, theirs, head.reached)
    files["README.md"] = text.encode()
    outgoing.take_out_paths(files)
    outgoing.refuse_tokens(files)
    files[outgoing.SUMS] = checksums(files)
    message = message or f"Upload {kind} with lorasb"
    plan = _plan(repository, files, head, kind, public, message)
    plan |= {"skipped": skipped, "card": readme.front_matter(text)} | ({"basis": basis} if basis else {})
    if not dry_run:
        return plan | repository.commit(files, head, seen, public=public, create_pr=create_pr, message=message)
    diff = difflib.unified_diff(theirs.splitlines(), text.splitlines(), "on the Hub", "to be pushed", lineterm="")
    return plan | {"card_diff": "\n".join(diff), "reached": head.reached}


def _check_options(
    folder: Path, kind: str, repo: str, basis_repo: str | None, with_basis: bool, branch_and_pr: bool
) -> None:
    for name in filter(None, (repo, basis_repo and basis_repo.partition("@")[0])):
        if not is_hub_id(name):
            raise SettingsError("not a Hub repository", where=name, fix="Give owner/name")
    if branch_and_pr:
        raise SettingsError("create_pr and revision exclude each other", fix="Leave one out")
    if basis_repo and with_basis:
        raise SettingsError("basis_repo and with_basis exclude each other", fix="Leave one out")
    if (basis_repo or with_basis) and kind != "adapter":
        raise SettingsError("basis_repo and with_basis are for adapters", where=folder, fix="Leave it out")


def _embed(adapter: Adapter, files: Files) -> Seen:
    """Put the adapter's basis among the files; returns the basis's own files, none if they lie in its folder."""
    if adapter.basis_source is None:
        adapter.load_basis()
        return {}
    folder, _ = resolve_folder(adapter.basis_source, BASIS_FILES)
    # The adapters of a project share one. Its digest, which is taken once, says that it is what they were trained in.
    is_whole = all((folder / name).is_file() for name in BASIS_FILES)
    if not is_whole or digest(folder / "basis.safetensors") != adapter.basis_sha256:
        adapter.load_basis()  # says what is wrong
    found: Files = {name: folder / name for name in BASIS_FILES}
    seen = outgoing.pin(found)
    if read_basis_config(folder)[0]["sha256"] != adapter.basis_sha256:
        raise outgoing.replaced(folder)
    files |= found
    return seen


def _name_basis(
    adapter: Adapter, source: str, repository: Repository, head: Head, public: bool, to_come: bool, dry_run: bool
) -> str:
    """`owner/name@commit` of the adapter's basis; the one published before, as long as it holds the same basis.

    A dry run takes a basis whose repository is not there as one that is still to be pushed.
    """
    parsed = parse_hub_id(source)
    if parsed is None:
        fix = "Push the basis first and name it with --basis-repo, or upload it in the adapter with --with-basis"
        raise ArtifactError("nobody else could find this adapter's basis, a local folder", where=source, fix=fix)
    name, revision = parsed
    published = _published_basis(repository.text(head, "adapter_config.json"))
    if revision is None and published.get("sha256") == adapter.basis_sha256:
        repo, _, commit = str(published.get("source")).partition("@")
        revision = commit if repo == name else None
    if not head.reached or (dry_run and to_come and revision is None):
        return source
    try:
        return _pin(name, revision, repository.revision, adapter.basis_sha256, public, dry_run) or source
    except ServerError as error:
        if not (dry_run and error.silent):
            raise
        return source


def _published_basis(config: str) -> Mapping[str, Any]:
    """What the `adapter_config.json` of a repository says of its basis; empty where it is missing, or not of ours."""
    try:
        found = parse_json(config).get("basis")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _pin(name: str, revision: str | None, branch: str | None, sha256: str, public: bool, dry_run: bool) -> str | None:
    """`owner/name@commit` of a basis on the Hub: the one with this digest, and not private if its adapter is public.

    None where a dry run finds none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    with hub_errors(name, ServerError, "the adapter's basis: "):
        try:
            path = _basis_config(name, revision, branch)
        except (RepositoryNotFoundError, RemoteEntryNotFoundError) as error:
            if not dry_run or isinstance(error, GatedRepoError):
                raise
            return None
        if public and with_retries(lambda: HfApi().model_info(name)).private:
            fix = "Make the basis public in its settings, or push the adapter privately"
            raise ArtifactError("the adapter would be public, its basis is private", where=name, fix=fix)
    found = read_json(path).get("sha256")
    if found != sha256:
        what = f"the basis there is {str(found)[:12]}, the adapter was trained in {sha256[:12]}"
        raise ArtifactError(what, where=name, fix="Push the adapter's own basis first")
    return f"{name}@{path.parent.name}"


def _basis_config(name: str, revision: str | None, branch: str | None) -> Path:
    """At that revision; without one on `branch`, if there is such, else on main."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    def get(at: str | None) -> Path:
        return Path(with_retries(lambda: hf_hub_download(name, "basis_config.json", revision=at)))

    if revision is None and branch is not None:
        with suppress(RevisionNotFoundError):
            return get(branch)
    return get(revision)


def _look(repository: Repository, dry_run: bool) -> tuple[Head, str]:
    """The repository now, and its card; a dry run does without, where the Hub cannot be reached or fails."""
    try:
        head = repository.read()
        return head, repository.text(head, "README.md")
    except ServerError as error:
        if not (dry_run and error.silent):
            raise
        return Head(reached=False), ""


def _readme(files: Files, kind: str, repo: str, folder: Path, theirs: str, reached: bool) -> str:
    """README.md with its generated part brought up to date, so that it names the repository."""
    make, source = _CARDS[kind]
    config = json.loads(outgoing.content_of(files[source]))
    mine = utf8(outgoing.content_of(files.get("README.md", b"")), folder / "README.md")
    made = read_json(folder / "lorasb.json") if "lorasb.json" in files else {}
    if kind == "adapter":
        made = {"adapter sha256": config["sha256"], **made}
    facts = _facts(config, made, files) if reached else Facts(made=made)
    return readme.merge(mine, theirs, make(config, repo, facts), where="README.md")


def _facts(config: Mapping[str, Any], made: Mapping[str, Any], files: Files) -> Facts:
    """The licences of the base and of the data."""
    base = card.base_of(config)
    name, revision = base.get("name_or_path"), base.get("revision")
    training = config.get("training") or made.get("training") or {}
    sources = {training.get("data"), *(s.get("source") for s in config.get("calibration", {}).get("data", []))}
    licences = {s: _licence_of_data(s) for s in sources if s}
    return Facts(
        licence=licence(name, revision=revision, beside=files) if name else {},
        data_licences={source: found for source, found in licences.items() if found},
        made=made,
    )


def _licence_of_data(source: str) -> str | None:
    name, revision = parse_hub_id(source) or (source, None)
    return licence(name, revision=revision, dataset=True).get("license")


def _plan(repository: Repository, files: Files, head: Head, kind: str, public: bool, message: str) -> dict[str, Any]:
    changes = compare(files, head)
    sizes = {path: outgoing.size_of(file) for path, file in sorted(files.items())}

    def change(path: str) -> str:
        if path not in changes.written:
            return "same"
        return "changed" if path in head.files else "added"

    return {
        "repo": repository.name,
        "url": repository.url,
        "kind": kind,
        "private": head.private if head.commit else not public,
        "files": [{"path": path, "bytes": size, "change": change(path)} for path, size in sizes.items()],
        "deleted": changes.deleted,
        "bytes": sum(sizes.values()),
        "sent": sum(sizes[path] for path in changes.written),
        "message": message,
        "parent": head.commit,
    }
