"""The product against the plain reference, in float64: projectors, R after 30 AdamW steps, and the losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasb_export import calibrate, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import load_task
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests import reference

RANK, ROWS, STEPS, RATE, WARMUP, ETA = 4, 8, 30, 1e-2, 3, 1e-2


def test_thirty_steps_agree_with_the_reference(llama: Path, sums: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(llama)
    task = load_task("sums", sums)
    task = replace(task, splits={"train": task.splits["train"][:ROWS]})
    tokenizer = base.tokenizer
    rows = []
    for row in task.splits["train"]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        completion = tokenizer(row["completion"] + "</s>", add_special_tokens=False).input_ids
        rows.append((prompt, completion))

    plain = base.load(dtype="float64")
    steps = reference.first_step(plain, rows, ETA)
    theirs = {name: reference.truncated(step, RANK) for name, step in steps.items()}
    settings = CalibrationSettings(rank=RANK, dtype="float64", eta=ETA, samples=ROWS)
    basis = calibrate(base, {"sums": task}, settings)
    assert set(basis.modules) == set(theirs)
    for name, (B, R0, A) in theirs.items():
        ours = basis.modules[name]
        assert torch.allclose(ours.B @ ours.B.T, B @ B.T, atol=1e-6)
        assert torch.allclose(ours.A.T @ ours.A, A.T @ A, atol=1e-6)
        assert torch.allclose(ours.B * ours.S @ ours.A, B @ R0 @ A, atol=1e-6)

    # Adam's path depends on the signs of the singular vectors: train the reference in the product's gauge.
    gauge = {name: (m.B, torch.diag(m.S.double()), m.A) for name, m in basis.modules.items()}
    R, losses = reference.train(plain, gauge, rows, STEPS, RATE, WARMUP)
    fitting = FitSettings(
        max_steps=STEPS,
        batch_size=ROWS,
        learning_rate=RATE,
        optimizer="adamw",
        warmup=WARMUP / STEPS,
        dtype="float64",
        epochs=1,
    )
    adapter = fit(base, basis, task, tmp_path / "a", fitting)
    for name, tensor in adapter.R.items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, R[name], atol=1e-6)
        assert not torch.allclose(tensor, gauge[name][1], atol=1e-3)  # it moved
    log = [json.loads(line) for line in (tmp_path / "a" / "training_log.jsonl").read_text().splitlines()]
    every = STEPS // len(log)
    means = [sum(losses[i : i + every]) / every for i in range(0, STEPS, every)]
    assert [entry["loss"] for entry in log] == pytest.approx(means, abs=1e-6)
    assert losses[-1] < 0.9 * losses[0]
