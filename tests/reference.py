"""LoRA-SB in plain torch, written from the paper (arXiv 2411.19557) and sharing no code with the product."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

Rows = list[tuple[list[int], list[int]]]  # prompt ids, completion ids
Matrices = dict[str, torch.Tensor]


def linear_names(model: torch.nn.Module) -> list[str]:
    """All linear layers but the output head."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")]


def completion_losses(model: torch.nn.Module, row: tuple[list[int], list[int]]) -> torch.Tensor:
    """Cross-entropy of each completion token, one row at a time: no padding, no batch."""
    prompt, completion = row
    logits = model(torch.tensor([prompt + completion])).logits[0]
    return cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(completion), reduction="none")


def first_step(model: torch.nn.Module, rows: Rows, eta: float) -> Matrices:
    """ΔW_avg = -η·sign(Σ_i ∇_W L(W0, x_i)) for every linear layer (section 3)."""
    model.requires_grad_(True)
    for row in rows:
        completion_losses(model, row).mean().backward()
    steps = {name: -eta * model.get_submodule(name).weight.grad.sign() for name in linear_names(model)}
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return steps


def truncated(step: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B = U[:, :r], R0 = S[:r, :r] (s = 1), A = Vᵀ[:r]."""
    U, S, Vh = torch.linalg.svd(step)
    return U[:, :rank], torch.diag(S[:rank]), Vh[:rank]


def train(model: torch.nn.Module, bases: dict[str, tuple], rows: Rows, steps: int, rate: float, warmup: int) -> tuple:
    """AdamW on R alone, all rows in every step; gradient norm clipped at 1, rate linear up, then linear down to 0.

    Returns: name → R, and the loss before each step.
    """
    R = {name: R0.clone().requires_grad_(True) for name, (_, R0, _) in bases.items()}

    def adapt(name: str):  # y = x·W0ᵀ + x·(B·R·A)ᵀ
        B, _, A = bases[name]
        return lambda module, inputs, output: output + inputs[0] @ (B @ R[name] @ A).T

    hooks = [model.get_submodule(name).register_forward_hook(adapt(name)) for name in bases]
    optimizer = torch.optim.AdamW(R.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(steps):
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = torch.cat([completion_losses(model, row) for row in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(R.values(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    for hook in hooks:
        hook.remove()
    return {name: tensor.detach() for name, tensor in R.items()}, losses
