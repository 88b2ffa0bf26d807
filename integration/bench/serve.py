"""How fast does vLLM answer with every request on its own adapter? Peers: the bare base, and stock vLLM LoRA, folded.

SmolLM2-135M, r = 64, all seven linears, bf16, eager, one thread for each engine; tokens per CPU-second, engines in
alternation. Stock LoRA gets the same adapters and its list of modules; few files serve under many ids.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lorasb_export import environment
from lorasb_export.artifact import Adapter
from lorasb_export.base import BaseModel
from lorasb_export.export.peft import write_folded
from lorasb_export.quickstart.model import small_model
from lorasb_export.serve.shared import BASIS_VARIABLE
from tests.random_adapter import save_adapter

FILES, RANK = 4, 64
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Child:
    """An engine in a process of its own; it waits on its stdin while another is timed."""

    def __init__(self, base: Path, folders: list[Path], ids: int, tokens: int, basis: Path | None = None) -> None:
        command = [sys.executable, "-m", "integration.bench.serve_engine", str(base), str(ids), str(tokens)]
        variables = environment.child_environment(**VARIABLES, **({BASIS_VARIABLE: str(basis)} if basis else {}))
        self.process = subprocess.Popen(
            [*command, *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
        )
        self.report: dict[str, float] = self._answer()

    def steps(self, rows: int, prompt: int, count: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": rows, "prompt": prompt, "count": count}) + "\n")
        self.process.stdin.flush()
        times: list[float] = self._answer()
        return times

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def write_adapters(base: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """Random adapters on one basis (in the first folder), and the same folded."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    first = save_adapter(base, model, folder / "0", modules, rank=RANK, relative_size=0.15)
    for number in range(1, FILES):
        R = {name: matrix.roll(number, 0) for name, matrix in first.R.items()}
        Adapter(first.base, first.basis_sha256, str(folder / "0"), R, first.scaling).save(folder / str(number))
    ours = [folder / str(number) for number in range(FILES)]
    folded = [folder / f"folded-{number}" for number in range(FILES)]
    for source, target in zip(ours, folded, strict=True):
        target.mkdir()
        write_folded(Adapter.load(source), target)
    return ours, folded


def run(*, quick: bool) -> dict[str, Any]:
    base = BaseModel.resolve(small_model()).folder
    resident, rounds = (32, 2) if quick else (1000, 6)
    children: dict[str, Child] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, folded = write_adapters(base, Path(folder))
        try:
            children["base"] = Child(base, [], 0, 512)
            children["stock"] = Child(base, folded, 32, 128)
            children["shared"] = Child(base, ours, resident, 512, basis=ours[0])
            return measure(children, rounds) | {"adapters_resident": resident}
        finally:
            for child in children.values():
                child.stop()


def measure(children: dict[str, Child], rounds: int) -> dict[str, Any]:
    steps: dict[tuple[str, int], list[float]] = {}  # (engine, rows) → seconds of decode steps
    prompts: dict[tuple[str, int], list[float]] = {}  # (engine, prompts of 128 tokens) → seconds of reading them
    for counted in [False] + [True] * rounds:
        for name, child in children.items():
            for rows in (16, 32):
                times = child.steps(rows, 3, 4 if name == "stock" else 24)[1:]
                steps.setdefault((name, rows), []).extend(times if counted else [])
            for rows in (1, 4) if name != "stock" else ():
                times = child.steps(rows, 128, 1)[:1]
                prompts.setdefault((name, rows), []).extend(times if counted else [])
    speed = {key: key[1] / statistics.median(times) for key, times in steps.items()}
    read = {key: statistics.median(times) for key, times in prompts.items()}
    print(f"{'tokens per CPU-second':24} {'16 rows':>9} {'32 rows':>9}")
    for name in children:
        print(f"{name:24} {speed[name, 16]:9.1f} {speed[name, 32]:9.1f}")
    report = children["shared"].report
    return {
        **{f"tok_s_{name}_b16": round(speed[engine, 16], 1) for engine, name in KEYS.items()},
        **{f"tok_s_{name}": round(speed[engine, 32], 1) for engine, name in KEYS.items()},
        "ratio_vs_stock": round(speed["shared", 32] / speed["stock", 32], 2),
        "ratio_vs_base": round(speed["shared", 32] / speed["base", 32], 3),
        "ratio_vs_stock_b16": round(speed["shared", 16] / speed["stock", 16], 2),
        "ratio_vs_base_b16": round(speed["shared", 16] / speed["base", 16], 3),
        "prefill_ratio_vs_base": round(read["base", 4] / read["shared", 4], 3),
        "ttft_ratio_vs_base": round(read["shared", 1] / read["base", 1], 3),
        "bytes_per_adapter": round(report["bytes_per_adapter"]),
        "r_bytes": 210 * RANK * RANK * 2,
        "load_ms": round(report["load_ms"], 2),
    }


KEYS = {"base": "base", "stock": "stock_lora", "shared": "shared"}  # engine → its name in the result
