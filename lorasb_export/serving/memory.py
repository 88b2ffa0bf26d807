"""How much memory adapters take in vLLM, for a dry run."""

from __future__ import annotations

from collections import Counter

from ..base.model import BaseModel
from ..basis import Basis
from .modes import Folded, Mode, Shared, max_rank, suffixes
from .shared import runs_on_cpu

# What vLLM computes as one layer, with room for an adapter of each.
_PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def memory_of(mode: Mode, number_bytes: int, base: BaseModel) -> dict[str, int]:
    """In bytes, but for `slots`, where vLLM computes in numbers of `number_bytes`."""
    return _of_folded(mode, number_bytes, base) if isinstance(mode, Folded) else _of_shared(mode, number_bytes, base)


def _of_folded(mode: Folded, number_bytes: int, base: BaseModel) -> dict[str, int]:
    """In vLLM's `slots` (of each process at most), in its copies in host memory, and folded on disk."""
    if not mode.adapters:
        return {"slots": 0, "slots_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
    # A slot has room for every layer of these names, wherever it is, and for all of what vLLM has packed into one.
    of_adapters = suffixes(mode.adapters)
    names = of_adapters.union(*(group for group in _PACKED if of_adapters & set(group)))
    width = sum(
        sum(info.shape)
        for key, (_, info) in base.tensors.items()
        if key.endswith(".weight") and key.split(".")[-2] in names and ".experts." not in key
    )
    slot = number_bytes * max_rank(mode.adapters) * width
    return {
        "slots": mode.slots,
        "slots_bytes": mode.slots * slot,
        "host_bytes": number_bytes * mode.numbers * min(mode.on_host, len(mode.adapters)) // len(mode.adapters),
        "disk_bytes": mode.disk_bytes,
    }


def _of_shared(mode: Shared, number_bytes: int, base: BaseModel) -> dict[str, int]:
    """B and A; R of one adapter; the slots, one of which is the base's and stays zero; copies in host memory and on
    the disk, where there are such.
    """
    adapter = next(iter(mode.adapters.values()))
    basis = adapter.load_basis()
    one = number_bytes * len(basis.modules) * basis.rank**2
    factors = 0 if basis.is_blocks else basis.rank * _basis_width(basis, base)
    copies = {"host_bytes": one * mode.on_host, "disk_bytes": mode.disk_bytes}
    return {
        "slots": mode.slots,
        "slots_bytes": one * (mode.slots + 1),
        "basis_bytes": number_bytes * factors,
        "bytes_per_adapter": one,
        **{name: size for name, size in copies.items() if size},
    }


def _basis_width(basis: Basis, base: BaseModel) -> int:
    """For one row of A and one column of B of every module: how many numbers `shared.layers` holds.

    On a CPU the parts of what vLLM has packed into one layer are one B, zero where a part meets another's rows.
    """
    width = sum(columns for _, columns in basis.shapes.values())
    if not runs_on_cpu():
        return width + sum(rows for rows, _ in basis.shapes.values())
    layers: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for name in basis.shapes:
        parent, _, leaf = name.rpartition(".")
        layers[parent, next((group for group in _PACKED if leaf in group), (leaf,))] += 1
    for (parent, group), parts in layers.items():
        keys = (base.tensor_key(f"{parent}.{leaf}.weight") for leaf in group)
        axis = 1 if base.stores_transposed else 0
        width += parts * sum(base.tensors[key][1].shape[axis] for key in keys if key is not None)
    return width
