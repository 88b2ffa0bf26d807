"""ONNX exports of SmolLM2-135M against torch eager, two threads each: parity, speed, sizes, memory, what int4 loses.

The task is the quickstart's `dates`, calibrated (rank 64, all linear layers) and trained here; --quick takes a random
adapter of rank 32 instead, fewer tokens and rounds, and leaves int4 out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from integration.evidence.cells import DOWN
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.calibrate import calibrate
from lorasb_export.data.encoding import prompt_ids
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.exporting.export import export
from lorasb_export.exporting.onnx_run import OnnxDecoder
from lorasb_export.layers.targets import find_targets
from lorasb_export.quickstart.model import small_model
from lorasb_export.quickstart.tasks import write_tasks
from lorasb_export.settings import ALL_LINEAR, BLOCK, RANDOM, CalibrationSettings, FitSettings
from lorasb_export.training.fit import fit
from tests.random_adapter import save_adapter

from .measure import alternate_calls, print_table, ratio

PROMPTS = (
    "What is the capital of France?",
    "Date: 3rd of May 2031",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue, as you would to a child of five who has just seen a sunset.",
    "List three uses of a brick.",
    "Date: the 21st of November, 1999",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Name the planets of the solar system in order.",
    "Give me a recipe for pancakes.",
    "Date: Monday, July 4 2022",
    "def fibonacci(n):",
    "What is 17 times 23?",
    "Summarise: The cat sat on the mat. The dog chased the cat. The mat was blue.",
    "What do bees eat?",
    "Write an email to my landlord about a broken window, politely, in not more than sixty words.",
    "Order: two red chairs please",
    "Why is the sea salty?",
    "Hello",
)
THREADS, TOKENS = 2, 64
# Other swappable graphs: name → the rank, None for that of the task's adapter, directions and targets.
CHEAPER: dict[str, tuple[int | None, str, str]] = {
    "block": (None, BLOCK, ALL_LINEAR),
    "down_r64": (64, RANDOM, DOWN),
    "down_r128": (128, RANDOM, DOWN),
    "block_down_r256": (256, BLOCK, DOWN),
}


def run(*, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="lorasb-bench-") as name:
        return _run(Path(name), quick)


def _run(folder: Path, quick: bool) -> dict[str, Any]:
    base = BaseModel.resolve(small_model())
    task = None if quick else load_task("dates", write_tasks(folder / "data", test=100)["dates"])
    adapter = _make_adapter(base, folder / "dates", task)
    model_bytes = 4 * sum(
        info.nbytes // 4 if info.dtype == "F32" else info.nbytes // 2 for _, info in base.tensors.values()
    )
    command = [sys.executable, "-m", "lorasb_cli", "export", str(folder / "dates"), "--format", "onnx"]
    seconds, _ = _measured([*command, "--out", str(folder / "plain"), "--no-verify"])
    verified_seconds, peak = _measured([*command, "--out", str(folder / "merged")])
    export([folder / "dates"], folder / "swappable", format="onnx-adapters", verify=False)
    for name, (rank, directions, targets) in CHEAPER.items():
        _random(base, folder / name, rank or adapter.rank, directions, targets)
        export([folder / name], folder / f"swappable-{name}", format="onnx-adapters", verify=False)
    adapter_bytes = (folder / "swappable" / "dates.onnx_adapter").stat().st_size
    result = {
        "export_seconds": round(seconds, 1),
        "export_seconds_verified": round(verified_seconds, 1),
        "export_peak_mb": peak // 10**6,
        "export_peak_ratio": round(peak / model_bytes, 2),
        "adapter_bytes": adapter_bytes,
        "adapter_file_ratio": round(adapter_bytes / (4 * adapter.rank**2 * len(adapter.R)), 3),
        "merged_mb": _megabytes(folder / "merged"),
        "swappable_mb": _megabytes(folder / "swappable"),
    }
    print(result, flush=True)
    result |= _speed(base, adapter, folder, quick)
    drop = None
    if task is not None:
        found = export(
            folder / "dates", folder / "int4", format="onnx", precision="int4", data={"dates": task}, max_drop=100
        )
        drop = found["verify"]["drop"]
        result |= {"int4_mb": _megabytes(folder / "int4"), "int4_metric": found["verify"]["onnx"]}
    return result | {"int4_metric_drop": drop}


def _make_adapter(base: BaseModel, folder: Path, task: TaskData | None) -> Adapter:
    if task is None:
        return _random(base, folder, 32, RANDOM, ALL_LINEAR)
    basis = folder.with_name("basis")
    calibrate(base, {"dates": task}, CalibrationSettings(rank=64, samples=16, dtype="float32")).save(basis)
    settings = FitSettings(epochs=1, batch_size=4, dtype="float32")
    fit(base, basis, task, folder, settings)
    return Adapter.load(folder)


def _random(base: BaseModel, folder: Path, rank: int, directions: str, targets: str) -> Adapter:
    network = base.load(dtype="float32", device="cpu")
    modules = list(find_targets(network, targets))
    options: dict[str, Any] = {"scaling": 1.0, "relative_size": 0.1, "directions": directions}
    return save_adapter(base.folder, network, folder, modules, rank=rank, **options)


def _speed(base: BaseModel, adapter: Adapter, folder: Path, quick: bool) -> dict[str, Any]:
    tokenizer = base.tokenizer
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS[: 4 if quick else None]]
    network = base.load(dtype="float32", device="cpu")
    adapter.inject(network)
    started = time.perf_counter()
    merged = OnnxDecoder(folder / "merged", threads=THREADS)
    session_seconds = time.perf_counter() - started
    swappable = OnnxDecoder(folder / "swappable", "dates", threads=THREADS)
    cheaper = {name: OnnxDecoder(folder / f"swappable-{name}", name, threads=THREADS) for name in CHEAPER}
    eos, tokens = merged.eos_ids, 16 if quick else TOKENS

    expected = [_torch_greedy(network, prompt, tokens, eos) for prompt in prompts]
    ways = {
        "merged, one by one": [merged.generate([prompt], tokens, eos)[0] for prompt in prompts],
        "merged, batches of 4": _in_fours(merged, prompts, tokens, eos),
        "swappable, batches of 4": _in_fours(swappable, prompts, tokens, eos),
    }
    total = sum(len(answer) for answer in expected)
    equal = {name: sum(_equal(a, b) for a, b in zip(found, expected, strict=True)) for name, found in ways.items()}
    for name, count in equal.items():
        print(f"{name:26} {count} of {total} greedy tokens equal torch's, up to the first that differs")

    rounds, steps = (2, 8) if quick else (7, 32)
    prompt, long = prompts[0], (prompts[0] * 64)[:256]
    calls: dict[str, Callable[[], object]] = {}
    decoders = {"merged": merged, "swappable": swappable, **cheaper}
    for count, words in ((1, prompt), (1 + steps, prompt), (1, long)):
        name = f"{len(words)}+{count}"
        calls[f"torch {name}"] = lambda words=words, count=count: _torch_greedy(network, words, count, set())
        for way, decoder in decoders.items():
            calls[f"{way} {name}"] = partial(decoder.generate, [words], count, set())
    times = alternate_calls(calls, rounds)
    print_table(times)
    n, k = len(prompt), 1 + steps
    decode = {
        way: [b - a for a, b in zip(times[f"{way} {n}+1"], times[f"{way} {n}+{k}"], strict=True)]
        for way in ("torch", *decoders)
    }
    swaps = []
    for _ in range(20):
        for name in (None, "dates"):
            started = time.perf_counter()
            swappable.use(name)
            swaps.append(1000 * (time.perf_counter() - started))
    copy = folder / "swappable" / "copy.onnx_adapter"
    shutil.copyfile(folder / "swappable" / "dates.onnx_adapter", copy)
    started = time.perf_counter()
    swappable.use(copy)
    first_use = 1000 * (time.perf_counter() - started)
    return {
        "parity_tokens": round(min(equal.values()) / total, 4),
        "parity_total": total,
        "decode_ratio_torch": ratio(decode["torch"], decode["merged"]),
        "decode_tokens_per_second": round(steps / median(decode["merged"]), 1),
        "prefill_ratio_torch": ratio(times["torch 256+1"], times["merged 256+1"]),
        "swappable_vs_merged": ratio(decode["merged"], decode["swappable"]),
        **{f"{name}_swappable_vs_merged": ratio(decode["merged"], decode[name]) for name in CHEAPER},
        "swap_ms": round(median(swaps), 4),
        "first_use_ms": round(first_use, 2),
        "session_seconds": round(session_seconds, 2),
    }


def _torch_greedy(network: Any, prompt: list[int], tokens: int, eos: set[int]) -> list[int]:
    """The plain argmax loop with a cache, up to and including the end of the answer."""
    answer: list[int] = []
    cache, ids = None, prompt
    with torch.inference_mode():
        while len(answer) < tokens and not (answer and answer[-1] in eos):
            output = network(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            answer.append(int(output.logits[0, -1].argmax()))
            ids = answer[-1:]
    return answer


def _in_fours(decoder: OnnxDecoder, prompts: list[list[int]], tokens: int, eos: set[int]) -> list[list[int]]:
    fours = [prompts[start : start + 4] for start in range(0, len(prompts), 4)]
    return [answer for four in fours for answer in decoder.generate(four, tokens, eos)]


def _equal(found: list[int], expected: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1)


def _measured(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the peak memory in bytes of it and its children (shared pages counted once)."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            peak = max(peak, sum(_proportional(pid) for pid in _family(child.pid)))
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    code = child.wait()
    seconds = time.perf_counter() - started
    thread.join()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return seconds, peak


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in _family(int(child)))]


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
