"""Which R every token of a step is multiplied by."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_LONG = 8  # from this many tokens of one adapter in a row on, a matrix product is faster than a sum of rows


class Routes:
    """The slot of every token, set once a step and read by every layer.

    Slot `slots`, one past vLLM's last, belongs to the base: it is never written, so that its tokens read zeros. vLLM's
    own index for them is -1.

    Attributes:
        idle: no token of this step has an adapter. Known on a CPU only: elsewhere asking would wait for the device.
    """

    def __init__(self, slots: int, max_tokens: int, rank: int, device: torch.device) -> None:
        self._stride = slots + 1
        self._slot = torch.full((max_tokens,), slots, dtype=torch.long, device=device)  # its address never changes
        self._columns = torch.arange(rank, device=device)
        self._on_cpu = device.type == "cpu"
        self._rows_of: dict[tuple[int, int], torch.Tensor] = {}
        self._runs: list[tuple[int, int, int | None]] = []
        self.idle = False

    def update(self, token_slots: torch.Tensor) -> None:
        """Take the slots (T,) of the next step's tokens, -1 for the base."""
        slot = self._slot[: len(token_slots)]
        torch.remainder(token_slots, self._stride, out=slot)  # -1 becomes the last
        if self._on_cpu:
            self._rows_of.clear()
            values, counts = torch.unique_consecutive(slot, return_counts=True)
            self.idle = values.tolist() == [self._stride - 1]
            self._runs = _runs(values.tolist(), counts.tolist())

    def product(self, u: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """v (T, n, r) with v[t, i] = R[i, slot of t] · u[t, i].

        Args:
            u: (T, n, r), contiguous.
            stack: Rᵀ of every module and slot, (n, slots + 1, r, r).
        """
        tokens, parts, rank = u.shape
        rows = self._rows(tokens, parts)
        flat = stack.view(-1, rank)
        # A sum of rows of Rᵀ, weighted by u, is R·u: each R is read where it lies, and none is gathered.
        if not self._runs:
            return F.embedding_bag(rows, flat, per_sample_weights=u.view(-1, rank), mode="sum").view_as(u)
        v = torch.empty_like(u)
        for start, stop, slot in self._runs:
            if slot is None:
                part, weights = rows[start * parts : stop * parts], u[start:stop].view(-1, rank)
                v[start:stop] = F.embedding_bag(part, flat, per_sample_weights=weights, mode="sum").view(
                    -1, parts, rank
                )
            else:
                v[start:stop] = torch.bmm(u[start:stop].transpose(0, 1), stack[:, slot]).transpose(0, 1)
        return v

    def _rows(self, tokens: int, parts: int) -> torch.Tensor:
        """For every token and part the rows of its Rᵀ in the flat stack, (T·n, r)."""
        key = (tokens, parts)
        if key in self._rows_of:
            return self._rows_of[key]
        first = torch.arange(parts, device=self._slot.device) * self._stride
        matrix = (self._slot[:tokens, None] + first).view(-1, 1)
        rows = matrix * len(self._columns) + self._columns
        if self._on_cpu:  # layers of one shape share it, and half the bytes are faster
            rows = self._rows_of[key] = rows.int()
        return rows


def _runs(values: list[int], counts: list[int]) -> list[tuple[int, int, int | None]]:
    """(start, stop, slot) of every long run of one slot, with None for the short ones between; empty without any."""
    if max(counts, default=0) < _LONG:
        return []
    runs: list[tuple[int, int, int | None]] = []
    start = 0
    for value, count in zip(values, counts, strict=True):
        slot, stop = value if count >= _LONG else None, start + count
        if slot is None and runs and runs[-1][2] is None:
            runs[-1] = (runs[-1][0], stop, None)
        else:
            runs.append((start, stop, slot))
        start = stop
    return runs
