"""W0 + s·B·R·A as a plain model folder: plan from headers, validate, then write one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from . import card
from .artifact import Adapter
from .base import SEQ_CLS, BaseModel
from .errors import ArtifactError, SettingsError
from .storage import DTYPE_BYTES, TensorInfo, atomic_folder, refuse_existing, require_room, write_json
from .verify import compare_logits

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_COPY_BLOCK = 16 << 20
_MARGIN_BYTES = 32 << 20  # side files, the card, and what a file system keeps for itself
# Never copied from the base: weights in any format, its card, and provenance of another run.
_NOT_SIDE_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".md", ".pkl"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged folder and what it is made from."""

    name: str
    info: TensorInfo  # as it will be stored; offsets are those of its source
    file: Path | None  # where the source bytes are; None for a trained head
    source: TensorInfo | None
    module: str | None = None  # the module whose update is added, or None: copied or converted
    head: str | None = None  # the adapter's head tensor that takes its place

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.info.dtype] * math.prod(self.info.shape)


@dataclass(frozen=True)
class MergePlan:
    """Everything `merge` will do, known from headers and configs alone."""

    adapter: Adapter
    base: BaseModel
    shards: tuple[tuple[PlannedTensor, ...], ...]
    dtype: str
    side_files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    @property
    def touched(self) -> int:
        return sum(tensor.module is not None for shard in self.shards for tensor in shard)

    def shard_names(self) -> list[str]:
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def summary(self) -> dict[str, Any]:
        return {
            "base": self.base.name_or_path,
            "adapter": str(self.adapter.folder),
            "dtype": self.dtype,
            "modules": self.touched,
            "tensors": sum(map(len, self.shards)),
            "shards": len(self.shards),
            "bytes": self.nbytes,
        }


