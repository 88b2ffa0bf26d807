"""How fast does vLLM answer with every request on its own adapter? Peers: the bare base, and stock vLLM LoRA, folded.

SmolLM2-135M, r = 64, all seven linears, bf16, one thread for each engine; tokens per CPU-second, in alternation.
All are eager but "compiled", the base without adapters as vLLM compiles it by default. Stock LoRA gets the same
adapters and its list of modules; few files serve under many ids. What an adapter costs beside its base goes by the
base's width: "wide" is a random model with layers of Llama 3.1 8B's shape (--quick: of a quarter of its width).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from integration.evidence.cells import DOWN
from lorasb_export.base.model import BaseModel
from lorasb_export.quickstart.model import small_model
from lorasb_export.settings import BLOCK, RANDOM

from .checkpoint import make_base
from .serve_child import Child, fold, write_adapters
from .serve_parity import parity

RANK, SMALL_RANK, MODULES = 64, 16, 210
# What comes near the quality of LoRA r = 8 of all linears (docs/benchmarks.md): name → rank and directions, on every
# down_proj alone.
OF_DOWN = {"down": (128, RANDOM), "block_down": (256, BLOCK)}
STOCK = {"max_num_batched_tokens": 128}  # its time goes by the tokens of a step, not of the prompts
OTHERS = {"max_num_batched_tokens": 512}
Speeds = dict[tuple[str, int, int], float]  # engine, rows, adapters among them → tokens per CPU-second


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="write throughput against the number of adapters to this SVG")


def run(*, quick: bool, plot: Path | None) -> dict[str, Any]:
    base = BaseModel.resolve(small_model()).folder
    with tempfile.TemporaryDirectory() as folder:
        ours = write_adapters(base, Path(folder, "large"), RANK)
        blocks = write_adapters(base, Path(folder, "block"), RANK, BLOCK)
        small = write_adapters(base, Path(folder, "small"), SMALL_RANK)
        result, speeds = peers(base, ours, blocks, quick=quick)
        result |= of_down(base, Path(folder), quick=quick)
        more, resident = many(base, ours, small, quick=quick)
        result |= more | wide(Path(folder, "wide"), quick=quick)
        asked = {"prompts": 4, "tokens": 16} if quick else {"prompts": 32, "tokens": 64}
        result |= parity(base, ours, **asked)
        result |= {f"block_{key}": value for key, value in parity(base, blocks, **asked).items()}
    if plot is not None:
        draw(speeds, resident, plot)
    return result


def peers(base: Path, ours: list[Path], blocks: list[Path], *, quick: bool) -> tuple[dict[str, Any], Speeds]:
    """Ours beside the base, compiled or not, and stock LoRA; as many slots as requests. `blocks` are of blocks."""
    children: dict[str, Child] = {}
    try:
        children["base"] = Child(base, [], **OTHERS)
        children["compiled"] = Child(base, [], enforce_eager=False, **OTHERS)
        children["stock LoRA"] = Child(base, fold(ours), 32, **STOCK)
        children["shared"] = Child(base, ours, 32, basis=ours[0], **OTHERS)
        children["block"] = Child(base, blocks, 32, basis=blocks[0], **OTHERS)
        settings = [(16, 0), (32, 0), *((32, few) for few in (1, 4, 16))]
        speeds = decode(children, settings if not quick else settings[:3], rounds=1 if quick else 3)
        few = {name: children[name] for name in ("base", "shared", "block")}  # stock LoRA takes minutes to read prompts
        read = prompts(few, rounds=2 if quick else 8)
    finally:
        for child in children.values():
            child.stop()
    table(speeds)
    return {
        "tok_s_base": round(speeds["base", 32, 0], 1),
        "tok_s_base_compiled": round(speeds["compiled", 32, 0], 1),
        "tok_s_stock_lora": round(speeds["stock LoRA", 32, 0], 1),
        "tok_s_shared": round(speeds["shared", 32, 0], 1),
        **beside("shared", speeds, read),
        **{f"block_{key}": ratio for key, ratio in beside("block", speeds, read).items()},
    }, speeds


def of_down(base: Path, folder: Path, *, quick: bool) -> dict[str, float]:
    """Those of OF_DOWN beside the base, stock LoRA with the same adapters, and stock LoRA of r = 8, all linears."""
    children: dict[str, Child] = {}
    try:
        children["base"] = Child(base, [], **OTHERS)
        eight = fold(write_adapters(base, folder / "eight", 8))
        children["stock LoRA r=8"] = Child(base, eight, 32, max_lora_rank=8, **STOCK)
        for name, (rank, directions) in OF_DOWN.items():
            adapters = write_adapters(base, folder / name, rank, directions, DOWN)
            options = {"max_lora_rank": rank, "lora_target_modules": [DOWN]}
            children[name] = Child(base, adapters, 32, basis=adapters[0], **OTHERS | options)
            children[f"stock LoRA {name}"] = Child(base, fold(adapters), 32, **STOCK | options)
        speeds = decode(children, [(16, 0), (32, 0)], rounds=1 if quick else 3)
        read = prompts({name: children[name] for name in ("base", *OF_DOWN)}, rounds=2 if quick else 8)
    finally:
        for child in children.values():
            child.stop()
    table(speeds)
    result = {}
    for name in OF_DOWN:
        result |= {f"{name}_{key}": ratio for key, ratio in beside(name, speeds, read, f"stock LoRA {name}").items()}
        for rows, ending in ((32, ""), (16, "_b16")):
            ratio = speeds[name, rows, 0] / speeds["stock LoRA r=8", rows, 0]
            result[f"{name}_ratio_vs_stock_r8{ending}"] = round(ratio, 2)
    return result


def beside(
    name: str, speeds: Speeds, read: dict[tuple[str, int], float], stock: str = "stock LoRA"
) -> dict[str, float]:
    """The engine `name` beside the base, and `stock`, which has the same adapters."""
    return {
        "ratio_vs_stock": round(speeds[name, 32, 0] / speeds[stock, 32, 0], 2),
        "ratio_vs_base": round(speeds[name, 32, 0] / speeds["base", 32, 0], 3),
        "ratio_vs_stock_b16": round(speeds[name, 16, 0] / speeds[stock, 16, 0], 2),
        "ratio_vs_base_b16": round(speeds[name, 16, 0] / speeds["base", 16, 0], 3),
        "prefill_ratio_vs_base": round(read["base", 4] / read[name, 4], 3),
        "ttft_ratio_vs_base": round(read[name, 1] / read["base", 1], 3),
    }


def many(base: Path, ours: list[Path], small: list[Path], *, quick: bool) -> tuple[dict[str, Any], Speeds]:
    """With a thousand adapters resident (r = 64), and ten thousand (r = 16), beside as many as there are requests."""
    counts = {RANK: 100 if quick else 1000, SMALL_RANK: 200 if quick else 10_000}
    children: dict[str, Child] = {}
    try:
        for folders, rank in ((ours, RANK), (small, SMALL_RANK)):
            for count in (32, counts[rank]):
                options = {"max_lora_rank": rank, **OTHERS}
                children[f"r={rank}, {count} resident"] = Child(base, folders, count, basis=folders[0], **options)
        speeds = decode(children, [(32, 0)], rounds=2 if quick else 4)
        reports = {name: child.report for name, child in children.items()}
    finally:
        for child in children.values():
            child.stop()
    table(speeds)
    large, tiny = (f"r={rank}, {count} resident" for rank, count in counts.items())
    return {
        "adapters_resident": counts[SMALL_RANK],
        "ratio_1000_resident": round(speeds[large, 32, 0] / speeds[f"r={RANK}, 32 resident", 32, 0], 3),
        "ratio_10000_resident": round(speeds[tiny, 32, 0] / speeds[f"r={SMALL_RANK}, 32 resident", 32, 0], 3),
        "bytes_per_adapter": round(reports[large]["bytes_per_adapter"]),
        "r_bytes": MODULES * RANK * RANK * 2,
        "bytes_per_adapter_r16": round(reports[tiny]["bytes_per_adapter"]),
        "r_bytes_r16": MODULES * SMALL_RANK * SMALL_RANK * 2,
        "load_ms": round(reports[large]["load_ms"], 2),
        "load_ms_r16": round(reports[tiny]["load_ms"], 2),
    }, speeds


def wide(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Ours beside the base of another width."""
    base = make_base(folder / "base", 0.5 if quick else 2, 5000)
    ours = write_adapters(base, folder / "adapters", RANK)
    children: dict[str, Child] = {}
    try:
        children["base"] = Child(base, [], **OTHERS)
        children["shared"] = Child(base, ours, 32, basis=ours[0], **OTHERS)
        speeds = decode(children, [(16, 0), (32, 0)], rounds=1 if quick else 3)
        read = prompts(children, rounds=2 if quick else 4)
    finally:
        for child in children.values():
            child.stop()
    table(speeds)
    return {
        "wide_ratio_vs_base": round(speeds["shared", 32, 0] / speeds["base", 32, 0], 3),
        "wide_ratio_vs_base_b16": round(speeds["shared", 16, 0] / speeds["base", 16, 0], 3),
        "wide_prefill_ratio_vs_base": round(read["base", 4] / read["shared", 4], 3),
    }


