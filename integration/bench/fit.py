"""What does a training step cost? Peers: PEFT's LoRA at its defaults, and the frozen model's own forward and backward.

SmolLM2-135M, all seven linears of every layer, 4 × 256 tokens, AdamW. Steps are timed in one process, in alternation.
"""

from __future__ import annotations

import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from integration.evidence.cells import DOWN
from lorasb_export.adapter import Adapter
from lorasb_export.base import BaseModel, BaseRef
from lorasb_export.basis import Basis
from lorasb_export.batches import collate, row_losses
from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.data import load_task
from lorasb_export.encoding import IGNORE, Encoded, encode
from lorasb_export.inject import inject, remove
from lorasb_export.quickstart.model import small_model
from lorasb_export.quickstart.tasks import write_tasks
from lorasb_export.settings import ALL_LINEAR, BLOCK, RANDOM
from lorasb_export.stack import Stack
from lorasb_export.targets import find_targets
from lorasb_export.training.muon import Muon

from .measure import alternate_calls, forget_peak, memory, print_table, ratio

TASKS = 8
# Name → rank, directions, targets, and the rank of the LoRA, of all linear layers, that it is held against. LoRA's
# quality at r = 8 is reached by the three last: docs/benchmarks.md.
CHEAPER = {
    "block_r64": (64, BLOCK, ALL_LINEAR, 64),
    "block_r96": (96, BLOCK, ALL_LINEAR, 8),
    "down_r128": (128, RANDOM, DOWN, 8),
    "block_down_r256": (256, BLOCK, DOWN, 8),
}
KILLED = """
import os, signal, sys
from lorasb_export import fit
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.trainer import RTrainer
model, data, out, kill = sys.argv[1:]
step = RTrainer.training_step
def killing(self, *arguments):
    if kill == "kill" and self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
RTrainer.training_step = killing
own = CalibrationSettings(rank=16, samples=4, targets="q_proj,v_proj")
settings = FitSettings(max_steps=5, checkpoint_every=2, batch_size=2, dtype="bfloat16", init="zero")
print(fit(model, own, data, out, settings, resume=kill == "resume").sha256)
"""


class Variant:
    """One way to train, ready for its next step."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[Any], torch.Tensor], *, muon: bool = False) -> None:
        self.model, self.loss = model.train(), loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        if muon:
            self.optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=1e-4)
        elif parameters:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(self) -> None:
        self.loss(self.model).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def load(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(BaseModel.resolve(small_model()).folder, dtype=dtype, use_cache=False)


def random_basis(model: Any, rank: int, directions: str = RANDOM, targets: str = ALL_LINEAR) -> Basis:
    """Orthonormal factors cost a step what calibrated ones do."""
    factors = random_factors(find_targets(model, targets), rank, 0, model.dtype, directions)
    return Basis(BaseRef("bench", None, "0"), rank, factors, {})


def ours(dtype: torch.dtype, rank: int = 64, directions: str = RANDOM, targets: str = ALL_LINEAR) -> Any:
    model = load(dtype)
    Adapter.attach(model, random_basis(model, rank, directions, targets))
    return model


def cheaper(dtype: torch.dtype) -> dict[str, Any]:
    return {name: ours(dtype, *how) for name, (*how, _) in CHEAPER.items()}


def peft(dtype: torch.dtype, rank: int = 64) -> Any:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load(dtype), config)


def floor(dtype: torch.dtype) -> Any:
    """The frozen model alone: forward, and the gradient of every input."""
    model = load(dtype).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def timed(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant's step."""
    return alternate_calls({name: variant.step for name, variant in variants.items()}, rounds)


