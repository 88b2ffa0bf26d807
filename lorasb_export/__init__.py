"""LoRA-SB adapters: one frozen basis (B, A) for a base model, a small matrix R for every task.

The names below load on first use, so that importing this package is cheap.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import environment

if TYPE_CHECKING:
    from .adapter import Adapter
    from .basis import Basis
    from .calibration.calibrate import calibrate
    from .export import export
    from .merging.merge import merge
    from .publishing.hub import push
    from .serve import serve
    from .training.fit import fit

__all__ = ["Adapter", "Basis", "calibrate", "export", "fit", "merge", "push", "serve"]

_HOMES = {
    "Adapter": "adapter",
    "Basis": "basis",
    "calibrate": "calibration.calibrate",
    "export": "export",
    "fit": "training.fit",
    "merge": "merging.merge",
    "push": "publishing.hub",
    "serve": "serve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


class _Package(ModuleType):
    """Keeps `lorasb_export.merge` the function after the module of the same name was imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
environment.hide_before_transformers()