def merge(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write `out`, a plain model folder with s·B·R·A added to every target of the base.

    The sum is made in fp32 and rounded once to the stored dtype. Other tensors are copied byte for byte (or
    converted, when `dtype` asks for it), and so are tokenizer, chat template and generation files. Besides the
    basis, memory holds one tensor at a time.

    Args:
        base: the base model, where it is not where the adapter says.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        max_shard_size: bytes, or a number with KB, MB or GB.
        verify: compare the logits of base + adapter with those of the merged folder; fails above a tolerance.
        dry_run: return the plan; write nothing.

    Raises:
        BaseModelError: another base, an already merged or a quantized one, a missing module.
        OutputError: `out` exists, or the disk has too little room.
        ArtifactError: the adapter or its basis is bad, or `verify` failed.
    """
    started = time.monotonic()
    out = Path(out)
    refuse_existing(out, overwrite)
    plan = plan_merge(adapter, base=base, dtype=dtype, max_shard_size=max_shard_size)
    require_room(out, plan.nbytes + _MARGIN_BYTES)
    result = plan.summary() | {"out": str(out)}
    if dry_run:
        return result
    with atomic_folder(out, overwrite=overwrite) as temporary:
        _apply(plan, temporary)
        if verify:
            result["verify"] = compare_logits(plan.base, plan.adapter, temporary)
    return result | {"seconds": round(time.monotonic() - started, 2)}


def plan_merge(
    adapter: str | Path | Adapter, *, base: str | Path | None, dtype: str, max_shard_size: str | int
) -> MergePlan:
    """Match every module of the adapter to a tensor of the base, and lay out the shards. Reads headers only.

    Raises: see `merge`.
    """
    if dtype != "auto" and dtype not in _NAMES:
        raise SettingsError(f"dtype is {dtype!r}", fix=f"Use auto, {', '.join(_NAMES)}")
    adapter = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    model = adapter.base.resolve(base)
    model.verify(adapter.base, adapter.R)
    modules = adapter.load_basis().modules
    by_key = {model.weight_key(name): name for name in adapter.R}
    prefix = _body_prefix(model, adapter)
    tensors = []
    for name, (file, info) in model.tensors.items():
        module = by_key.get(name)
        if module is not None:
            shape = (modules[module].B.shape[0], modules[module].A.shape[1])
            if model.stores_transposed:
                shape = shape[::-1]
            if info.shape != shape or info.dtype not in TORCH_DTYPES:
                raise ArtifactError(
                    f"tensor {name} is {info.dtype} {list(info.shape)}, the basis was made for {list(shape)}",
                    where=file,
                )
        stored = replace(info, dtype=_NAMES[dtype]) if dtype != "auto" and info.dtype in TORCH_DTYPES else info
        renamed = name if name.startswith(prefix) else prefix + name
        tensors.append(PlannedTensor(renamed, stored, file, info, module))
    tensors = [tensor for tensor in tensors if tensor.name not in adapter.head]
    for name, tensor in adapter.head.items():
        stored_dtype = _NAMES[dtype] if dtype != "auto" else tensors[0].info.dtype
        tensors.append(PlannedTensor(name, TensorInfo(stored_dtype, tuple(tensor.shape), 0, 0), None, None, head=name))
    side_files = tuple(
        path
        for path in sorted(model.folder.iterdir())
        if path.is_file()
        and path.suffix not in _NOT_SIDE_FILES
        and not path.name.startswith(".")
        and path.name not in ("config.json", "lorasb.json", "model.safetensors.index.json")
    )
    shards = tuple(_split(tensors, parse_size(max_shard_size)))
    return MergePlan(adapter, model, shards, dtype, side_files)


def parse_size(size: str | int) -> int:
    """`"5GB"` → 5,000,000,000. Raises SettingsError."""
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("", 1)):
        if text.endswith(unit) and text[: len(text) - len(unit)].strip().isdigit():
            return int(text[: len(text) - len(unit)]) * factor
    raise SettingsError(f"size {size!r} is not a number with KB, MB or GB", fix="For instance 5GB")


def _body_prefix(model: BaseModel, adapter: Adapter) -> str:
    """What tensor names lack in a body-only checkpoint that becomes a classifier, whose names carry it."""
    name = next(iter(adapter.R))
    if adapter.task_type == SEQ_CLS and model.weight_key(name) != f"{name}.weight":
        return name.partition(".")[0] + "."
    return ""


def _split(tensors: list[PlannedTensor], limit: int) -> Iterator[tuple[PlannedTensor, ...]]:
    shard: list[PlannedTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.nbytes > limit:
            yield tuple(shard)
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.nbytes
    yield tuple(shard)


def _apply(plan: MergePlan, folder: Path) -> None:
    names = plan.shard_names()
    with tqdm(total=plan.nbytes, desc="merge", unit="B", unit_scale=True, disable=None) as bar:
        for name, shard in zip(names, plan.shards, strict=True):
            _write_shard(folder / name, shard, plan, bar)
    if len(names) > 1:
        weight_map = {t.name: name for name, shard in zip(names, plan.shards, strict=True) for t in shard}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map},
        )
    for path in plan.side_files:
        shutil.copyfile(path, folder / path.name)
    _write_config(plan, folder)
    provenance = {"kind": "merged", **plan.adapter.provenance(), "dtype": plan.dtype}
    write_json(folder / "lorasb.json", provenance)
    card.write(folder, card.merged_card(provenance))


def _write_shard(path: Path, shard: tuple[PlannedTensor, ...], plan: MergePlan, bar: Any) -> None:
    """One safetensors file, streamed: header first, then each tensor's bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.info.dtype,
            "shape": list(tensor.info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            if tensor.file is not None and tensor.module is None and tensor.info == tensor.source:
                _copy_range(tensor.file, tensor.info, out)
            else:
                out.write(_compute(tensor, plan).numpy().data)
            bar.update(tensor.nbytes)


def _copy_range(file: Path, info: TensorInfo, out: BinaryIO) -> None:
    with file.open("rb") as source:
        source.seek(info.start)
        left = info.nbytes
        while left:
            block = source.read(min(left, _COPY_BLOCK))
            out.write(block)
            left -= len(block)


def _compute(tensor: PlannedTensor, plan: MergePlan) -> torch.Tensor:
    """The tensor's new bytes (uint8): its source in fp32, plus s·B·R·A, rounded once."""
    if tensor.head is not None:
        value = plan.adapter.head[tensor.head]
    else:
        assert tensor.file is not None
        assert tensor.source is not None
        with tensor.file.open("rb") as file:
            file.seek(tensor.source.start)
            raw = bytearray(file.read(tensor.source.nbytes))
        value = torch.frombuffer(raw, dtype=TORCH_DTYPES[tensor.source.dtype]).view(tensor.source.shape)
        if tensor.module is not None:
            left, A = plan.adapter.delta(tensor.module)
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            target = value.T if plan.base.stores_transposed else value
            target.addmm_(left.to(value.dtype), A.to(value.dtype))
    return value.to(TORCH_DTYPES[tensor.info.dtype]).contiguous().view(-1).view(torch.uint8)


def _write_config(plan: MergePlan, folder: Path) -> None:
    """config.json, byte for byte unless the dtype or the task changes it."""
    if plan.dtype == "auto" and plan.adapter.task_type != SEQ_CLS:
        shutil.copyfile(plan.base.folder / "config.json", folder / "config.json")
        return
    config: dict[str, Any] = dict(plan.base.config)
    if plan.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.dtype
    if plan.adapter.task_type == SEQ_CLS:
        config |= plan.base.classifier_config(plan.adapter.labels)
    write_json(folder / "config.json", config)