def of_all(ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """The loss of every token."""
    return lambda model: model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def on_rows(dtype: str, rounds: int) -> dict[str, list[float]]:
    """Eight rows of the quickstart's `dates`: as `fit` takes a step, which asks for the logits of the answers alone,
    and as PEFT does under transformers' Trainer, whose loss takes all of them.
    """
    base = BaseModel.resolve(small_model())
    tokenizer = base.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        task = load_task("dates", write_tasks(Path(scratch))["dates"])
        rows = encode(list(task.rows("train"))[:8], tokenizer, task.task_type, None, 192)
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


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """What the transformer's body keeps for its backward pass, weights aside, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    body = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    with saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = body(input_ids=ids).last_hidden_state  # kept alive, and so is what it saved
    del hidden
    return sum(kept.values())


def peak(name: str, ids: torch.Tensor, found: Any) -> None:
    """In a fresh process: the highest memory of two steps, above that before the first."""
    variant = Variant({"ours": ours, "peft": peft}[name](torch.float32), of_all(ids))
    forget_peak()  # of loading
    before = memory("VmRSS")
    for _ in range(2):
        variant.step()
    found.put(memory("VmHWM") - before)


def peaks(ids: torch.Tensor) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in ("ours", "peft"):
        queue = context.Queue()
        child = context.Process(target=peak, args=(name, ids, queue))
        child.start()
        found[name] = queue.get()
        child.join()
    return found


def together(rounds: int, tokens: int) -> dict[str, list[float]]:
    """Eight tasks, one row each: one mixed step, against eight steps one after another; and what that could gain
    at most: the frozen model's passes over eight rows at once, and one by one."""
    model = load(torch.float32)
    basis = random_basis(model, 64)
    ids = torch.randint(0, 49152, (TASKS, tokens))
    alone = Adapter.start(basis)

    def step(rows: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def mixed() -> Callable[[], None]:
        stack = Stack(model, {str(k): Adapter.start(basis) for k in range(TASKS)})
        values = [torch.nn.Parameter(v) for v in stack.values]
        optimizers = [torch.optim.AdamW([v], fused=True) for v in values]
        stack.use(stack.names)

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            gradients = torch.stack([layer.grad for layer in stack.layers], dim=1)  # type: ignore[misc]
            for k, optimizer in enumerate(optimizers):
                values[k].grad = gradients[k]
                optimizer.step()
                optimizer.zero_grad()
            model.zero_grad()

        return run

    def one_by_one() -> Callable[[], None]:
        inject(model, alone.load_basis().modules, alone.R, alone.scaling)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers = [torch.optim.AdamW(parameters, fused=True) for _ in range(TASKS)]
        return lambda: [step(ids[k : k + 1], optimizers[k]) for k in range(TASKS)] and None

    def frozen(batches: Sequence[torch.Tensor]) -> Callable[[], None]:
        remove(model)

        def run() -> None:
            for rows in batches:
                inputs = model.get_input_embeddings()(rows).requires_grad_(True)
                model(inputs_embeds=inputs, labels=rows).loss.backward()

        return run

    ways = {
        f"together, {tokens} tokens": mixed,
        f"in turn, {tokens} tokens": one_by_one,
        f"frozen, together, {tokens} tokens": partial(frozen, [ids]),
        f"frozen, in turn, {tokens} tokens": partial(frozen, ids.split(1)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    model.train()
    for _ in range(rounds):
        for name, make in ways.items():
            run = make()
            run()
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def resume_bit_equal() -> bool:
    """Killed by SIGKILL in step 4, resumed in another process: the same adapter as undisturbed?"""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_tasks(folder / "data")["dates"]

        def run(out: str, kill: str) -> str:
            command = [sys.executable, "-c", KILLED, small_model(), str(data), str(folder / out), kill]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()

        killed, resumed, undisturbed = run("a", "kill"), run("a", "resume"), run("b", "none")
        return not killed and bool(resumed) and resumed == undisturbed


def of_cheaper(times: dict[str, list[float]]) -> dict[str, float]:
    """A step in each of CHEAPER beside PEFT's and the floor's, over a base in fp32 and in bf16."""
    found = {}
    for name, (*_, rank) in CHEAPER.items():
        for dtype, ending in (("", ""), (" bf16", "_bf16")):
            mine = times[f"{name}{dtype}"]
            found[f"{name}_step_time_ratio_peft_r{rank}{ending}"] = ratio(mine, times[f"PEFT r={rank}{dtype}"])
            found[f"{name}_step_time_ratio_frozen_floor{ending}"] = ratio(mine, times[f"frozen floor{dtype}"])
    return found


def run(*, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (2, 128) if quick else (4, 256))
    loss, rounds = of_all(ids), 3 if quick else 9
    full, half = torch.float32, torch.bfloat16
    models = {
        "ours r=64": ours(full),
        **cheaper(full),
        "PEFT r=64": peft(full),
        "PEFT r=32": peft(full, 32),
        "PEFT r=8": peft(full, 8),
        "frozen floor": floor(full),
    }
    saved = {name: saved_bytes(model, ids) for name, model in models.items()}
    variants = {name: Variant(model, loss) for name, model in models.items()}
    variants["ours r=64 Muon"] = Variant(models["ours r=64"], loss, muon=True)
    times = timed(variants, rounds)
    del models, variants
    models = {
        "ours r=64": ours(half),
        **cheaper(half),
        "PEFT r=64": peft(half),
        "PEFT r=8": peft(half, 8),
        "frozen floor": floor(half),
    }
    models = {f"{name} bf16": model for name, model in models.items()}
    saved |= {name: saved_bytes(model, ids) for name, model in models.items()}
    times |= timed({name: Variant(model, loss) for name, model in models.items()}, rounds)
    del models
    rows = {dtype: on_rows(dtype, rounds) for dtype in ("float32", "bfloat16")}
    for found in rows.values():
        times |= found
    speedups, ceilings = {}, {}
    for tokens in (54, 16):  # a row of the quickstart; a short question
        found = together(2 if quick else 7, tokens)
        mixed, in_turn, frozen, frozen_in_turn = found.values()
        speedups[tokens], ceilings[tokens] = (
            round(1 / ratio(*pair), 2) for pair in ((mixed, in_turn), (frozen, frozen_in_turn))
        )
        times |= found
    memory = peaks(ids)
    print_table(times)
    print({name: f"{count / 2**20:.0f} MiB saved" for name, count in saved.items()})
    mine = times["ours r=64"]
    return {
        "step_time_ratio_peft_r64": ratio(mine, times["PEFT r=64"]),
        "step_time_ratio_peft_r32": ratio(mine, times["PEFT r=32"]),
        "step_time_ratio_peft_r64_bf16": ratio(times["ours r=64 bf16"], times["PEFT r=64 bf16"]),
        "saved_bytes_ratio_peft_r64": round(saved["ours r=64"] / saved["PEFT r=64"], 3),
        "saved_bytes_ratio_peft_r64_bf16": round(saved["ours r=64 bf16"] / saved["PEFT r=64 bf16"], 3),
        "peak_rss_ratio_peft_r64": round(memory["ours"] / memory["peft"], 3),
        "step_time_ratio_frozen_floor": ratio(mine, times["frozen floor"]),
        "step_time_ratio_frozen_floor_bf16": ratio(times["ours r=64 bf16"], times["frozen floor bf16"]),
        **of_cheaper(times),
        **{f"rows_step_time_ratio_peft_r64_{dtype}": ratio(*found.values()) for dtype, found in rows.items()},
        "together_speedup": speedups[54],
        "together_speedup_16_tokens": speedups[16],
        "together_speedup_frozen": ceilings[54],  # what the base alone gains: nothing on top of it can gain more
        "together_speedup_frozen_16_tokens": ceilings[16],
        "step_time_ratio_muon": ratio(times["ours r=64 Muon"], mine),
        "step_seconds": round(statistics.median(mine), 3),
        "resume_bit_equal": resume_bit_equal(),
    }
