"""Which tensors a merged folder has, of which dtype, and in which shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..base.model import BaseModel
from ..choices import SEQ_CLS
from ..errors import SettingsError
from ..files.storage import DTYPE_BYTES, TensorInfo
from ..tensors import TORCH_DTYPES

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged folder and what it is made from."""

    name: str
    dtype: str  # as it will be stored
    shape: tuple[int, ...]
    source: tuple[Path, TensorInfo] | None  # file and header entry of its bytes; None for a trained head
    module: str | None = None  # the module whose update is added, or None: copied or converted

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def parse_size(size: str | int) -> int:
    """`"5GB"` → 5,000,000,000. Raises SettingsError."""
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("", 1)):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.isascii() and number.isdecimal():
            return int(number) * factor
    raise SettingsError(f"size {size!r} is not a whole number with KB, MB or GB", fix="For instance 5GB")


def planned_tensors(adapters: Sequence[Adapter], base: BaseModel, dtype: str) -> list[PlannedTensor]:
    """Those of the base, and of the head that the first adapter may have, stored in `dtype`.

    `auto` is the base's own; what holds no floating-point numbers stays as it is in any case.
    """
    by_key = {base.weight_key(name): name for adapter in adapters for name in adapter.R}
    adapter = adapters[0]  # the only one that may have a head
    name = next(iter(adapter.R))
    in_network, _, inner = name.partition(".")
    in_files = base.weight_key(name).removesuffix(f"{inner}.weight")  # before the names of the body's tensors
    body = (in_files or f"{in_network}.") if adapter.task_type == SEQ_CLS else ""
    # What tensor names lack in a body-only checkpoint that becomes a classifier, whose names carry it.
    prefix = "" if in_files else body
    tensors = []
    for name, source in base.tensors.items():
        info = source[1]
        stored = _NAMES[dtype] if dtype != "auto" and info.dtype in TORCH_DTYPES else info.dtype
        renamed = name if name.startswith(prefix) else prefix + name
        if renamed not in adapter.head and renamed.startswith(body):  # vLLM refuses the heads of pretraining
            tensors.append(PlannedTensor(renamed, stored, info.shape, source, by_key.get(name)))
    of_body = base.tensors[next(iter(by_key))][1].dtype
    stored = of_body if dtype == "auto" else _NAMES[dtype]
    return tensors + [PlannedTensor(name, stored, tuple(tensor.shape), None) for name, tensor in adapter.head.items()]


def split_into_shards(tensors: Iterable[PlannedTensor], limit: int) -> Iterator[tuple[PlannedTensor, ...]]:
    """In their order, each of at most `limit` bytes, or of one tensor."""
    shard: list[PlannedTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.nbytes > limit:
            yield tuple(shard)
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.nbytes
    yield tuple(shard)
