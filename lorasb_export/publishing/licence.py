"""Under which licence a base model or a data set is: what its card says."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import date
from pathlib import Path

from ..cards.readme import LICENCE_KEYS, front_matter
from ..errors import ArtifactError, ServerError
from ..files.storage import expanded, utf8
from ..hub.calls import hub_errors, with_retries
from ..hub.fetch import is_hub_id

_MAX_NAMES, _MAX_LENGTH = 10, 300
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def licence(
    source: str, *, revision: str | None = None, dataset: bool = False, beside: Collection[str] = ()
) -> Mapping[str, str]:
    """`license`, `license_name` and `license_link` of the card of a folder or Hub id; empty where none says it.

    A link to a file that the source alone has leads to it on the Hub; of a folder it is left out.

    Args:
        beside: the files that will lie beside the card which takes this over.

    Raises:
        ServerError: the Hub fails or cannot be reached.
    """
    folder = expanded(source)
    path = folder / "README.md" if folder.is_dir() else None
    if path is None and is_hub_id(source):
        path = _card_on_the_hub(source, revision, dataset)
    if path is None or not path.is_file():
        return {}
    try:
        keys = front_matter(utf8(path.read_bytes(), path), path)
    except ArtifactError:
        return {}
    found = {key: text for key in LICENCE_KEYS if (text := _text(keys.get(key)))}
    link = found.get("license_link", "")
    if link and link not in beside and not _SCHEME.match(link):
        del found["license_link"]
        if not folder.is_dir():
            name = f"datasets/{source}" if dataset else source
            found["license_link"] = f"https://huggingface.co/{name}/blob/{revision or 'main'}/{link}"
    return found


def _text(value: object) -> str:
    """A licence's name or link, or several names; a card can be anybody's, and hold anything."""
    said = value if isinstance(value, list) else [value]
    names = [str(name) for name in said[:_MAX_NAMES] if isinstance(name, str | date) or _is_version(name)]
    return ", ".join(names)[:_MAX_LENGTH]


def _is_version(value: object) -> bool:
    """`license_name: 2.0` is a number to YAML; `no` is not, nor what is too long to be written."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _card_on_the_hub(name: str, revision: str | None, dataset: bool) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    repo_type = "dataset" if dataset else None
    with hub_errors(name, ServerError):
        try:
            path = with_retries(lambda: hf_hub_download(name, "README.md", revision=revision, repo_type=repo_type))
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):  # or gated
            return None
    return Path(path)
