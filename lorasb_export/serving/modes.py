"""How vLLM holds the adapters: each folded into a LoRA of its own, or all on one basis."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ..adapter import Adapter
from ..base.model import BaseModel
from ..basis import Basis
from ..errors import ArtifactError
from ..exporting.peft import write_folded
from ..files.output import cannot_write, require_room
from ..hub.fetch import ADAPTER_FILES, BASIS_FILES, resolve_folder
from .shared import BASE_VARIABLE, BASIS_VARIABLE, FOLDED_VARIABLE, UPDATES_VARIABLE, VERSIONS_VARIABLE, runs_on_cpu
from .shared.loading import copy_adapter, link_adapter, version_name

_UPDATES = f"{__package__}.shared.updates.Updates"
_PAUSE = 0.1  # seconds before an adapter that is being replaced is copied again
_VERSIONS = "updates"  # in the temporary folder: what was loaded since the start
# What vLLM computes as one layer, with room for an adapter of each.
_PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ROOM = 32  # slots for adapters that come while the server runs; beyond that the least recently used make way
_MAX_ON_HOST = 64  # folded ones; every process of a tensor-parallel server holds as many
_MAX_SLOTS = 16  # folded, on an accelerator: a slot takes hundreds of MiB beside the weights of a large model
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Folded:
    """Each adapter as an ordinary LoRA: A, and s·B·R. Stock vLLM, any mixture of bases and ranks.

    `max_loras` is what the user gives vLLM by that flag, or None.
    """

    adapters: Mapping[str, Adapter]
    max_loras: int | None = None
    name: ClassVar[str] = "folded"

    @property
    def slots(self) -> int:
        if self.max_loras is not None:
            return self.max_loras
        if runs_on_cpu():
            # The CPU kernel of vLLM 0.32 reads "no adapter" (-1) as the last slot, so requests for the base would get
            # whatever adapter lies there. One slot that is never filled holds zeros and makes them right.
            return len(self.adapters) + 1
        return min(len(self.adapters), _MAX_SLOTS)

    @property
    def _numbers(self) -> int:
        """How many there are in A and s·B·R of all adapters."""
        return sum(a.rank * sum(shape) for a in self.adapters.values() for shape in a.load_basis().shapes.values())

    @property
    def disk_bytes(self) -> int:
        """What `write` writes."""
        return 4 * self._numbers

    def require_room(self, folder: Path) -> None:
        """Raise OutputError where `write` would find too little."""
        fix = "Serve fewer, or set TMPDIR to a larger disk; --mode shared, where it can be, needs none of this"
        require_room(folder, self.disk_bytes, fix)

    def write(self, folder: Path) -> None:
        self.require_room(folder)
        with cannot_write(folder, "Set TMPDIR to a larger disk"):
            for name, adapter in self.adapters.items():
                (folder / name).mkdir()
                write_folded(adapter, folder / name)

    def flags(self, folder: str | Path) -> list[str]:
        if not self.adapters:
            return []
        paths = {name: Path(folder) / name for name in self.adapters}
        flags = _lora_flags(self.adapters, self.slots, paths)
        if self.slots < len(self.adapters):  # without the flag vLLM would hold as many as have a slot
            flags += ["--max-cpu-loras", str(self._on_host)]
        return flags

    @property
    def _on_host(self) -> int:
        """How many vLLM holds in host memory, those with a slot too; it reads others again when they are asked for."""
        return max(self.slots, min(len(self.adapters), _MAX_ON_HOST))

    @property
    def advice(self) -> str:
        """What else to try where vLLM does not start, a sentence or ""."""
        if runs_on_cpu() or self.slots < 2:
            return ""
        fewer = f"-- --max-loras {self.slots // 2}"
        return f"Where the GPU's memory is full: each of the {self.slots} slots takes some, try {fewer}. "

    def environment(self, folder: str | Path) -> dict[str, str]:
        # A value exported for another server would switch the plugin on.
        return {BASIS_VARIABLE: "", FOLDED_VARIABLE: "1"}

    def memory(self, number_bytes: int, base: BaseModel) -> dict[str, int]:
        """In vLLM's `slots` (of each process at most), in its copies in host memory, and folded on disk."""
        if not self.adapters:
            return {"slots": 0, "slots_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
        # A slot has room for every layer of these names, wherever it is, and for all of what vLLM has packed into one.
        of_adapters = _suffixes(self.adapters)
        names = of_adapters.union(*(group for group in _PACKED if of_adapters & set(group)))
        width = sum(
            sum(info.shape)
            for key, (_, info) in base.tensors.items()
            if key.endswith(".weight") and key.split(".")[-2] in names and ".experts." not in key
        )
        slot = number_bytes * _max_rank(self.adapters) * width
        return {
            "slots": self.slots,
            "slots_bytes": self.slots * slot,
            "host_bytes": number_bytes * self._numbers * min(self._on_host, len(self.adapters)) // len(self.adapters),
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True)
class Shared:
    """B and A once, and the R of each adapter: the plugin in `shared`. All adapters are of one basis.

    `updates_from` is the folder clients may load further adapters from, or None; `max_loras` as in `Folded`, and
    `max_cpu_loras` likewise. `engines`: vLLM's --data-parallel-size; of several, an idle one drops its adapters and
    reloads them. `base`: the folder of the base they are served on.
    """

    adapters: Mapping[str, Adapter]
    updates_from: Path | None = None
    max_loras: int | None = None
    max_cpu_loras: int | None = None
    engines: str = "1"
    base: Path | None = None
    name: ClassVar[str] = "shared"

    @property
    def slots(self) -> int:
        if self.max_loras is not None:
            return self.max_loras
        return len(self.adapters) + (_ROOM if self.updates_from is not None else 0)

    @property
    def reads_again(self) -> bool:
        """Whether adapters make way for others, and are read anew when they are asked for."""
        held = max(self.slots, self.max_cpu_loras or 0)  # vLLM's host cache also counts those in slots
        return self.updates_from is not None or self.engines != "1" or held < len(self.adapters)

    @property
    def disk_bytes(self) -> int:
        """What `write` writes: copies, where adapters are read again."""
        folders = [a.folder for a in self.adapters.values() if a.folder is not None] if self.reads_again else []
        return sum((folder / file).stat().st_size for folder in folders for file in ADAPTER_FILES)

    @property
    def _on_host(self) -> int:
        """How many vLLM holds in host memory at most: none where there is a slot for each that it holds at all."""
        if self.max_cpu_loras is None or self.max_cpu_loras <= self.slots:
            return 0
        return self.max_cpu_loras if self.updates_from is not None else min(self.max_cpu_loras, len(self.adapters))

    def require_room(self, folder: Path) -> None:
        """Raise OutputError where `write` would find too little."""
        require_room(folder, self.disk_bytes, "Serve fewer, or set TMPDIR to a larger disk")

    def write(self, folder: Path) -> None:
        self.require_room(folder)
        with cannot_write(folder, "Set TMPDIR to a larger disk"):
            if self.updates_from is not None:
                (folder / _VERSIONS).mkdir()
            for name, path in self._paths(folder).items():
                source = self.adapters[name].folder
                assert source is not None
                # What is trained anew or removed later is served as it was.
                links = not self.reads_again
                self._versions[name] = _copied(self.adapters[name], source, name, path, links=links)

    def flags(self, folder: str | Path) -> list[str]:
        """Asked after `write`, which may have found another version of an adapter."""
        flags = _lora_flags(self.adapters, self.slots, self._paths(Path(folder)))
        return flags if self.updates_from is None else [*flags, "--middleware", _UPDATES]

    @property
    def advice(self) -> str:
        """As of `Folded`."""
        return "Fix that, or try --mode folded. " if self.updates_from is None else ""

    def environment(self, folder: str | Path) -> dict[str, str]:
        basis, _ = resolve_folder(next(iter(self.adapters.values())).find_basis(), BASIS_FILES)
        variables = {BASIS_VARIABLE: str(basis)}
        if self.updates_from is not None:
            variables |= {UPDATES_VARIABLE: str(self.updates_from.absolute())}
            variables |= {VERSIONS_VARIABLE: str(Path(folder, _VERSIONS)), BASE_VARIABLE: str(self.base)}
        return variables

    def memory(self, number_bytes: int, base: BaseModel) -> dict[str, int]:
        """B and A; R of one adapter; the slots, one of which is the base's and stays zero; copies in host memory and on
        the disk, where there are such.
        """
        adapter = next(iter(self.adapters.values()))
        basis = adapter.load_basis()
        one = number_bytes * len(basis.modules) * basis.rank**2
        factors = 0 if basis.is_blocks else basis.rank * _basis_width(basis, base)
        copies = {"host_bytes": one * self._on_host, "disk_bytes": self.disk_bytes}
        return {
            "slots": self.slots,
            "slots_bytes": one * (self.slots + 1),
            "basis_bytes": number_bytes * factors,
            "bytes_per_adapter": one,
            **{name: size for name, size in copies.items() if size},
        }

    def _paths(self, folder: Path) -> dict[str, Path]:
        """Name → what the server reads; where clients replace adapters, among what is removed once it is not used."""
        parent = folder if self.updates_from is None else folder / _VERSIONS
        return {name: parent / version for name, version in self._versions.items()}

    @cached_property  # asked once: the folders may be replaced
    def _versions(self) -> dict[str, str]:
        return {name: version_name(name, a.folder) for name, a in self.adapters.items() if a.folder is not None}


def _copied(adapter: Adapter, source: Path, name: str, path: Path, *, links: bool) -> str:
    """Copy the adapter in `source` to `path`, or beside it, or link it there, and return the name of its version.

    One that was replaced since it was checked, as by a fit of every night, is taken as it is now.

    Raises:
        ArtifactError: it cannot be read, or was replaced by one that is no adapter, or of another base or basis.
    """
    for tries_left in (2, 1, 0):
        try:
            (link_adapter if links else copy_adapter)(source, path)
            version = version_name(name, path)
            if version != path.name:
                if not _may_replace(adapter, path):
                    raise ArtifactError("the adapter was replaced meanwhile", where=source, fix="Start again")
                path.rename(path.with_name(version))
            break
        except ArtifactError:  # begun between two renames, say: a folder is replaced by moving the old one away first
            if not tries_left:
                raise
            shutil.rmtree(path, ignore_errors=True)
            time.sleep(_PAUSE)
    return version


def _may_replace(adapter: Adapter, copy: Path) -> bool:
    """Whether `copy` is a whole adapter, and all that was checked of `adapter` holds for it."""
    try:
        new = Adapter.load(copy)
    except ArtifactError:  # the tensors of one, and the config of the next
        return False
    old_one, new_one = (
        (one.task_type, one.basis_sha256, one.base.fingerprint, one.rank, one.R.keys()) for one in (adapter, new)
    )
    return old_one == new_one


Mode = Folded | Shared  # how a server holds its adapters


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


def _suffixes(adapters: Mapping[str, Adapter]) -> set[str]:
    return {name.rpartition(".")[2] for adapter in adapters.values() for name in adapter.R}


def _max_rank(adapters: Mapping[str, Adapter]) -> int:
    """The smallest rank vLLM knows that holds every adapter's."""
    rank = max(adapter.rank for adapter in adapters.values())
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _lora_flags(adapters: Mapping[str, Adapter], slots: int, paths: Mapping[str, Path]) -> list[str]:
    # Without the list of modules vLLM also sets aside room for an adapter of the embedding, per slot.
    return [
        *("--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(_max_rank(adapters))),
        *("--lora-target-modules", *sorted(_suffixes(adapters))),
        *("--lora-modules", *(f"{name}={path}" for name, path in paths.items())),
    ]
