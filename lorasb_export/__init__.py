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
    from .base import BaseModel
    from .basis import Basis
    from .calibration.calibrate import calibrate
    from .data import load_task, task_of
    from .errors import LoraSBError
    from .evaluation import evaluate
    from .export import export
    from .inference import answers
    from .merging.merge import merge
    from .publishing.hub import push
    from .serve import running_server, serve
    from .settings import CalibrationSettings, FitSettings
    from .stack import Stack
    from .training.fit import fit, fit_together

__all__ = [
    "Adapter",
    "BaseModel",
    "Basis",
    "CalibrationSettings",
    "FitSettings",
    "LoraSBError",
    "Stack",
    "answers",
    "calibrate",
    "evaluate",
    "export",
    "fit",
    "fit_together",
    "load_task",
    "merge",
    "push",
    "running_server",
    "serve",
    "task_of",
]

_HOMES = {
    "Adapter": "adapter",
    "BaseModel": "base",
    "Basis": "basis",
    "CalibrationSettings": "settings",
    "FitSettings": "settings",
    "LoraSBError": "errors",
    "Stack": "stack",
    "answers": "inference",
    "calibrate": "calibration.calibrate",
    "evaluate": "evaluation",
    "export": "export",
    "fit": "training.fit",
    "fit_together": "training.fit",
    "load_task": "data",
    "merge": "merging.merge",
    "push": "publishing.hub",
    "running_server": "serve",
    "serve": "serve",
    "task_of": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps `lorasb_export.merge` the function after the module of the same name was imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
environment.hide_before_transformers()
