"""The base's weights as NF4 holds them: those that an adapter of `fit --dtype nf4` was trained beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..base.device import where_there_is_room
from ..base.model import BaseModel
from ..base.nf4 import packed_modules, rounded
from ..choices import NF4
from ..errors import BaseModelError
from ..files.storage import TensorInfo
from ..tensors import read_tensor

Source = tuple[Path, TensorInfo]  # file and header entry of a tensor


@dataclass(frozen=True)
class Rounding:
    """Which tensors of the checkpoint are rounded before anything is added to them; none by default.

    Attributes:
        base_dtype: `auto` or `nf4`; see `merge`.
        sources: each with the dtype it has before it is packed and after.
        transposed: they lie as (in, out).
    """

    base_dtype: str = "auto"
    sources: Mapping[Source, torch.dtype] = field(default_factory=dict)
    transposed: bool = False

    @classmethod
    def of(cls, base: BaseModel, base_dtype: str, task_type: str, num_labels: int | None) -> Rounding:
        """Those that `base.load` packs for dtype nf4, from config and headers alone.

        Raises:
            BaseModelError: the checkpoint does not hold these weights one by one under their modules' names.
            MissingPackageError, SettingsError: see `nf4.quantization`.
        """
        if base_dtype != NF4:
            return NOT_ROUNDED
        empty = base.load_empty(task_type, dtype="auto", num_labels=num_labels)
        dtype, sources = empty.dtype, {}
        for module in packed_modules(empty):
            key = base.tensor_key(f"{module}.weight")
            if key is None:
                what = f"the checkpoint holds the weight of {module} in another form: it cannot be rounded to four bits"
                raise BaseModelError(what, where=base.folder, fix="Merge without --base-dtype nf4")
            sources[base.tensors[key]] = dtype
        return cls(NF4, sources, base.stores_transposed)

    def read(self, file: Path, info: TensorInfo) -> torch.Tensor:
        """A tensor of the checkpoint, on the host: rounded, or as it is where it is none of `sources`."""
        value, dtype = read_tensor(file, info), self.sources.get((file, info))
        if dtype is None:
            return value

        def on(device: torch.device) -> torch.Tensor:
            there = value.to(device, dtype)
            return (rounded(there.T).T if self.transposed else rounded(there)).cpu().contiguous()

        return where_there_is_room(on, "round a weight to four bits")


NOT_ROUNDED = Rounding()
