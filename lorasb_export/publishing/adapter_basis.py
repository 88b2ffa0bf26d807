"""Where a pushed adapter's basis is: inside of it, or on the Hub at a commit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..adapter import Adapter
from ..errors import ArtifactError, ServerError
from ..fetch import BASIS_FILES, HubFolder, parse_hub_folder, resolve_folder
from ..format import read_basis_config
from ..hub_calls import hub_errors, with_retries
from ..storage import parse_json, read_json
from . import outgoing
from .checksums import digest
from .outgoing import Files, Seen
from .repository import Head, Repository


def embed(adapter: Adapter, files: Files) -> Seen:
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


def name_basis(
    adapter: Adapter,
    source: str,
    repository: Repository,
    head: Head,
    *,
    place: str = "",
    public: bool,
    to_come: bool = False,
    dry_run: bool,
) -> str:
    """`owner/name@commit` of the adapter's basis; the one published before, as long as it holds the same basis.

    A dry run takes a basis whose repository is not there as one that is still to be pushed.

    Args:
        place: of the adapter in its repository, as in `adapters/a/`.
    """
    basis = parse_hub_folder(source)
    if basis is None:
        fix = "Push the basis first and name it with --basis-repo, or upload it in the adapter with --with-basis"
        raise ArtifactError("nobody else could find this adapter's basis, a local folder", where=source, fix=fix)
    published = _published_basis(repository.text(head, f"{place}adapter_config.json"))
    if basis.revision is None and published.get("sha256") == adapter.basis_sha256:
        before = parse_hub_folder(str(published.get("source")))
        basis = before if before and before._replace(revision=None) == basis else basis
    if not head.reached or (dry_run and to_come and basis.revision is None):
        return source
    try:
        return _pin(basis, repository.revision, adapter.basis_sha256, public, dry_run) or source
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


def _pin(basis: HubFolder, branch: str | None, sha256: str, public: bool, dry_run: bool) -> str | None:
    """`owner/name@commit` of a basis on the Hub: the one with this digest, and not private if its adapter is public.

    None where a dry run finds none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    name = str(basis._replace(revision=None))
    with hub_errors(name, ServerError, "the adapter's basis: "):
        try:
            path, commit = _basis_config(basis, branch)
        except (RepositoryNotFoundError, RemoteEntryNotFoundError) as error:
            if not dry_run or isinstance(error, GatedRepoError):
                raise
            return None
        if public and with_retries(lambda: HfApi().model_info(basis.repo)).private:
            fix = "Make the basis public in its settings, or push the adapter privately"
            raise ArtifactError("the adapter would be public, its basis is private", where=name, fix=fix)
    found = read_json(path).get("sha256")
    if found != sha256:
        what = f"the basis there is {str(found)[:12]}, the adapter was trained in {sha256[:12]}"
        raise ArtifactError(what, where=name, fix="Push the adapter's own basis first")
    return str(basis._replace(revision=commit))


def _basis_config(basis: HubFolder, branch: str | None) -> tuple[Path, str]:
    """It, and the commit: at that revision; without one on `branch`, if there is such, else on main."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    inside = PurePosixPath(basis.path) / "basis_config.json"

    def get(at: str | None) -> tuple[Path, str]:
        path = Path(with_retries(lambda: hf_hub_download(basis.repo, str(inside), revision=at)))
        return path, path.parents[len(inside.parts) - 1].name

    if basis.revision is None and branch is not None:
        with suppress(RevisionNotFoundError):
            return get(branch)
    return get(basis.revision)
