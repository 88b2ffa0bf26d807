"""Merging against `cp -r` + fsync and against PEFT, on a generated bf16 checkpoint of Llama's shape; and kills.

The checkpoint (8 GB in shards of 5 GB; --quick: 0.2 GB) holds random weights and lies in a temporary folder while this
runs. Peak memory is the resident set of a child process, the interpreter and torch included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.exporting.export import export
from lorasb_export.merging.retained import Retained

from .checkpoint import make_checkpoint
from .measure import alternate_calls, print_table, ratio

# Not ru_maxrss, which a child starts with at its parent's. `wchar` counts what is written, in whatever way.
_REPORT = """
import json
status, io = (dict(line.split(":") for line in open(f"/proc/self/{name}")) for name in ("status", "io"))
peak, written = int(status["VmHWM"].split()[0]) // 1024, int(io["wchar"])
print(json.dumps({"peak_rss_mb": peak, "written": written, "result": result}))
"""
_COPY = """
import os, shutil, sys
shutil.rmtree(sys.argv[2], ignore_errors=True)
os.system(f"cp -r '{sys.argv[1]}' '{sys.argv[2]}'")
for name in os.listdir(sys.argv[2]):
    handle = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY); os.fsync(handle); os.close(handle)
result = None
"""
_MERGE = """
import sys
from lorasb_export import merge
result = merge(sys.argv[1], sys.argv[2], overwrite=True, max_shard_size=sys.argv[3], verify=len(sys.argv) > 4)
"""
_PEFT = """
import os, shutil, sys
import lorasb_export
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
shutil.rmtree(sys.argv[3], ignore_errors=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size=sys.argv[4])
for name in os.listdir(sys.argv[3]):
    handle = os.open(os.path.join(sys.argv[3], name), os.O_RDONLY); os.fsync(handle); os.close(handle)
result = None
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, help="size of the checkpoint (8; --quick: 0.2)")
    parser.add_argument("--kills", type=int, help="how often to kill a merge (100; --quick: 2)")


def run(*, quick: bool, gb: float | None = None, kills: int | None = None) -> dict[str, object]:
    """Make the checkpoint, time, count bits, double it, kill."""
    size = gb or (0.2 if quick else 8)
    with tempfile.TemporaryDirectory(prefix="lorasb-bench-") as name:
        return _run(Path(name), size, rounds=1 if quick else 3, kills=(2 if quick else 100) if kills is None else kills)


def _run(folder: Path, gb: float, rounds: int, kills: int) -> dict[str, object]:
    shard = min(5000, int(gb * 600))
    base, adapter = make_checkpoint(folder, gb, shard)
    export(folder / "adapter", folder / "peft", format="peft")
    size = sum(path.stat().st_size for path in base.iterdir())
    merge = _command(_MERGE, folder / "adapter", folder / "merged", f"{shard}MB")
    commands = {
        "cp -r + fsync": _command(_COPY, base, folder / "copied"),
        "lorasb merge": merge,
        "PEFT merge": _command(_PEFT, base, folder / "peft", folder / "by-peft", f"{shard}MB"),
    }
    reports: dict[str, dict[str, Any]] = {}
    times = alternate_calls({name: partial(_call, c, name, reports) for name, c in commands.items()}, rounds)
    print_table(times)
    for name in ("copied", "by-peft"):
        shutil.rmtree(folder / name)
    written = sum(path.stat().st_size for path in (folder / "merged").iterdir())
    result = {
        "checkpoint_gb": round(size / 1e9, 2),
        "seconds_cp": round(statistics.median(times["cp -r + fsync"]), 2),
        "seconds": round(statistics.median(times["lorasb merge"]), 2),
        "seconds_ratio_cp": ratio(times["lorasb merge"], times["cp -r + fsync"]),
        "seconds_ratio_peft": ratio(times["lorasb merge"], times["PEFT merge"]),
        "peak_rss_mb": reports["lorasb merge"]["peak_rss_mb"],
        "peft_peak_rss_mb": reports["PEFT merge"]["peak_rss_mb"],
        "largest_touched_fp32_mb": 4 * max(map(math.prod, _shapes(base, adapter))) // 2**20,
        "bytes_written_ratio": round(written / size, 4),
        **_exactness(base, adapter, folder / "merged", sample=2 if gb < 1 else 8),
        **_kill(merge, folder / "merged", size, min(times["lorasb merge"]), kills),
        **_verify([*merge, "verify"]),
    }
    for path in folder.iterdir():
        shutil.rmtree(path)
    make_checkpoint(folder, 2 * gb, shard)
    return result | {"peak_rss_mb_at_twice_the_size": _call(merge)["peak_rss_mb"]}


