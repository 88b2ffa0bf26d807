"""The card of a folder as it is pushed: it names the repository, and the licences of the base and of the data."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cards import card, readme
from ..cards.sections import Facts
from ..files.storage import read_json, utf8
from ..hub.fetch import HubFolder, parse_hub_id
from . import outgoing
from .licence import licence
from .outgoing import Files

# kind → its card, and the file that it is made from
_CARDS: Mapping[str, tuple[Any, str]] = {
    "basis": (card.basis_card, "basis_config.json"),
    "adapter": (card.adapter_card, "adapter_config.json"),
    "peft": (card.peft_card, "adapter_config.json"),
    "merged": (card.merged_card, "lorasb.json"),
    "onnx": (card.onnx_card, "lorasb.json"),
    "onnx-adapters": (card.onnx_card, "lorasb.json"),
}


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
    where: str = "README.md",
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
    mine = utf8(outgoing.content_of(files.get("README.md", b"")), folder / "README.md")
    made = read_json(folder / "lorasb.json") if "lorasb.json" in files else {}
    if kind == "adapter":
        made = {"adapter sha256": config["sha256"], **made}
    facts = licences.facts(config, made, files) if licences else Facts(made=made)
    return readme.merge(mine, theirs, make(config, name, facts), where=where)
