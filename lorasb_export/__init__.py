"""LoRA-SB adapters: one frozen basis (B, A) for a base model, a small matrix R for every task.

The names below load on first use, so that importing this package is cheap.
"""

from __future__ import annotations

from importlib import import_module
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
    from .exporting.export import export
    from .exporting.onnx_run import OnnxDecoder
    from .inference import answers
    from .merging.merge import merge
    from .publishing.hub import push
    from .serving.launcher import running_server, serve
    from .settings import CalibrationSettings, FitSettings
    from .stack import Stack
    from .task_source import TaskSource
    from .training.fit import fit, fit_together

__all__ = [
    "Adapter",
    "BaseModel",
    "Basis",
    "CalibrationSettings",
    "FitSettings",
    "LoraSBError",
    "OnnxDecoder",
    "Stack",
    "TaskSource",
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
    "OnnxDecoder": "exporting.onnx_run",
    "Stack": "stack",
    "TaskSource": "task_source",
    "answers": "inference",
    "calibrate": "calibration.calibrate",
    "evaluate": "evaluation",
    "export": "exporting.export",
    "fit": "training.fit",
    "fit_together": "training.fit",
    "load_task": "data",
    "merge": "merging.merge",
    "push": "publishing.hub",
    "running_server": "serving.launcher",
    "serve": "serving.launcher",
    "task_of": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


environment.hide_before_transformers()
