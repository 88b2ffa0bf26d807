"""Adapters in other formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..choices import MAX_DROP, ExportFormat, require_choice
from ..data.source import AnySource
from ..data.task import TaskData
from ..errors import SettingsError, require_path


def export(
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    format: str,
    base: str | Path | None = None,
    precision: str = "fp32",
    routed: bool = False,
    verify: bool | None = None,
    data: Mapping[str, AnySource | TaskData] | None = None,
    max_drop: float = MAX_DROP,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write adapters in another format.

    Args:
        adapters: one adapter, a folder or a Hub id; for `onnx-adapters` any number that share a basis.
        format: `peft` (a stock LoRA folder), `onnx` (a merged graph) or `onnx-adapters` (one graph and a small
            file per task).
        base: the base model, where it is not where the adapter says.
        precision: of an ONNX graph: fp32, fp16, bf16, int8 or int4.
        routed: for `onnx-adapters`, every task's R in the graph, chosen row by row of a batch.
        verify: compare with the adapter in torch. An ONNX graph (by default), of many adapters the first 32; but not
            bf16, which runs on CUDA alone. fp32 fails where greedy answers, or a classifier's logits, differ; any
            precision where none agrees. The logits of PEFT (not by default: it needs PEFT, and the base in fp32).
        data: an adapter's name (the last part of its path) → its task (loaded, or as `evaluate` takes it), on whose
            held-out rows an ONNX graph is compared too.
        max_drop: points of 100 of its metric that the graph may lose there.

    The format `peft` uses only `base`, `verify` and `overwrite`.

    Returns:
        of `peft` `out`, its `rank`, the number of `modules`, the `bytes` of the weights and what `verify` found; of a
        graph what its `lorasb.json` records, `out` and `bytes`.

    Raises:
        SettingsError: an unknown format or precision; several adapters for a format that takes one;
            `data` lacks the adapter's name; of `onnx-adapters`, it has one that is none's.
        ArtifactError: an adapter or its basis is bad, they do not share one, or `verify` failed.
        DataError: `data` cannot be read, or is of another task type than its adapter.
        BaseModelError: another base, or one of an architecture that is not exported.
        MissingPackageError: a package of the extra is not installed.
        OutputError: `out` exists, holds what it is made from, or the disk is too full.
        ServerError: the exporter failed.
    """
    paths = list(adapters) if isinstance(adapters, Iterable) and not isinstance(adapters, str) else [adapters]
    for path in paths:
        require_path("an adapter", path, "Save it, and give its folder")
    require_choice("format", format, ExportFormat)
    if routed and format != "onnx-adapters":
        raise SettingsError("routed is for the format onnx-adapters", fix="Leave it out, or export that format")
    if len(paths) != 1 and format != "onnx-adapters":
        raise SettingsError(f"format {format} takes one adapter, {len(paths)} were given", fix="Export them one by one")
    if format == "peft":
        from .peft import export_peft

        return export_peft(paths[0], out, base=base, verify=bool(verify), overwrite=overwrite)
    options: dict[str, Any] = {"base": base, "precision": precision, "max_drop": max_drop, "overwrite": overwrite}
    options["verify"] = verify is not False
    options["data"] = data or {}
    if format == "onnx":
        from .onnx import export_onnx

        return export_onnx(paths[0], out, **options)
    from .onnx_adapters import export_onnx_adapters

    return export_onnx_adapters(paths, out, routed=routed, **options)