def _command(script: str, *words: object) -> list[str]:
    return [sys.executable, "-c", script + _REPORT, *map(str, words)]


def _call(command: list[str], name: str = "", reports: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the child says of itself; kept under `name` in `reports`."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if reports is not None:
        reports[name] = report
    return report


def _verify(command: list[str]) -> dict[str, object]:
    report = _call(command)
    found = report["result"]["verify"]
    return {
        "verify_peak_rss_mb": report["peak_rss_mb"],
        "verify_relative_difference": found["relative_difference"],
        "verify_streamed": found["streamed"],
    }


def _shapes(base: Path, adapter: Adapter) -> list[tuple[int, ...]]:
    found = BaseModel.resolve(base)
    return [found.tensors[found.weight_key(name)][1].shape for name in adapter.R]


def _exactness(base: Path, adapter: Adapter, merged: Path, sample: int) -> dict[str, float]:
    """Some modules against float64, rounded once by integer arithmetic of its own."""
    before, after = BaseModel.resolve(base).tensors, BaseModel.resolve(merged).tensors
    equal = entries = worst = 0
    kept = Retained()
    for name in random.Random(0).sample(sorted(adapter.R), sample):
        old, new = (_tensor(found[f"{name}.weight"][0], f"{name}.weight") for found in (before, after))
        factors = adapter.load_basis().modules[name]
        B, A = factors.B.double(), factors.A.double()
        delta = adapter.scaling * B @ adapter.R[name].double() @ A
        exact = _rounded_to_bf16(old.double() + delta)
        steps = (_ordered(exact) - _ordered(new)).abs()
        equal, entries, worst = equal + int((steps == 0).sum()), entries + steps.numel(), max(worst, int(steps.max()))
        error = new.double() - old.double() - delta
        kept += Retained(float(delta.square().sum()), float(error.square().sum()), float((error * delta).sum()))
    said = json.loads((merged / "lorasb.json").read_text())["retained"]
    return {
        "exact_fraction": round(equal / entries, 7),
        "worst_ulps": worst,
        "retained_cosine": round(kept.cosine, 5),
        "retained_cosine_said": round(said["cosine"], 5),
    }


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _rounded_to_bf16(values: torch.Tensor) -> torch.Tensor:
    """Float64 → bf16, to nearest even in one step (torch goes by way of fp32)."""
    bits = values.numpy().view(np.uint64)
    kept = bits >> np.uint64(45)  # 7 of the 52 bits of the mantissa
    rest = bits & np.uint64((1 << 45) - 1)
    half = np.uint64(1 << 44)
    kept = kept + ((rest > half) | ((rest == half) & (kept & np.uint64(1) == 1))).astype(np.uint64)
    return torch.from_numpy((kept << np.uint64(45)).view(np.float64).copy()).bfloat16()


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """bf16 as integers whose difference counts ulps."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _kill(command: list[str], merged: Path, size: int, seconds: float, kills: int) -> dict[str, object]:
    """SIGKILL at random moments, each time until a restart is left alone; every end must have the same bytes."""
    expected = _digests(merged)
    rng = random.Random(0)
    recovered, restarts = 0, []  # of restarts that found finished shards: the share of the bytes they wrote
    for _ in range(kills):
        shutil.rmtree(merged)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, seconds))
        child.send_signal(signal.SIGKILL)
        child.wait()
        whole_or_absent = not merged.exists() or _digests(merged) == expected
        report = _call(command)
        if report["result"]["shards_reused"]:
            restarts.append(report["written"] / size)
        left = [path for path in merged.parent.iterdir() if path.name.startswith(".")]
        recovered += whole_or_absent and _digests(merged) == expected and not left
    return {
        "kills": kills,
        "kills_recovered": recovered,
        "kills_with_finished_shards": len(restarts),
        "bytes_written_ratio_after_these": round(max(restarts), 4) if restarts else None,
    }


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
