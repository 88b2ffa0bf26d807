"""Eight tasks in one mixed step, against eight steps in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lorasb_export.adapter import Adapter
from lorasb_export.layers.inject import inject, remove
from lorasb_export.stack import Stack

from .fit_models import load, random_basis

TASKS = 8


def together(rounds: int, tokens: int) -> dict[str, list[float]]:
    """Eight tasks, one row each: one mixed step, against eight steps one after another; and what that could gain
    at most: the frozen model's passes over eight rows at once, and one by one."""
    model = load(torch.float32)
    basis = random_basis(model, 64)
    ids = torch.randint(0, 49152, (TASKS, tokens))
    alone = Adapter.fresh(basis)

    def step(rows: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def mixed() -> Callable[[], None]:
        stack = Stack(model, {str(k): Adapter.fresh(basis) for k in range(TASKS)})
        values = [torch.nn.Parameter(v) for v in stack.values]
        optimizers = [torch.optim.AdamW([v], fused=True) for v in values]
        stack.use(stack.names)

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            gradients = stack.gradients()
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
