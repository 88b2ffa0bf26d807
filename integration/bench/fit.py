"""What does a training step cost? Peers: PEFT's LoRA at its defaults, and the frozen model's own forward and backward.

SmolLM2-135M, all seven linears of every layer, 4 × 256 tokens, AdamW. Steps are timed in one process, in alternation.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.data.batches import collate, row_losses
from lorasb_export.data.encoding import IGNORE, Encoded, encode_split
from lorasb_export.data.task import load_task
from lorasb_export.quickstart.model import small_model
from lorasb_export.quickstart.tasks import write_tasks

from .fit_memory import peaks, saved_bytes
from .fit_models import CHEAPER, Variant, cheaper, floor, of_all, ours, peft, random_basis
from .fit_resume import resume_bit_equal
from .fit_together import together
from .measure import alternate_calls, print_table, ratio


def timed(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant's step."""
    return alternate_calls({name: variant.step for name, variant in variants.items()}, rounds)


def on_rows(dtype: str, rounds: int) -> dict[str, list[float]]:
    """Eight rows of the quickstart's `dates`: as `fit` takes a step, which asks for the logits of the answers alone,
    and as PEFT does under transformers' Trainer, whose loss takes all of them.
    """
    base = BaseModel.resolve(small_model())
    tokenizer = base.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        task = load_task("dates", write_tasks(Path(scratch))["dates"])
        rows = encode_split(base, task, "train", [], 192, limit=8)
    batch = collate(rows, tokenizer.pad_token_id)
    labels = batch.pop("labels")
    every = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORE)
    whole = {"input_ids": batch["input_ids"], "attention_mask": _mask(rows), "labels": every}
    network = base.load(dtype=dtype)
    Adapter.attach(network, random_basis(network, 64))
    ways = {
        f"rows, ours {dtype}": Variant(network, lambda model: row_losses(model(**batch).logits, labels)[0].sum()),
        f"rows, PEFT {dtype}": Variant(peft(getattr(torch, dtype)), lambda model: model(**whole).loss),
    }
    return timed(ways, rounds)


def _mask(rows: Sequence[Encoded]) -> torch.Tensor:
    """As transformers' collators make it."""
    return pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True)


def of_cheaper(times: dict[str, list[float]]) -> dict[str, float]:
    """A step in each of CHEAPER beside PEFT's and the floor's, over a base in fp32 and in bf16."""
    found = {}
    for name, (*_, rank) in CHEAPER.items():
        for dtype, ending in (("", ""), (" bf16", "_bf16")):
            mine = times[f"{name}{dtype}"]
            found[f"{name}_step_time_ratio_peft_r{rank}{ending}"] = ratio(mine, times[f"PEFT r={rank}{dtype}"])
            found[f"{name}_step_time_ratio_frozen_floor{ending}"] = ratio(mine, times[f"frozen floor{dtype}"])
    return found


def of_together(rounds: int, tokens: int) -> tuple[float, float, dict[str, list[float]]]:
    """How many times as fast eight tasks are in one mixed step as in turn, and what the base alone gains so: nothing
    on top of it can gain more."""
    found = together(rounds, tokens)
    mixed, in_turn, frozen, frozen_in_turn = found.values()
    return round(1 / ratio(mixed, in_turn), 2), round(1 / ratio(frozen, frozen_in_turn), 2), found


def run(*, quick: bool) -> dict[str, Any]:
    """The quick run leaves out the cheaper settings, other ranks, real rows, peak memory and the killed
    training."""
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (2, 128) if quick else (4, 256))
    loss, rounds = of_all(ids), 2 if quick else 9
    times: dict[str, list[float]] = {}
    saved: dict[str, int] = {}
    for dtype, ending in ((torch.float32, ""), (torch.bfloat16, " bf16")):
        models = {"ours r=64": ours(dtype), "PEFT r=64": peft(dtype), "frozen floor": floor(dtype)}
        if not quick:
            models |= {"PEFT r=32": peft(dtype, 32), "PEFT r=8": peft(dtype, 8), **cheaper(dtype)}
        saved |= {f"{name}{ending}": saved_bytes(model, ids) for name, model in models.items()}
        variants = {f"{name}{ending}": Variant(model, loss) for name, model in models.items()}
        if not ending:
            variants["ours r=64 Muon"] = Variant(models["ours r=64"], loss, muon=True)
        times |= timed(variants, rounds)
        del models, variants
    speedup, ceiling, found = of_together(1 if quick else 7, 54)  # tokens of a row of the quickstart
    times |= found
    mine = times["ours r=64"]
    result = {
        "step_time_ratio_peft_r64": ratio(mine, times["PEFT r=64"]),
        "step_time_ratio_peft_r64_bf16": ratio(times["ours r=64 bf16"], times["PEFT r=64 bf16"]),
        "saved_bytes_ratio_peft_r64": round(saved["ours r=64"] / saved["PEFT r=64"], 3),
        "saved_bytes_ratio_peft_r64_bf16": round(saved["ours r=64 bf16"] / saved["PEFT r=64 bf16"], 3),
        "step_time_ratio_frozen_floor": ratio(mine, times["frozen floor"]),
        "step_time_ratio_frozen_floor_bf16": ratio(times["ours r=64 bf16"], times["frozen floor bf16"]),
        "together_speedup": speedup,
        "together_speedup_frozen": ceiling,
        "step_time_ratio_muon": ratio(times["ours r=64 Muon"], mine),
        "step_seconds": round(statistics.median(mine), 3),
    }
    if not quick:
        speedup, ceiling, found = of_together(7, 16)  # a short question
        times |= found
        rows = {dtype: on_rows(dtype, rounds) for dtype in ("float32", "bfloat16")}
        for found in rows.values():
            times |= found
        memory = peaks(ids)
        result |= {
            "step_time_ratio_peft_r32": ratio(mine, times["PEFT r=32"]),
            "peak_rss_ratio_peft_r64": round(memory["ours"] / memory["peft"], 3),
            **of_cheaper(times),
            **{f"rows_step_time_ratio_peft_r64_{dtype}": ratio(*found.values()) for dtype, found in rows.items()},
            "together_speedup_16_tokens": speedup,
            "together_speedup_frozen_16_tokens": ceiling,
            "resume_bit_equal": resume_bit_equal(),
        }
    print_table(times)
    print({name: f"{count / 2**20:.0f} MiB saved" for name, count in saved.items()})
    return result
