"""`lorasb.json` of a project's repository: what is said of each basis and adapter in it (docs/reference/files.md)."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Mapping
from typing import Any

from ..cards.card import base_of
from ..errors import ArtifactError, OutputError, some
from ..files.kind import RECORD
from ..files.storage import parse_json
from ..format import check_training
from ..hub.ids import kind_of_part
from ..names import name_problem
from .outgoing import PROJECT, part_of
from .repository import Head, Repository

About = Mapping[str, Any]

# What is taken from it: with the labels of thousands of classifiers it would be more than is read of JSON.
_OF_TRAINING = ("evaluation", "regression")
_OF_BASIS = {"sha256": str, "rank": int, "base_model": str}
_OF_ADAPTER = {"sha256": str, "basis": str, "basis_sha256": str, "base_model": str, "task_type": str}


def about(kind: str, config: Mapping[str, Any]) -> About:
    """What the index says of a folder with this config."""
    found = {"sha256": config["sha256"], "base_model": base_of(config)["name_or_path"]}
    if kind == "basis":
        return found | {"rank": config["rank"]}
    training = {key: config["training"][key] for key in _OF_TRAINING if key in config["training"]}
    basis = {"basis": config["basis"]["source"], "basis_sha256": config["basis"]["sha256"]}
    return found | basis | {"task_type": config["task_type"], "evaluation": {}, **training}


def make_index(base: Mapping[str, Any], parts: Mapping[str, About]) -> dict[str, Any]:
    """Its content. `parts`: by where they lie, as in `adapters/a`."""
    named = {"name_or_path": base["name_or_path"], "revision": base.get("revision")}
    return {"kind": PROJECT, "base": named, "parts": dict(sorted(parts.items()))}


def read_index(content: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, the name of the base model, and `parts` of an index that anybody may have written: what is not in the
    form of ours is left out."""
    base, parts = (found if isinstance(found := content.get(key), dict) else {} for key in ("base", "parts"))
    name = base.get("name_or_path")
    read = {part: _checked(kind_of_part(part), said) for part, said in parts.items() if part_of(f"{part}/") == part}
    return {"base": name if isinstance(name, str) else None, "parts": {p: one for p, one in read.items() if one}}


def others(repository: Repository, head: Head, mine: Collection[str]) -> dict[str, About]:
    """What is there and not among `mine`; told by the index, or by their configs where that does not know them.

    What is in neither in the form of ours is left out.
    """
    try:
        known = read_index(parse_json(repository.text(head, RECORD)))["parts"]
    except ValueError:
        known = {}
    found = {}
    for part in sorted({part_of(path) for path in head.files} - {"", *mine}):
        kind = kind_of_part(part)
        weights = head.files.get(f"{part}/{kind}.safetensors")
        if weights is None or name_problem(posixpath.basename(part)):
            continue
        one = known.get(part)
        if one is None or (weights.large and weights.digest != one["sha256"]):
            one = _checked(kind, _from_config(kind, repository, head, f"{part}/{kind}_config.json"))
        if one is not None:
            found[part] = one
    return found


def labels_of(config: str | bytes) -> list[Any]:
    """Those of a classifier, from a config that anybody may have written; none where it is not in the form of ours."""
    try:
        training = {"labels": parse_json(config)["training"]["labels"]}
        check_training(training, "labels")
    except (ValueError, LookupError, TypeError):
        return []
    return training["labels"] or []


def refuse_lost(mine: Mapping[str, About], others: Mapping[str, About], where: str) -> None:
    """Raise OutputError where a push of `mine` would leave adapters among `others` without their basis, or beside
    those of another base model."""
    adapters = {part: one for part, one in others.items() if kind_of_part(part) == "adapter"}
    bases = {one["base_model"] for one in mine.values()}
    foreign = [part for part, one in adapters.items() if one["base_model"] not in bases]
    if foreign:
        what = f"adapters there ({some(foreign)}) are for another base model, {adapters[foreign[0]]['base_model']}"
        raise OutputError(what, where=where, fix="Choose another repository")
    lost = []
    for part, one in adapters.items():
        beside = posixpath.normpath(posixpath.join(part, one["basis"]))  # of another source it is no part
        if one["basis"].startswith(".") and beside in mine and mine[beside]["sha256"] != one["basis_sha256"]:
            lost.append(part)
    if lost:
        what = f"adapters there that are not sent ({some(lost)}) were trained in a basis that this push replaces"
        raise OutputError(what, where=where, fix="Choose another repository, or delete them in that one")


def _from_config(kind: str, repository: Repository, head: Head, path: str) -> About | None:
    try:
        return about(kind, parse_json(repository.text(head, path)))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _checked(kind: str, said: Any) -> About | None:
    """`said`, of its keys those that we write; None where it is not in that form."""
    form = _OF_BASIS if kind == "basis" else _OF_ADAPTER
    if not isinstance(said, dict) or not all(isinstance(said.get(key), of) for key, of in form.items()):
        return None
    of_training = {key: said[key] for key in _OF_TRAINING if key in said and kind == "adapter"}
    try:
        check_training(of_training, RECORD)
    except ArtifactError:
        return None
    return {key: said[key] for key in form} | ({"evaluation": {}, **of_training} if kind == "adapter" else {})
