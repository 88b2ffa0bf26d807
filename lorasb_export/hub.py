"""Push a folder to the Hub. Tokens are left to huggingface_hub and never shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import card
from .base import BaseModel, artifact_kind
from .errors import ArtifactError, OutputError, ServerError, SettingsError
from .fetch import hub_errors, parse_hub_id
from .storage import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_Files = dict[str, "Path | bytes"]  # path in the repository → the file, or its content where it is not one


_BASIS = ("basis.safetensors", "basis_config.json")
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
_GRAPHS = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.onnx_adapter")
_ALWAYS = ("README.md", "LICENSE", "LICENSE*.md", "LICENSE*.txt", "NOTICE", "lorasb.json", "*.png")
# What a folder of each kind may publish. No pattern admits a pickle.
_ALLOWED = {
    "basis": (*_BASIS, *_ALWAYS),
    "adapter": ("adapter.safetensors", "adapter_config.json", "training_log.jsonl", *_BASIS, *_ALWAYS),
    "peft": ("adapter_model.safetensors", "adapter_config.json", *_ALWAYS),
    "merged": ("*.safetensors", *_TEXTS, *_ALWAYS),
    "onnx": (*_GRAPHS, *_TEXTS, *_ALWAYS),
    "onnx-adapters": (*_GRAPHS, *_TEXTS, *_ALWAYS),
}
# Left in the repository by an earlier push, these would be loaded together with the new files.
_STALE = ("*.safetensors", "*.safetensors.index.json", "basis_config.json", *_GRAPHS)
_MARKS = {
    "adapter.safetensors": "adapter",  # first: an embedded basis lies beside it
    "basis.safetensors": "basis",
    "adapter_model.safetensors": "peft",
    "*.onnx": "onnx",
    "*.safetensors": "merged",
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
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload a basis, adapter, merged, PEFT or ONNX folder to the Hub, with its card, in one commit.

    An adapter whose basis is a local folder takes it along (`basis.source` becomes "embedded" in what is
    uploaded; the folder itself is not changed). Unchanged files are not sent again.

    Args:
        repo: `owner/name`; made if missing.
        public: make it public. Without this, an existing public repository is refused.
        revision: commit to this branch; made if missing.
        create_pr: open a pull request against the main branch instead.
        basis_repo: `owner/name[@revision]` that holds this adapter's basis: name it, do not take it along.
        dry_run: only plan; touches no network.

    Returns:
        repo, url, kind, private, files [{path, bytes}], bytes, skipped, card (its front matter), basis (of an
        adapter: where the uploaded copy finds it), and unless `dry_run`: commit, changed.

    Raises:
        ArtifactError: the folder is damaged, of a kind that is not pushed, or links to files outside it.
        SettingsError: a malformed repository name, or options that exclude each other.
        OutputError: the repository is public, or holds another kind of artifact: nothing was written.
        ServerError: the Hub refused or cannot be reached.
    """
    for name in filter(None, (repo, basis_repo and basis_repo.partition("@")[0])):
        if "@" in name or parse_hub_id(name) is None:
            raise SettingsError("not a Hub repository", where=name, fix="Give owner/name")
    if create_pr and revision:
        raise SettingsError("create_pr and revision exclude each other", fix="Leave one out")
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    kind = artifact_kind(folder)
    if kind not in _ALLOWED:
        fix = f"Push a folder written by lorasb ({', '.join(_ALLOWED)})"
        raise ArtifactError(f"a folder of kind {kind!r} is not pushed", where=folder, fix=fix)
    if basis_repo and kind != "adapter":
        raise SettingsError("basis_repo is only for adapters", where=folder, fix="Leave it out")

    files, skipped = _collect(folder, kind)
    basis = _check_content(files, kind, folder, basis_repo, dry_run)
    readme = _card(files, kind, repo)
    files["README.md"] = readme.encode()
    sizes = {path: len(f) if isinstance(f, bytes) else f.stat().st_size for path, f in sorted(files.items())}

    from huggingface_hub import HfApi

    api = HfApi(library_name="lorasb")
    plan: dict[str, Any] = {
        "repo": repo,
        "url": f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""),
        "kind": kind,
        "private": not public,
        "files": [{"path": path, "bytes": size} for path, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "skipped": skipped,
        "card": card.front_matter(readme),
    }
    if basis is not None:
        plan["basis"] = basis
    if not dry_run:
        with hub_errors(repo, ServerError):
            plan |= _upload(api, repo, files, public, revision, create_pr, message or f"Upload {kind} with lorasb")
    return plan


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return not path.startswith(".") and any(
        fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns
    )


