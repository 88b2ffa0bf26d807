"""The card of a folder as it is pushed: it names the repository, and the licences of the base and of the data."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from ..cards import card, readme
from ..cards.sections import Facts
from ..errors import ArtifactError, ServerError
from ..files.kind import ADAPTER_CONFIG, BASIS_CONFIG, CARD, RECORD
from ..files.storage import expanded, read_json, utf8
from ..hub.calls import hub_errors, with_retries
from ..hub.ids import HubFolder, is_hub_id, parse_hub_id
from . import outgoing
from .outgoing import Files

# kind → its card, and the file that it is made from
_CARDS: Mapping[str, tuple[Any, str]] = {
    "basis": (card.basis_card, BASIS_CONFIG),
    "adapter": (card.adapter_card, ADAPTER_CONFIG),
    "peft": (card.peft_card, ADAPTER_CONFIG),
    "merged": (card.merged_card, RECORD),
    "onnx": (card.onnx_card, RECORD),
    "onnx-adapters": (card.onnx_card, RECORD),
}

_MAX_NAMES, _MAX_LENGTH = 10, 300  # of a licence
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Licences:
    """Licences by source; of what many adapters were made from the Hub is asked once."""

    def __init__(self) -> None:
        self._licence = functools.cache(licence)

    def facts(self, config: Mapping[str, Any], made: Mapping[str, Any], files: Files) -> Facts:
        """What a card says of the base and the data that a folder's config names."""
        base = card.base_of(config)
        name, revision = base.get("name_or_path"), base.get("revision")
        training = config.get("training") or made.get("training") or {}
        sources = {training.get("data"), *(s.get("source") for s in config.get("calibration", {}).get("data", []))}
        data = {source: self._of_data(source).get("license") for source in sources if source}
        return Facts(
            licence=self._licence(name, revision=revision, beside=frozenset(files)) if name else {},
            data_licences={source: found for source, found in data.items() if found},
            made=made,
        )

    def _of_data(self, source: str) -> Mapping[str, str]:
        found = parse_hub_id(source) or HubFolder(source)
        return self._licence(found.repo, revision=found.revision, dataset=True)


def folder_card(
    files: Files,
    kind: str,
    name: str,
    folder: Path,
    theirs: str,
    licences: Licences | None,
    where: str = CARD,
) -> str:
    """README.md with its generated part brought up to date, so that it names the repository.

    Args:
        name: what a reader loads it by.
        theirs: the published card; empty where there is none.
        licences: None where the Hub cannot be asked.
        where: it lies in the repository, for errors.

    Raises:
        ArtifactError: the folder's own card is not UTF-8, or a card is no card.
        OutputError: both were edited, differently.
    """
    make, source = _CARDS[kind]
    config = json.loads(outgoing.content_of(files[source]))
    mine = utf8(outgoing.content_of(files.get(CARD, b"")), folder / CARD)
    made = read_json(folder / RECORD) if RECORD in files else {}
    if kind == "adapter":
        made = {"adapter sha256": config["sha256"], **made}
    facts = licences.facts(config, made, files) if licences else Facts(made=made)
    return readme.merge(mine, theirs, make(config, name, facts), where=where)


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
    path = folder / CARD if folder.is_dir() else None
    if path is None and is_hub_id(source):
        path = _card_on_the_hub(source, revision, dataset)
    if path is None or not path.is_file():
        return {}
    try:
        keys = readme.licence_of(utf8(path.read_bytes(), path), path)
    except ArtifactError:
        return {}
    found = {key: text for key in readme.LICENCE_KEYS if (text := _text(keys.get(key)))}
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
            path = with_retries(lambda: hf_hub_download(name, CARD, revision=revision, repo_type=repo_type))
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):  # or gated
            return None
    return Path(path)
