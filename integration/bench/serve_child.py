"""The bench of serving: its engines, as processes, and its adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from integration import child_environment
from lorasb_export.adapter import Adapter
from lorasb_export.exporting.peft import write_folded
from lorasb_export.layers.targets import find_targets
from lorasb_export.serving.shared import BASIS_VARIABLE
from lorasb_export.settings import ALL_LINEAR, RANDOM
from tests.random_adapter import save_adapter

FILES = 4
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",  # as `lorasb serve` sets it; here for the peers too
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Child:
    """An engine in a process of its own; it waits on its stdin while another is timed."""

    def __init__(
        self, base: Path, folders: list[Path], ids: int = 0, basis: Path | None = None, **options: Any
    ) -> None:
        command = [sys.executable, "-m", "integration.bench.serve_engine", str(base), str(ids), json.dumps(options)]
        variables = child_environment(**VARIABLES, **({BASIS_VARIABLE: str(basis)} if basis else {}))
        self.process = subprocess.Popen(
            [*command, *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
        )
        self.report: dict[str, float] = self._answer()

    def call(self, name: str, **arguments: Any) -> Any:
        """What `serve_engine.Engine`'s method returns."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # it ends, and its workers with it
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def write_adapters(
    base: Path, folder: Path, rank: int, directions: str = RANDOM, targets: str = ALL_LINEAR
) -> list[Path]:
    """Random adapters on one basis (in the first folder)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = list(find_targets(model, targets))
    options = {"rank": rank, "relative_size": 0.15, "directions": directions}
    first = save_adapter(base, model, folder / "0", modules, **options)
    for number in range(1, FILES):
        R = {name: matrix.roll(number, 0) for name, matrix in first.R.items()}
        Adapter(first.base, first.basis_sha256, str(folder / "0"), R, first.scaling).save(folder / str(number))
    return [folder / str(number) for number in range(FILES)]


def fold(adapters: list[Path]) -> list[Path]:
    """The same as ordinary LoRAs."""
    folded = [source.with_name(f"folded-{source.name}") for source in adapters]
    for source, target in zip(adapters, folded, strict=True):
        target.mkdir()
        write_folded(Adapter.load(source), target)
    return folded
