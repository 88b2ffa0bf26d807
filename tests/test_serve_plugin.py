"""When the plugin does something in vLLM, and when nothing."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from lorasb_export.serving import shared
from lorasb_export.serving.shared import plugin


def test_the_plugin_is_inert_without_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shared.BASIS_VARIABLE, raising=False)
    monkeypatch.delenv(shared.FOLDED_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of vLLM would raise
    plugin.register()


@pytest.mark.parametrize(("version", "mended"), [("0.32.0", True), ("0.33.0", True), ("0.34.0", False)])
def test_of_a_folded_server_only_the_metrics_are_mended(
    version: str, mended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client")
    from lorasb_export.serving.shared.gauge import LatestGauge

    monkeypatch.setenv(shared.BASIS_VARIABLE, "")
    monkeypatch.setenv(shared.FOLDED_VARIABLE, "1")
    logger = SimpleNamespace(_gauge_cls=None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))  # without a module of LoRA
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.loggers", SimpleNamespace(PrometheusStatLogger=logger))
    plugin.register()
    assert logger._gauge_cls is (LatestGauge if mended else None)


def test_a_vllm_that_was_not_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "version", {"vllm": "0.99.1+cpu"}.__getitem__)
    assert "vLLM 0.99.1 is not one of the tested versions (0.32.0, 0.33.0)" in str(shared.why_unavailable())

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(shared, "version", missing)
    assert shared.why_unavailable() == "vLLM is not installed"
