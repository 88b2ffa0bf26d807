"""LoRA-SB adapters: one frozen basis (B, A) for a base model, a small matrix R for every task.

The names below load on first use, so that importing this package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import environment

__version__: str

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .base.model import BaseModel as BaseModel
    from .basis import Basis as Basis
    from .calibration.calibrate import calibrate as calibrate
    from .data.source import TaskSource as TaskSource
    from .data.task import TaskData as TaskData
    from .data.task import load_task as load_task
    from .data.task import task_of as task_of
    from .errors import LoraSBError as LoraSBError
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.inference import answers as answers
    from .exporting.export import export as export
    from .exporting.onnx_run import OnnxDecoder as OnnxDecoder
    from .exporting.onnx_run import classify as classify
    from .inspection import inspect_folder as inspect_folder
    from .layers.factors import ModuleBasis as ModuleBasis
    from .layers.inject import remove as remove
    from .merging.combine import combine_into as combine_into
    from .merging.merge import merge as merge
    from .publishing.push import push as push
    from .serving.launcher import running_server as running_server
    from .serving.launcher import serve as serve
    from .serving.server import RunningServer as RunningServer
    from .settings import CalibrationSettings as CalibrationSettings
    from .settings import FitSettings as FitSettings
    from .stack import Stack as Stack
    from .training.fit import fit as fit
    from .training.fit import fit_together as fit_together
    from .training.inspect import inspect_data as inspect_data
    from .training.muon import Muon as Muon
    from .training.muon import groups_of as groups_of

_HOMES = {
    "Adapter": "adapter",
    "BaseModel": "base.model",
    "Basis": "basis",
    "CalibrationSettings": "settings",
    "FitSettings": "settings",
    "LoraSBError": "errors",
    "ModuleBasis": "layers.factors",
    "Muon": "training.muon",
    "OnnxDecoder": "exporting.onnx_run",
    "RunningServer": "serving.server",
    "Stack": "stack",
    "TaskData": "data.task",
    "TaskSource": "data.source",
    "answers": "evaluation.inference",
    "calibrate": "calibration.calibrate",
    "classify": "exporting.onnx_run",
    "combine_into": "merging.combine",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "fit": "training.fit",
    "fit_together": "training.fit",
    "groups_of": "training.muon",
    "inspect_data": "training.inspect",
    "inspect_folder": "inspection",
    "load_task": "data.task",
    "merge": "merging.merge",
    "push": "publishing.push",
    "remove": "layers.inject",
    "running_server": "serving.launcher",
    "serve": "serving.launcher",
    "task_of": "data.task",
}
__all__ = list(_HOMES)


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("lorasb")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


environment.hide_before_transformers()
