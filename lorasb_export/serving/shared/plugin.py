"""The entry point: vLLM calls `register` in every process it starts."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from . import BASIS_VARIABLE, FOLDED_VARIABLE, TESTED_VERSIONS


def register() -> None:
    """Put our LoRA manager in the place of vLLM's, if this server was started for a shared basis; of a folded one only
    the metrics are mended. Called more than once it does the same again.

    Raises:
        RuntimeError: this vLLM is not one the shared basis was tested with.
    """
    shares = bool(os.environ.get(BASIS_VARIABLE))
    if not shares and not os.environ.get(FOLDED_VARIABLE):
        return
    import vllm

    found = vllm.__version__.partition("+")[0]
    if found in TESTED_VERSIONS:
        _keep_metrics_small()
    elif shares:
        raise RuntimeError(
            f"lorasb: the shared basis was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {found}. "
            "Use `lorasb serve --mode folded`"
        )
    if shares:
        _share_basis()


def _keep_metrics_small() -> None:
    """Replace the class of vLLM's gauges."""
    from .gauge import LatestGauge

    metrics: Any = import_module("vllm.v1.metrics.loggers")
    metrics.PrometheusStatLogger._gauge_cls = LatestGauge


def _share_basis() -> None:
    """Replace the name in one module by which all of vLLM's model runners make their LoRA manager, and what makes two
    requests for an adapter equal.
    """
    from .manager import SharedWorkerManager

    runners: Any = import_module("vllm.v1.worker.lora_model_runner_mixin")
    runners.LRUCacheWorkerLoRAManager = SharedWorkerManager
    # vLLM compares names, and collects the adapters of a step in a set: of two versions of one name, one running still
    # and one new, it would have only one in its slots, and stop with an error at the other.
    request: Any = import_module("vllm.lora.request").LoRARequest
    request.__eq__ = lambda self, other: isinstance(other, request) and self.lora_int_id == other.lora_int_id
    request.__hash__ = lambda self: hash(self.lora_int_id)