def _collect(folder: Path, kind: str) -> tuple[_Files, list[str]]:
    """The files to publish by their path inside the folder, and the paths passed over."""
    files: _Files = {}
    skipped = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        inside = path.relative_to(folder).as_posix()
        if not _matches(inside, _ALLOWED[kind]):
            skipped.append(inside)
        elif not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            fix = "Replace it by the file itself"
            raise ArtifactError("a link that leads nowhere, or out of the folder", where=path, fix=fix)
        else:
            files[inside] = path
    return files, skipped


def _check_content(files: _Files, kind: str, folder: Path, basis_repo: str | None, dry_run: bool) -> str | None:
    """Refuse a damaged folder; make an adapter loadable elsewhere. Returns where its basis will be."""
    from .artifact import EMBEDDED, Adapter, Basis

    if kind == "basis":
        Basis.load(folder)
    elif kind == "merged":
        BaseModel.resolve(folder).tensors  # noqa: B018  # reads and checks every header
    if kind != "adapter":
        return None
    adapter = Adapter.load(folder)
    source = adapter.basis_source or EMBEDDED
    if basis_repo:
        source = basis_repo if dry_run else _pin(basis_repo, adapter.basis_sha256)
        for name in _BASIS:
            files.pop(name, None)
    elif source == EMBEDDED:
        adapter.load_basis()
    elif os.path.isabs(source):
        adapter.load_basis()
        files |= {name: Path(source) / name for name in _BASIS}
        source = EMBEDDED
    config = read_json(folder / "adapter_config.json")
    config["basis"]["source"] = source
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    files["adapter_config.json"] = f"{text}\n".encode()
    return source


def _pin(basis_repo: str, sha256: str) -> str:
    """`owner/name@commit` of a basis on the Hub, which must be the one with this digest."""
    from huggingface_hub import hf_hub_download

    name, _, revision = basis_repo.partition("@")
    with hub_errors(basis_repo, ServerError):
        path = Path(hf_hub_download(name, "basis_config.json", revision=revision or None))
    found = read_json(path).get("sha256")
    if found != sha256:
        what = f"the basis there is {str(found)[:12]}, the adapter was trained in {sha256[:12]}"
        raise ArtifactError(what, where=basis_repo, fix="Push the adapter's own basis first")
    return f"{name}@{path.parent.name}"


def _card(files: _Files, kind: str, repo: str) -> str:
    """README.md with its generated part brought up to date, so that it names the repository."""
    make, source = {
        "basis": (card.basis_card, "basis_config.json"),
        "adapter": (card.adapter_card, "adapter_config.json"),
        "peft": (card.peft_card, "adapter_config.json"),
        "merged": (card.merged_card, "lorasb.json"),
        "onnx": (card.onnx_card, "lorasb.json"),
        "onnx-adapters": (card.onnx_card, "lorasb.json"),
    }[kind]
    old, config = files.get("README.md", b""), files[source]
    config = config if isinstance(config, bytes) else config.read_bytes()
    text = old.decode() if isinstance(old, bytes) else old.read_text(encoding="utf-8")
    return card.update(text, make(json.loads(config), repo), where="README.md")


def _upload(
    api: HfApi, repo: str, files: _Files, public: bool, revision: str | None, create_pr: bool, message: str
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repo, private=not public, exist_ok=True)
    info = api.model_info(repo)
    if not info.private and not public:
        raise OutputError("the repository is public", where=repo, fix="Pass --public, or choose another one")
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
    there = [sibling.rfilename for sibling in info.siblings or []]
    if _mark(there) not in (None, _mark(files)):
        fix = "Give each artifact a repository of its own"
        raise OutputError(f"the repository holds another kind ({_mark(there)})", where=repo, fix=fix)
    # One commit, not upload_folder: that splits large folders, and a reader could see half of one.
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationAdd(path, content) for path, content in sorted(files.items())),
            *(CommitOperationDelete(p) for p in there if _matches(p, _STALE) and p not in files),
        ],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )
    result = {"private": info.private, "commit": commit.oid, "changed": commit.oid != info.sha}
    return result | ({"url": commit.pr_url} if commit.pr_url else {})


def _mark(paths: Iterable[str]) -> str | None:
    """The kind of artifact that a listing holds, as far as weights from two kinds must not mix."""
    return next((kind for mark, kind in _MARKS.items() if any(_matches(p, [mark]) for p in paths)), None)
