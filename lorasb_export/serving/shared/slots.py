"""Which R every token of a step is multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

_LONG = 8  # from this many tokens of one adapter in a row on, a matrix product is faster than a sum of rows


class Block(NamedTuple):
    """The places of one module's block in this process. Of several, each may have a part of it.

    Attributes:
        columns: pairs of columns of x, and those of R.
        rows: pairs of columns of y, which are rows of W, and rows of R.
    """

    columns: Sequence[tuple[slice, slice]]
    rows: Sequence[tuple[slice, slice]]

    @classmethod
    def of(cls, columns: torch.Tensor, rows: torch.Tensor, block: tuple[slice, slice], first: int) -> Block:
        """The places of `block`, rows and columns of W, where this process has the `columns` and `rows` (n,) of W.

        Args:
            first: where the module's rows begin in y.
        """
        return cls(_places(columns, block[1], 0), _places(rows, block[0], first))


def _places(own: torch.Tensor, span: slice, first: int) -> list[tuple[slice, slice]]:
    """The runs of `span` in `own`: where they are there, counted from `first`, and where they are in the span."""
    places = ((own >= span.start) & (own < span.stop)).nonzero().flatten()
    found = zip((places + first).tolist(), (own[places] - span.start).tolist(), strict=True)
    runs = [list(run) for _, run in groupby(found, lambda pair: pair[0] - pair[1])]
    return [(slice(run[0][0], run[-1][0] + 1), slice(run[0][1], run[-1][1] + 1)) for run in runs]


class Place(NamedTuple):
    """Where the R of one layer's parts lie in the stack.

    Attributes:
        first: the first of them.
        parts: n, how many.
        rows: the flat stack from their first row in the first slot to their last in the last. It has one length for
            all layers of n parts, so that a compiler finds their graphs to be one.
    """

    first: int
    parts: int
    rows: torch.Tensor


class Slots:
    """The R of all slots, and the slot of every token: set once a step and read by every layer.

    The last slot, one past vLLM's, belongs to the base: it is never written, so that its tokens read zeros. vLLM's
    own index for them is -1.

    Attributes:
        stack: (s·R)ᵀ of every slot and module, (slots + 1, m, r, r); the manager fills it. An adapter is one block.
        idle: no token of this step has an adapter. Known on a CPU only: elsewhere asking would wait for the device.
    """

    def __init__(self, stack: torch.Tensor, max_tokens: int) -> None:
        self.stack = stack
        self.rank = stack.shape[-1]
        self.idle = False  # on an accelerator always: vLLM traces the model once, with a batch that has no adapter
        self._tokens = max_tokens
        # int32 halves the bytes of the indices; a stack of 2³¹ rows would be 137 GB at rank 32.
        kind = torch.int32 if stack.numel() // self.rank < 2**31 else torch.long
        self._columns = torch.arange(self.rank, device=stack.device)
        self._slot = torch.full((max_tokens,), len(stack) - 1, dtype=kind, device=stack.device)  # its address stays
        self._on_cpu = stack.device.type == "cpu"
        self._rows_of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._runs: list[tuple[int, int, int | None]] = []

    def place(self, first: int, parts: int) -> Place:
        """Where `parts` modules from `first` on, in the order of the stack, have their R."""
        length = (len(self.stack) - 1) * self.stack.shape[1] + parts
        return Place(first, parts, self.stack.view(-1, self.rank)[first * self.rank :][: length * self.rank])

    def update(self, token_slots: torch.Tensor) -> None:
        """Take the slots (T,) of the next step's tokens, -1 for the base; in pinned memory nothing is waited for."""
        self._tokens = len(token_slots)
        slot = self._slot[: self._tokens]
        slot.copy_(token_slots, non_blocking=True).remainder_(len(self.stack))  # -1 becomes the last
        if self._on_cpu:
            self._rows_of.clear()
            values, counts = torch.unique_consecutive(slot, return_counts=True)
            self.idle = values.tolist() == [len(self.stack) - 1]
            self._runs = _runs(values.tolist(), counts.tolist())

    def product(self, u: torch.Tensor, place: Place) -> torch.Tensor:
        """v (T, n·r), where each r of v[t] are R[i, slot of t] · u[t, i], of u (T, n·r), contiguous."""
        if not self._runs:
            return self._sum_of_rows(u, place)
        v = torch.empty_like(u)
        first, parts = place.first, place.parts
        for start, stop, slot in self._runs:
            if slot is None:
                v[start:stop] = self._sum_of_rows(u[start:stop], place, start)
            else:
                run = u[start:stop].view(-1, parts, self.rank).transpose(0, 1)
                product = torch.bmm(run, self.stack[slot, first : first + parts])
                v[start:stop].view(-1, parts, self.rank).copy_(product.transpose(0, 1))
        return v

    def add_blocks(self, y: torch.Tensor, x: torch.Tensor, blocks: Sequence[Block], place: Place) -> None:
        """y (T, out) += s·R·x in place, of x (T, in), in one block for each module of `place`."""
        for start, stop, slot in self._runs or [(0, len(x), None)]:
            own_y, own_x = y[start:stop], x[start:stop]
            if slot is None:
                u = torch.cat([self._onto(own_x, block) for block in blocks], dim=1)
                v = self._sum_of_rows(u, place, start)
                for block, part in zip(blocks, v.split(self.rank, 1), strict=True):
                    for of_y, of_R in block.rows:
                        own_y[:, of_y].add_(part[:, of_R])
            elif slot < len(self.stack) - 1:  # of the base there is nothing to add
                for number, block in enumerate(blocks, place.first):
                    for of_x, inner in block.columns:
                        for of_y, outer in block.rows:
                            own_y[:, of_y].addmm_(own_x[:, of_x], self.stack[slot, number, inner, outer])

    def _onto(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """The columns of x (T, r) that a block reads, zero where another process has them."""
        if len(block.columns) == 1 and block.columns[0][1] == slice(0, self.rank):
            return x[:, block.columns[0][0]]
        u = x.new_zeros(len(x), self.rank)
        for of_x, of_R in block.columns:
            u[:, of_R] = x[:, of_x]
        return u

    def _sum_of_rows(self, u: torch.Tensor, place: Place, start: int = 0) -> torch.Tensor:
        """A sum of rows of Rᵀ, weighted by u, is R·u: each R is read where it lies, and none is gathered."""
        # A graph that was captured on an accelerator is padded; the slots of its spare tokens are of an earlier step.
        rows, offsets = self._rows(self._tokens if self._on_cpu else len(u), place.parts)
        rows, offsets = rows[start * place.parts * self.rank :][: u.numel()], offsets[: len(u) * place.parts]
        options = (False, 0, False, u.view(-1))  # a sum, dense, weighted
        return torch.ops.aten._embedding_bag_forward_only(place.rows, rows, offsets, *options)[0].view_as(u)

    def _rows(self, tokens: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For every token and part, the rows of its Rᵀ in the flat stack (T·n·r,), and where each begin (T·n,)."""
        if parts in self._rows_of:  # of another layer with as many
            return self._rows_of[parts]
        part = torch.arange(parts, device=self._slot.device)
        matrix = (self._slot[:tokens, None] * self.stack.shape[1] + part).view(-1, 1)
        rows = (matrix * self.rank + self._columns).view(-1).to(self._slot.dtype)
        offsets = torch.arange(0, len(rows), self.rank, dtype=rows.dtype, device=rows.device)
        if self._on_cpu:
            self._rows_of[parts] = rows, offsets
        return rows, offsets


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
