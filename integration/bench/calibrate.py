"""What do the gradient sums of `calibrate` cost beside the bare forward and backward passes they are made of?"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.gradients import draw, gradient_sums
from lorasb_export.calibration.subspace import reduced, truncated_svd
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.batches import collate, row_losses
from lorasb_export.data.task import TaskData
from lorasb_export.layers.targets import find_targets
from lorasb_export.quickstart.model import small_model
from lorasb_export.quickstart.tasks import TASKS
from lorasb_export.settings import CalibrationSettings

from .measure import alternate_calls, forget_peak, memory, print_table, ratio

Batches = list[dict[str, Any]]


def run(*, quick: bool) -> dict[str, Any]:
    rows, rounds = (16, 2) if quick else (32, 10)
    network, targets, batches = _ready(rows, CalibrationSettings.batch_size)
    kept: dict[str, torch.Tensor] = {}
    summed_over = partial(gradient_sums, network, targets, batches, loss="sample")
    times = alternate_calls(
        {
            "gradient_sums": lambda: kept.update(summed_over(gradient_checkpointing=True)),
            "bare passes": lambda: _bare(network, targets, batches),
            "gradient_sums, all kept": lambda: summed_over(gradient_checkpointing=False),
        },
        rounds,
    )
    started = time.perf_counter()
    for gradient in kept.values():
        truncated_svd(reduced(gradient, "sign"), CalibrationSettings.rank, 0)
    svd = time.perf_counter() - started
    print_table(times)
    frozen, summed, all_kept = (_peak_in_a_fresh_process(what, rows) for what in ("frozen", "sums", "all kept"))
    return {
        "calibrate_seconds": round(statistics.median(times["gradient_sums"]), 3),
        "calibrate_ratio_bare": ratio(times["gradient_sums"], times["bare passes"]),
        "calibrate_ratio_bare_all_kept": ratio(times["gradient_sums, all kept"], times["bare passes"]),
        "calibrate_extra_mb": round(summed - frozen, 1),
        "calibrate_extra_mb_all_kept": round(all_kept - frozen, 1),
        "frozen_pass_mb": frozen,
        "target_gradients_mb": round(sum(gradient.nbytes for gradient in kept.values()) / 1e6, 1),
        "svd_seconds": round(svd, 3),
    }


def _ready(rows: int, batch_size: int) -> tuple[PreTrainedModel, dict[str, torch.nn.Module], Batches]:
    """SmolLM2-135M in fp32, its targets, and batches of rows of the quickstart's two tasks."""
    rng = random.Random(0)
    made = [make(rng) for make in TASKS.values() for _ in range(rows // len(TASKS))]
    base, settings = BaseModel.resolve(small_model()), CalibrationSettings(samples=rows)
    network, tokenizer = base.load(dtype="float32"), base.tokenizer
    drawn = draw(TaskData("both", "generated", CAUSAL_LM, {"train": made}, ""), base, [], settings)
    starts = range(0, len(drawn), batch_size)
    batches = [collate(drawn[i : i + batch_size], tokenizer.pad_token_id) for i in starts]
    return network, find_targets(network, settings.targets), batches


def _bare(network: PreTrainedModel, targets: dict[str, torch.nn.Module], batches: Batches) -> None:
    """The same passes, with gradients of the same weights, which are dropped after each batch."""
    for module in targets.values():
        module.weight.requires_grad_(True)
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        losses, counts = row_losses(network(**inputs, use_cache=False).logits, batch["labels"])
        (losses / counts).sum().backward()
        network.zero_grad(set_to_none=True)
    network.requires_grad_(False)


def _frozen(network: PreTrainedModel, batches: Batches) -> None:
    """The same passes without any weight's gradient: what the activations alone take."""
    network.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    network.requires_grad_(False)
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        row_losses(network(**inputs, use_cache=False).logits, batch["labels"])[0].sum().backward()


def _peak_in_a_fresh_process(what: str, rows: int) -> float:
    """Peak memory in MB above what the loaded model takes, one row at a time; this process has seen everything."""
    command = [sys.executable, "-m", __name__, what, str(rows)]
    return float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def _peak(what: str, rows: int) -> float:
    network, targets, batches = _ready(rows, 1)  # so that activations are next to nothing
    forget_peak()  # of loading
    before = memory("VmRSS")
    if what == "frozen":
        _frozen(network, batches)
    else:
        gradient_sums(network, targets, batches, loss="sample", gradient_checkpointing=what == "sums")
    return round((memory("VmHWM") - before) / 1e6, 1)


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], int(sys.argv[2]))))
