"""Which basis an adapter belongs to, and which of many share one."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from .errors import ArtifactError, some

if TYPE_CHECKING:
    from .adapter import Adapter
    from .basis import Basis

logger = logging.getLogger(__name__)


def check_same_basis(adapter: Adapter, basis: Basis) -> None:
    """Raise ArtifactError unless `adapter` was trained in `basis`."""
    problems = []
    if adapter.basis_sha256 != basis.sha256:
        problems.append(f"trained in basis {adapter.basis_sha256[:12]}, this one is {basis.sha256[:12]}")
    if adapter.rank != basis.rank:
        problems.append(f"rank {adapter.rank}, the basis has {basis.rank}")
    if set(adapter.R) != set(basis.modules):
        odd = sorted(set(adapter.R) ^ set(basis.modules))[0]
        problems.append(f"the target modules differ (first: {odd})")
    if problems:
        raise ArtifactError(
            f"adapter and basis do not belong together: {'; '.join(problems)}",
            where=adapter.folder or basis.source,
            fix="Give the basis named in adapter_config.json",
        )


def basis_for_next(start: Adapter, basis: Basis) -> Basis:
    """The basis of `start` for one that goes on from it: where it lies in that adapter, so in the next one."""
    return replace(basis, source=None) if basis.source in (str(start.folder), start.hub_source) else basis


def load_basis_once(adapter: Adapter, loaded: dict[str, Basis]) -> None:
    """`adapter.load_basis()`; adapters of one basis share what the first has put into `loaded`, by its sha256."""
    adapter.basis = adapter.basis or loaded.get(adapter.basis_sha256)
    loaded[adapter.basis_sha256] = adapter.load_basis()


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
