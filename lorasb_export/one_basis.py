"""Which of many adapters share a basis, where what is made of all needs one."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain

from .adapter import Adapter
from .errors import some

logger = logging.getLogger(__name__)


def of_one_basis(adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """Those of the basis that most are of, and a warning that names the others, where these are few; else all.

    Of tasks that are being trained anew in another basis half must not be gone after a restart without an error.
    """
    bases, strangers = by_basis(adapters)
    if not strangers or len(strangers) == len(bases[0]) or len(strangers) > max(1, len(adapters) // 10):
        return adapters
    logger.warning("Passed over, being of another basis than %s: %s", some(bases[0], 1), some(strangers))
    return {name: adapters[name] for name in bases[0]}


def by_basis(adapters: Mapping[str, Adapter]) -> tuple[list[list[str]], list[str]]:
    """Names of adapters that share a basis, the most first; and all names but the first's."""
    bases: defaultdict[str, list[str]] = defaultdict(list)
    for name, adapter in adapters.items():
        bases[adapter.basis_sha256].append(name)
    ordered = sorted(bases.values(), key=len, reverse=True)
    return ordered, list(chain.from_iterable(ordered[1:]))