def decode(children: dict[str, Child], settings: list[tuple[int, int]], rounds: int) -> Speeds:
    """(engine, rows, adapters among them) → tokens per CPU-second, after one round that is not counted."""
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for counted in [False] + [True] * rounds:
        for name, child in children.items():
            for rows, few in settings if name not in ("base", "compiled") else [s for s in settings if not s[1]]:
                count = 4 if name.startswith("stock LoRA") else 24
                times = child.call("steps", rows=rows, prompt=3, count=count, adapters=few)[1:]
                seconds.setdefault((name, rows, few), []).extend(times if counted else [])
    return {key: key[1] / statistics.median(times) for key, times in seconds.items()}


def prompts(children: dict[str, Child], rounds: int) -> dict[tuple[str, int], float]:
    """(engine, rows) → CPU seconds of reading so many prompts of 128 tokens, in one step."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for counted in [False] + [True] * rounds:
        for name, child in children.items():
            for rows in (1, 4):
                first = child.call("steps", rows=rows, prompt=128, count=1)[:1]
                seconds.setdefault((name, rows), []).extend(first if counted else [])
    return {key: statistics.median(times) for key, times in seconds.items()}


def table(speeds: Speeds) -> None:
    print(f"{'tokens per CPU-second':24} {'requests':>8} {'adapters':>8} {'tok/s':>8}")
    for (name, rows, few), speed in speeds.items():
        print(f"{name:24} {rows:8} {few or rows:8} {speed:8.1f}")


def draw(speeds: Speeds, resident: Speeds, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.axhline(speeds["base", 32, 0], color="grey", linestyle="--", label="bare base, eager")
    for name in ("stock LoRA", "shared"):
        found = {few or rows: speed for (engine, rows, few), speed in speeds.items() if engine == name and rows == 32}
        axes.plot(*zip(*sorted(found.items()), strict=True), marker="o", label=name)
    for (name, _, _), speed in resident.items():
        rank, count = name.removesuffix(" resident").split(", ")
        if count != "32":
            axes.plot([int(count)], [speed], marker="D", linestyle="", label=f"shared, {rank}, {count} resident")
    axes.set(xscale="log", ylim=(0, None), xlabel="adapters", ylabel="tokens per CPU-second, 32 requests in decode")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
