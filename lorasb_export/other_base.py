"""Warnings of adapters that go onto another base than they were trained beside: in four bits or not, or with another
chat template. Its fingerprint is the same, for that is of the weights in the files."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import NF4
from .data.trained_template import TEMPLATE_KEY, template_sha256
from .errors import some

if TYPE_CHECKING:
    from .adapter import Adapter

logger = logging.getLogger(__name__)


def warn_of_other_weights(adapters: Collection[Adapter], base_dtype: str = "auto", *, combined: bool = False) -> None:
    """Warn of adapters that say that they were trained beside weights in four bits, or not, and go onto the others.

    Args:
        base_dtype: `nf4` where they go onto weights in four bits, or rounded to them.
        combined: they go onto them as one.
    """
    said = [(one.name or "the adapter", one.training) for one in adapters]
    if told := told_of_other_weights(said, base_dtype, combined=combined):
        logger.warning(told)


def told_of_other_weights(
    said: Collection[tuple[str, Mapping[str, Any]]], base_dtype: str = "auto", *, combined: bool = False
) -> str | None:
    """The words of `warn_of_other_weights`, None where there is nothing to warn of.

    Args:
        said: of each adapter its name, and what it says of its training.
    """
    onto = base_dtype == NF4
    dtypes = [(name, training.get("settings", {}).get("dtype")) for name, training in said]
    names = [name for name, dtype in dtypes if dtype is not None and (dtype == NF4) != onto]
    if not names:
        return None
    beside = "the weights as they are" if onto else "a base in four bits"
    fix = "without --base-dtype" if onto else "by `lorasb merge --base-dtype nf4`"
    who = "Some of the adapters were" if combined or len(said) > 1 else "The adapter was"
    return f"{who} trained beside {beside}, and may score more merged {fix} ({some(names)})"


def warn_of_another_template(adapters: Iterable[Adapter], folder: Path) -> None:
    """Warn of adapters that the base, or graph, in `folder` asks in another form than they learnt. Once for all."""
    if told := told_of_another_template([(one.name or "the adapter", one.training) for one in adapters], folder):
        logger.warning(told)


def told_of_another_template(said: Iterable[tuple[str, Mapping[str, Any]]], folder: Path) -> str | None:
    """The words of `warn_of_another_template`, None where there is nothing to warn of.

    Args:
        said: of each adapter its name, and what it says of its training.
    """
    here = template_sha256(folder)
    names = [name for name, training in said if training.get(TEMPLATE_KEY, here) != here]
    if not names:
        return None
    return (
        f"{some(names)}: trained with another chat template than this base has, and may answer worse when asked with "
        f"it ({folder}). Give the base with that template (--model), or put the template into this one"
    )
