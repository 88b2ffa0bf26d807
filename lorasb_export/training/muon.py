"""An optimizer for R, beside AdamW: Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import SettingsError
from ..layers.layer import LoRASBLinear

_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan et al., "Muon" (2024): the steepest quintic at 0 that stays near 1
_ITERATIONS = 5
_MOMENTUM = 0.95
_TINY = 1e-15  # a norm that fp32 still has: of entries below 1e-19 the squares underflow, and X would be too long


class Muon(torch.optim.AdamW):
    """Muon for the parameters of groups with `orthogonal`, AdamW for all others (a classifier's head).

    R moves by lr·√r·U·Vᵀ, where U·Σ·Vᵀ is its momentum: all directions of the two subspaces equally far, whatever
    their gradients, and by a root mean square of lr, so that a rate means what it means to AdamW. AdamW moves every
    *entry* of R equally far, and what an entry is depends on which orthonormal B and A span the subspaces; Muon's path
    does not. Momentum and Nesterov's look ahead as in Jordan et al. (2024), who introduced Muon for hidden matrices.

    After a step the gradients of R are None: clip them, or log their norms, before it.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float = 0.0) -> None:
        """`groups`: as `groups_of` returns them; with `orthogonal` true, parameters (..., r, r) of one shape.

        Raises ValueError of other groups, and of parameters alone: nothing says which of them are matrices.
        """
        groups = list(groups)
        if not all(isinstance(group, dict) and "orthogonal" in group for group in groups):
            raise ValueError("Muon needs groups that say which are R: pass lorasb_export.groups_of(model)")
        of_head = [p for group in groups if not group["orthogonal"] for p in group["params"]]
        # Fused on a GPU: otherwise each step of a resumed run would ask the device how many there were.
        fused = True if of_head and all(p.is_cuda for p in of_head) else None
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=fused)
        self._step_supports_amp_scaling = False  # fused AdamW does, the step of R does not: GradScaler looks for infs

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # first: it makes the gradients
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                for parameters in _by_device(group["params"]):
                    self._step(parameters, group)
        super().step()
        return loss

    def _step(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients: list[Any] = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:  # AdamW looks for a step in every state that it loads
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            p.grad = None  # and AdamW leaves it alone
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, _MOMENTUM))
        moves = orthogonalized(ahead) * ahead.shape[-1] ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(moves.unbind()), alpha=-group["lr"])


def _by_device(parameters: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Those with a gradient, apart where a base is spread over several devices: they are stacked."""
    found: dict[torch.device, list[torch.Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            found.setdefault(p.device, []).append(p)
    return found.values()


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The groups of a model with an adapter attached: every R, and all else that is trained.

    Raises SettingsError where none is: all else would be the base itself.
    """
    R = [module.R for module in model.modules() if isinstance(module, LoRASBLinear)]
    if not R:
        raise SettingsError("no adapter is on the model", fix="Put one there: Adapter.attach(model, basis)")
    known = {id(p) for p in R}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": R, "orthogonal": True}, {"params": others, "orthogonal": False}]


def orthogonalized(M: torch.Tensor) -> torch.Tensor:
    """About U·Vᵀ of each square matrix U·Σ·Vᵀ of M (..., r, r): singular values between 0.7 and 1.2 where they were
    not tiny; a matrix that is tiny, or 0, stays so. By Newton and Schulz's iteration, which is products alone: no
    decomposition, no wait for the device.
    """
    a, b, c = _NEWTON_SCHULZ
    X = M.flatten(end_dim=-3)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=max(_TINY, torch.finfo(X.dtype).tiny))
    for _ in range(_ITERATIONS):
        square = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(square, square, square, beta=b, alpha=c), X, beta=a)
    return X.view_as(M)
