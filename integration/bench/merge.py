"""Merging against `cp -r` + fsync and against PEFT, on a generated bf16 checkpoint of Llama's shape; and kills.

The checkpoint (8 GB in shards of 5 GB; --quick: 0.5 GB) holds random weights and lies in a temporary folder while this
runs. Peak memory is the resident set of a child process, the interpreter and torch included.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from lorasb_export import environment
from lorasb_export.artifact import Adapter, Basis
from lorasb_export.base import BaseModel
from lorasb_export.export import export
from lorasb_export.format import ModuleBasis
from lorasb_export.retained import Retained

from .measure import alternate, print_table, ratio

RANK = 64
_RELATIVE_SIZE = 0.02  # ‖Δ‖ / ‖W0‖ of every module

# Not ru_maxrss, which a child starts with at its parent's.
_PEAK = "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
_COPY = """
import os, shutil, sys
shutil.rmtree(sys.argv[2], ignore_errors=True)
os.system(f"cp -r '{sys.argv[1]}' '{sys.argv[2]}'")
for name in os.listdir(sys.argv[2]):
    handle = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY); os.fsync(handle); os.close(handle)
"""
_MERGE = """
import sys
from lorasb_export import merge
merge(sys.argv[1], sys.argv[2], overwrite=True, max_shard_size=sys.argv[3])
"""
_PEFT = """
import os, shutil, sys
import lorasb_export.environment as e; e.hide_broken_packages()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
shutil.rmtree(sys.argv[3], ignore_errors=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size=sys.argv[4])
for name in os.listdir(sys.argv[3]):
    handle = os.open(os.path.join(sys.argv[3], name), os.O_RDONLY); os.fsync(handle); os.close(handle)
"""


def run(*, quick: bool) -> dict[str, object]:
    """Make the checkpoint, time, count bits, kill."""
    with tempfile.TemporaryDirectory(prefix="lorasb-bench-") as name:
        return _run(Path(name), quick)


def _run(folder: Path, quick: bool) -> dict[str, object]:
    shard = "200MB" if quick else "5GB"
    base = _make_base(folder / "base", quick, shard)
    adapter = _make_adapter(base, folder / "adapter")
    export(folder / "adapter", folder / "peft", format="peft")
    size = sum(path.stat().st_size for path in base.iterdir())
    python = [sys.executable, "-c"]
    merge = [*python, _MERGE + _PEAK, str(folder / "adapter"), str(folder / "merged"), shard]
    commands = {
        "cp -r + fsync": [*python, _COPY, str(base), str(folder / "copied")],
        "lorasb merge": merge,
        "PEFT merge": [*python, _PEFT, str(base), str(folder / "peft"), str(folder / "by-peft"), shard],
    }
    times = alternate(commands, 1 if quick else 3)
    print_table(times)
    shutil.rmtree(folder / "copied")
    shutil.rmtree(folder / "by-peft")
    written = sum(path.stat().st_size for path in (folder / "merged").iterdir())
    result = {
        "checkpoint_gb": round(size / 1e9, 2),
        "seconds_cp": round(min(times["cp -r + fsync"]), 2),
        "seconds": round(min(times["lorasb merge"]), 2),
        "seconds_ratio_cp": ratio(times["lorasb merge"], times["cp -r + fsync"]),
        "seconds_ratio_peft": ratio(times["lorasb merge"], times["PEFT merge"]),
        "peak_rss_mb": _peak(merge),
        "peft_peak_rss_mb": _peak([*commands["PEFT merge"][:2], _PEFT + _PEAK, *commands["PEFT merge"][3:]]),
        "bytes_written_ratio": round(written / size, 4),
        **_exactness(base, adapter, folder / "merged", sample=2 if quick else 8),
    }
    shutil.rmtree(folder / "by-peft")
    seconds = times["lorasb merge"][0]
    return result | _kill(merge, folder / "merged", seconds, kills=3 if quick else 20)


def _make_base(folder: Path, quick: bool, shard: str) -> Path:
    environment.hide_broken_packages()
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (1024, 12) if quick else (4096, 17)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()  # drawn once: 4e9 draws take a minute
    for number, parameter in enumerate(model.parameters()):
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block.roll(number * 7919 + start // len(block))[: len(part)])
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def _make_adapter(base: Path, folder: Path) -> Adapter:
    found = BaseModel.resolve(base)
    names = [name.removesuffix(".weight") for name in found.tensors if "_proj" in name]
    generator = torch.Generator().manual_seed(1)
    modules, R = {}, {}
    for name in names:
        rows, columns = found.tensors[f"{name}.weight"][1].shape
        B = torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0]
        A = torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous()
        modules[name] = ModuleBasis(B.bfloat16(), A.bfloat16(), torch.ones(RANK))
        R[name] = torch.randn(RANK, RANK, generator=generator) / RANK
        R[name] *= _RELATIVE_SIZE * 0.02 * (rows * columns) ** 0.5 / float(R[name].norm())
    basis = Basis(found.ref(names), RANK, modules, {"samples": 0})
    adapter = Adapter(basis.base, basis.sha256, None, R, basis=basis)
    adapter.save(folder)
    return adapter


def _peak(command: list[str]) -> int:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) // 1024


def _exactness(base: Path, adapter: Adapter, merged: Path, sample: int) -> dict[str, float]:
    """Some modules against float64, rounded once by integer arithmetic of its own."""
    before, after = BaseModel.resolve(base).tensors, BaseModel.resolve(merged).tensors
    equal = entries = worst = 0
    kept = Retained()
    for name in random.Random(0).sample(sorted(adapter.R), sample):
        old, new = (_tensor(found[f"{name}.weight"][0], f"{name}.weight") for found in (before, after))
        B, A, _ = (part.double() for part in adapter.load_basis().modules[name])
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


def _kill(command: list[str], merged: Path, seconds: float, kills: int) -> dict[str, object]:
    """SIGKILL at random moments, each time until a restart is left alone; every end must have the same bytes."""
    expected = _digests(merged)
    rng = random.Random(0)
    recovered = reused = 0
    for _ in range(kills):
        shutil.rmtree(merged)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, seconds))
        child.send_signal(signal.SIGKILL)
        child.wait()
        whole_or_absent = not merged.exists() or _digests(merged) == expected
        marks = list((merged.parent / f".{merged.name}.merge").glob(".*.safetensors.json"))
        reused += bool(marks)
        subprocess.run(command, check=True, capture_output=True)
        left = [path for path in merged.parent.iterdir() if path.name.startswith(".")]
        recovered += whole_or_absent and _digests(merged) == expected and not left
    return {"kills": kills, "kills_recovered": recovered, "kills_with_finished_shards": reused}


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
