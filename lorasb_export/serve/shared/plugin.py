"""The entry point: vLLM calls `register` in every process it starts."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from . import BASIS_VARIABLE, TESTED_VERSIONS


def register() -> None:
    """Put our LoRA manager in the place of vLLM's, if this server was started for a shared basis.

    One name in one module is replaced, by which all of vLLM's model runners make their LoRA manager, and the class of
    its gauges. Called more than once it does the same again.

    Raises:
        RuntimeError: this vLLM is not one the plugin was tested with.
    """
    if not os.environ.get(BASIS_VARIABLE):
        return
    import vllm

    found = vllm.__version__.partition("+")[0]
    if found not in TESTED_VERSIONS:
        raise RuntimeError(
            f"lorasb: the shared basis was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {found}. "
            "Use `lorasb serve --mode folded`"
        )

    from .gauge import LatestGauge
    from .manager import SharedWorkerManager

    runners: Any = import_module("vllm.v1.worker.lora_model_runner_mixin")
    runners.LRUCacheWorkerLoRAManager = SharedWorkerManager
    metrics: Any = import_module("vllm.v1.metrics.loggers")
    metrics.PrometheusStatLogger._gauge_cls = LatestGauge
