"""One of vLLM's metrics, kept from growing with every mixture of adapters."""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import Gauge


class LatestGauge(Gauge):
    """`vllm:lora_requests_info` has the names of the adapters that run as a label, and vLLM keeps every value it ever
    had: with many adapters one more for nearly every step. Here a new one replaces the one before.
    """

    def labels(self, *values: Any, **labels: Any) -> Any:
        if "running_lora_adapters" in labels and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self.clear()
        return super().labels(*values, **labels)
