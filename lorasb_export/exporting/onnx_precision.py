"""The precisions of an ONNX graph, and what each of them needs."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from ..environment import require_packages
from ..errors import SettingsError
from ..files.storage import DTYPE_BYTES

if TYPE_CHECKING:
    from ..base.model import BaseModel


class GraphPrecision(NamedTuple):
    """One precision.

    Attributes:
        provider: what the graph is for.
        dtype: of the model in torch, before the graph's weights are quantized.
        room: bytes a parameter on the disk; int8 and int4 are made from fp32 first.
        bits: to which the weights are quantized, where they are.
    """

    provider: str
    dtype: str
    room: float
    bits: int | None = None


PRECISIONS = {
    "fp32": GraphPrecision("cpu", "float32", 4.0),
    "int8": GraphPrecision("cpu", "float32", 6.0, bits=8),
    "int4": GraphPrecision("cpu", "float32", 5.0, bits=4),
    "fp16": GraphPrecision("cuda", "float16", 2.0),
    "bf16": GraphPrecision("cuda", "bfloat16", 2.0),
}


def check_request(precision: str, allowed: Collection[str]) -> None:
    """Refuse an unknown precision, and a machine without the ONNX packages, before any work is done."""
    if precision not in allowed:
        raise SettingsError(f"precision {precision!r} is unknown here", fix=f"Choose one of {', '.join(allowed)}")
    require_packages("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai")


def parameters(base: BaseModel) -> int:
    """How many numbers the base's files hold."""
    return sum(info.nbytes // DTYPE_BYTES[info.dtype] for _, info in base.tensors.values())
