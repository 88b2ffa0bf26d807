"""Where the base of adapters is, in a project."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ..adapter import describe
from ..base.model import BaseModel, BaseRef
from ..errors import ArtifactError, BaseModelError
from ..hub.ids import parse_hub_id
from .project import Project


def find_base(project: Project, model: str | None, *adapters: str | Path) -> str | None:
    """Where to look for the base of `adapters`, folders or Hub ids: `model` if given; the project's, if it has the
    weights that they were trained on; else None: where they say.

    An adapter names the base of its basis, `fit` took the project's: with those weights, and another chat template,
    maybe. The first adapter that can be read is asked. If there is no base where it says, the project's is returned
    all the same; its fingerprint is compared with the adapters' later. If that is not there either, None, so that
    the error names the base that the adapter asks for.
    """
    if model is not None or project.model is None:
        return model
    asked = _first_readable(adapters)
    if asked is None:
        return None
    (named, modules), own = asked, project.require_model()
    on_the_hub = None if Path(own).is_dir() else parse_hub_id(own)
    if on_the_hub and on_the_hub.repo != named.name_or_path and _is_there(named):
        return None  # the project's is not fetched, to be told that it is another
    found = None
    with suppress(ArtifactError, BaseModelError):
        found = BaseModel.resolve(own)
        if found.fingerprint(modules) == named.fingerprint:
            return own
    return None if found is None or _is_there(named) else own


def _first_readable(adapters: Iterable[str | Path]) -> tuple[BaseRef, Sequence[str]] | None:
    """The base that the first adapter names whose config can be read, and the modules of it that R is on."""
    for source in adapters:
        with suppress(ArtifactError):  # who loads the adapter says so, and whatever else is wrong
            adapter, _, config = describe(source)
            return adapter.base, config["target_modules"]
    return None


def _is_there(named: BaseRef) -> bool:
    with suppress(BaseModelError):
        named.resolve()
        return True
    return False
