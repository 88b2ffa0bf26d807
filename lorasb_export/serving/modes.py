"""How vLLM holds the adapters: each folded into a LoRA of its own, or all on one basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ..adapter import Adapter
from ..exporting.peft import write_folded
from ..files.kind import ADAPTER_FILES, BASIS_FILES
from ..files.output import cannot_write, require_room
from ..hub.fetch import resolve_folder
from .copies import copied
from .shared import BASE_VARIABLE, BASIS_VARIABLE, FOLDED_VARIABLE, UPDATES_VARIABLE, VERSIONS_VARIABLE, runs_on_cpu
from .shared.loading import version_name

_UPDATES = f"{__package__}.shared.updates.Updates"
_VERSIONS = "updates"  # in the temporary folder: what was loaded since the start
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
    def numbers(self) -> int:
        """How many there are in A and s·B·R of all adapters."""
        return sum(a.rank * sum(shape) for a in self.adapters.values() for shape in a.load_basis().shapes.values())

    @property
    def disk_bytes(self) -> int:
        """What `write` writes."""
        return 4 * self.numbers

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
            flags += ["--max-cpu-loras", str(self.on_host)]
        return flags

    @property
    def on_host(self) -> int:
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
    def on_host(self) -> int:
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
                self._versions[name] = copied(self.adapters[name], source, name, path, links=links)

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

    def _paths(self, folder: Path) -> dict[str, Path]:
        """Name → what the server reads; where clients replace adapters, among what is removed once it is not used."""
        parent = folder if self.updates_from is None else folder / _VERSIONS
        return {name: parent / version for name, version in self._versions.items()}

    @cached_property  # asked once: the folders may be replaced
    def _versions(self) -> dict[str, str]:
        return {name: version_name(name, a.folder) for name, a in self.adapters.items() if a.folder is not None}


Mode = Folded | Shared  # how a server holds its adapters


def suffixes(adapters: Mapping[str, Adapter]) -> set[str]:
    """The last parts of their modules' names."""
    return {name.rpartition(".")[2] for adapter in adapters.values() for name in adapter.R}


def max_rank(adapters: Mapping[str, Adapter]) -> int:
    """The smallest rank vLLM knows that holds every adapter's."""
    rank = max(adapter.rank for adapter in adapters.values())
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _lora_flags(adapters: Mapping[str, Adapter], slots: int, paths: Mapping[str, Path]) -> list[str]:
    # Without the list of modules vLLM also sets aside room for an adapter of the embedding, per slot.
    return [
        *("--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(max_rank(adapters))),
        *("--lora-target-modules", *sorted(suffixes(adapters))),
        *("--lora-modules", *(f"{name}={path}" for name, path in paths.items())),
    ]
