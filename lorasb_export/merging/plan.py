"""What a merge will do, from headers and configs alone, and everything that stands against it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

from ..adapter import Adapter
from ..base.model import AnyBase, BaseModel
from ..base.network import as_base_model_error
from ..base.side_files import side_files
from ..base.tokenizer import tokenizer_of
from ..basis import Basis
from ..cards import card
from ..choices import SEQ_CLS, Dtype, MergedOnto, require_choice
from ..errors import ArtifactError, Problems
from ..files.output import refuse_existing, refuse_own_input, require_room
from ..files.storage import DTYPE_BYTES, TensorInfo
from ..other_base import warn_of_another_template, warn_of_other_weights
from ..provenance import adapter_provenance
from ..tensors import TORCH_DTYPES, read_tensor
from . import retained
from .combine import Weighted, Weights, combine, combined_record, load_weighted
from .folder import bytes_of_an_earlier_try
from .layout import PlannedTensor, parse_size, planned_tensors, split_into_shards
from .rounding import Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARGIN_BYTES = 32 << 20  # side files, the card, and what a file system keeps for itself
_PYTHON_BYTES = 240 << 20  # measured: the interpreter with torch
_THREAD_BYTES = 40 << 20  # `write.PIECE` entries as read and as written, `sums.BLOCK` at every stage between
_TOKENIZER_BYTES = 14  # measured: for each byte of tokenizer.json
_ROUNDING_BYTES = 17  # measured: for each entry of the tensor that is rounded
_MAX_WORKERS = 8
_SAMPLE = 2048  # weights of each target that the expected Δ is judged by


@dataclass(frozen=True)
class MergePlan:
    """Everything `merge` will do: for every module the sum of its adapters' updates, rounded once.

    Attributes:
        adapters: one for each basis; the bases stay on the disk (`Basis.open`).
        combined: of a combination, what `lorasb.json` says of each adapter in it.
        tokenizer: the base's; None of a decoder without one.
    """

    adapters: tuple[Adapter, ...]
    base: BaseModel
    shards: tuple[tuple[PlannedTensor, ...], ...]
    dtype: str
    side_files: list[Path]
    combined: list[dict[str, Any]]
    rounding: Rounding
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    @property
    def touched(self) -> list[PlannedTensor]:
        return [tensor for shard in self.shards for tensor in shard if tensor.module is not None]

    def shard_names(self) -> list[str]:
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def identity(self) -> str:
        """sha256 of all that decides the bytes of the shards: what an interrupted merge may be resumed by.

        A base file counts by name, size and time of change, and its targets by their fingerprint.
        """
        files = sorted({tensor.source[0] for shard in self.shards for tensor in shard if tensor.source is not None})
        stats = [path.stat() for path in files]
        parts = [
            [adapter_provenance(adapter) for adapter in self.adapters],
            self.dtype,
            self.rounding.base_dtype,
            [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True)],
            self.base.fingerprint({name for adapter in self.adapters for name in adapter.R}),
            [[(t.name, t.dtype, t.shape, t.module) for t in shard] for shard in self.shards],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        folder = self.adapters[0].folder if len(self.adapters) == 1 else None  # of several that were combined, none
        return {
            "base": self.base.name_or_path,
            "adapter": folder and str(folder),
            "dtype": self.dtype,
            "base_dtype": self.rounding.base_dtype,
            "stored": sorted({tensor.dtype for tensor in self.touched}),
            "modules": len(self.touched),
            "tensors": sum(map(len, self.shards)),
            "shards": len(self.shards),
            "bytes": self.nbytes,
        }

    def peak_memory(self) -> int:
        """An estimate in bytes: Python with torch, the tokenizer, the factors of two modules, every thread's blocks."""
        tokenizer = sum(path.stat().st_size for path in self.side_files if path.name == "tokenizer.json")
        rank = sum(adapter.rank for adapter in self.adapters)
        factors = max((12 * rank * sum(tensor.shape) for tensor in self.touched), default=0)
        rounded = max((_ROUNDING_BYTES * math.prod(info.shape) for _, info in self.rounding.sources), default=0)
        kept = _PYTHON_BYTES + _TOKENIZER_BYTES * tokenizer
        return kept + 2 * factors + rounded + worker_count() * _THREAD_BYTES

    def expected_retained(self) -> dict[str, Any]:
        """How much of Δ the stored dtype will keep: a guess from some weights of every target and ‖Δ‖ = s·‖R‖."""
        found = {}
        for tensor in self.touched:
            assert tensor.module is not None
            assert tensor.source is not None
            file, info = tensor.source
            entries = math.prod(info.shape)
            start = info.start + DTYPE_BYTES[info.dtype] * (entries // 2)
            taken = min(_SAMPLE, entries - entries // 2)
            sample = read_tensor(file, TensorInfo(info.dtype, (taken,), start, start + taken * DTYPE_BYTES[info.dtype]))
            parts = [a for a in self.adapters if tensor.module in a.R]
            norm = math.hypot(*(a.scaling * float(a.R[tensor.module].norm()) for a in parts))  # as if orthogonal
            if all(a.load_basis().is_blocks for a in parts):
                entries = max(a.rank for a in parts) ** 2  # those that change
            guess = retained.expected(sample, norm / math.sqrt(entries), TORCH_DTYPES[tensor.dtype])
            found[tensor.module] = guess * (entries / taken)
        return retained.summary(found)


def worker_count() -> int:
    """Twice as many threads as torch would use, for half of them wait for the disk."""
    return min(2 * torch.get_num_threads(), _MAX_WORKERS)


def plan_merge(
    adapter: str | Path | Adapter | Weights | Weighted,
    out: Path,
    *,
    base: AnyBase | None,
    base_dtype: str,
    dtype: str,
    max_shard_size: str | int,
    overwrite: bool,
) -> MergePlan:
    """Match every module of the adapter to a tensor of the base, lay out the shards, look for room.

    Reads headers, the adapter, a few pages of every target, the basis once to verify its hash, and the tokenizer.

    Raises: see `merge`.
    """
    problems = Problems()
    limit, base_model = 0, None
    loaded: tuple[Adapter, ...] = ()
    combined: list[dict[str, Any]] = []
    weighted: Weighted = ()
    with problems:
        refuse_existing(out, overwrite, kind="merged")
        card.check(out)
    with problems:
        require_choice("dtype", dtype, Dtype)
    with problems:
        require_choice("base_dtype", base_dtype, MergedOnto)
    with problems:
        limit = parse_size(max_shard_size)
    with problems:
        weighted = load_weighted(adapter)
        if isinstance(adapter, str | Path | Adapter):
            loaded = (weighted[0][0],)
        else:
            loaded, combined = combine(weighted), combined_record(weighted)
        base_model = loaded[0].base.resolve(base)
        for one, _ in weighted:
            refuse_own_input(out, one.folder, one.basis_source)
    if base_model is None:
        problems.raise_all("nothing was written")
    assert base_model is not None
    # Of all that are combined: blocks of another base may have the same sha256.
    for one in {(one.base, frozenset(one.R)): one for one, _ in weighted}.values():
        _check_modules(one, base_model, problems)
    problems.raise_all("nothing was written")
    with problems:
        loaded = tuple(replace(a, basis=a.basis or Basis.open(a.find_basis())) for a in loaded)
        for one in loaded:
            _check_shapes(one, base_model, one.load_basis().shapes, problems)
    problems.raise_all("nothing was written")
    every = [one for one, _ in weighted]
    warn_of_another_template(every, base_model.folder)
    warn_of_other_weights(every, base_dtype, combined=bool(combined))
    rounding = Rounding.of(base_model, base_dtype, loaded[0].task_type, loaded[0].num_labels)
    shards = tuple(split_into_shards(planned_tensors(loaded, base_model, dtype), limit))
    beside = [
        path for path in side_files(base_model.folder) if loaded[0].task_type != SEQ_CLS or not _embeds(path.name)
    ]
    tokenizer = _tokenizer(base_model, loaded[0].task_type)
    plan = MergePlan(loaded, base_model, shards, dtype, beside, combined, rounding, tokenizer)
    require_room(out, plan.nbytes + _MARGIN_BYTES - bytes_of_an_earlier_try(out))
    return plan


def _tokenizer(base: BaseModel, task_type: str) -> PreTrainedTokenizerBase | None:
    """What names a classifier's padding, or the end of a decoder's answers; None of a decoder without one.

    Raises BaseModelError where it is damaged, or a classifier has none: now, and not after the last shard.
    """
    if task_type == SEQ_CLS:
        return base.tokenizer
    is_fast = (base.folder / "tokenizer.json").is_file()  # AutoTokenizer's import takes seconds and 200 MB
    if not is_fast and not (base.folder / "tokenizer_config.json").is_file():
        return None
    with as_base_model_error(base.folder):
        return PreTrainedTokenizerFast.from_pretrained(base.folder) if is_fast else tokenizer_of(base.folder)


def _check_modules(adapter: Adapter, base: BaseModel, problems: Problems) -> None:
    """That the base has every module, and is the one the adapter was trained on."""
    before = len(problems.found)
    for name in adapter.R:
        with problems:
            base.weight_key(name)
    if len(problems.found) == before:
        with problems:
            base.verify(adapter.base, adapter.R)


def _check_shapes(adapter: Adapter, base: BaseModel, shapes: Mapping[str, tuple[int, int]], problems: Problems) -> None:
    for module in adapter.R:
        name = base.weight_key(module)
        file, info = base.tensors[name]
        shape = shapes[module][::-1] if base.stores_transposed else shapes[module]
        if info.shape != shape or info.dtype not in TORCH_DTYPES:
            with problems:
                raise ArtifactError(
                    f"tensor {name} is {info.dtype} {list(info.shape)}, the basis was made for {list(shape)}",
                    where=file,
                    fix="Use the base model of this basis",
                )


def _embeds(name: str) -> bool:
    """Whether a file says how sentence-transformers embeds; a classifier does not, yet vLLM takes a limit from it."""
    return name == "modules.json" or "sentence_" in name
