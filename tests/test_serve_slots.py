"""The product by token: every one meets the R of its slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lorasb_export.serving.shared.slots import Block, Slots

SLOTS, RANK = 3, 4


@pytest.mark.parametrize(
    "tokens",
    [
        [0],
        [-1, 0, 2, 1, -1, 0],  # decode
        [1] * 9,  # one prompt
        [-1] * 9 + [0, 2, -1] + [2] * 20 + [1],  # prompts and decode in one step
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_every_token_meets_the_R_of_its_slot(tokens: list[int], parts: int) -> None:
    R = torch.randn(SLOTS + 1, 4, RANK, RANK)
    R[SLOTS] = 0
    first = 4 - parts
    u = torch.randn(max(3, len(tokens)), parts, RANK)
    slots = Slots(R.mT.contiguous(), 64)
    for wrong in ([0, 1, 2], tokens):  # a step before this one leaves nothing behind
        slots.update(torch.tensor(wrong))
        v = slots.product(u[: len(wrong)].flatten(1), slots.place(first, parts)).view(-1, parts, RANK)
    expected = torch.stack(
        [torch.einsum("ijk,ik->ij", R[slot, first:], row) for slot, row in zip(tokens, u, strict=False)]
    )
    torch.testing.assert_close(v, expected)
    base = torch.tensor(tokens) < 0
    assert not v[base].any()
    spans = [(slice(0, RANK), slice(RANK * part, RANK * (part + 1))) for part in range(parts)]
    columns, rows = torch.arange(RANK * parts), torch.arange(8)
    blocks = [Block.of(columns, rows, block, 8 * part) for part, block in enumerate(spans)]
    y = torch.zeros(len(tokens), 8 * parts)
    slots.add_blocks(y, u[: len(tokens)].flatten(1), blocks, slots.place(first, parts))
    torch.testing.assert_close(y.view(-1, parts, 8), torch.cat([expected, torch.zeros_like(expected)], dim=-1))


@pytest.mark.parametrize("tokens", [[0, -1, 2], [1] * 9])
@pytest.mark.parametrize("columns", [[range(12)], [range(6), range(6, 12)], [range(9), range(9, 12)]])
@pytest.mark.parametrize("rows", [[range(10)], [range(5), range(5, 10)], [[0, 1, 2, 5, 6], [3, 4, 7, 8, 9]]])
def test_a_block_may_lie_in_several_processes(
    tokens: list[int], columns: list[Sequence[int]], rows: list[Sequence[int]]
) -> None:
    """Each has some columns or some rows of W; of a module that fills several slices, some of each."""
    block, R = (slice(3, 3 + RANK), slice(5, 5 + RANK)), torch.randn(SLOTS + 1, 1, RANK, RANK)
    R[SLOTS] = 0
    slots = Slots(R.mT.contiguous(), 64)
    slots.update(torch.tensor(tokens))
    x, expected = torch.randn(len(tokens), 12), torch.zeros(len(tokens), 10)
    expected[:, block[0]] = torch.stack([R[slot, 0] @ row for slot, row in zip(tokens, x[:, block[1]], strict=True)])
    found = torch.zeros_like(expected)
    for own_columns in columns:
        for own_rows in rows:
            y = torch.zeros(len(tokens), 2 + len(own_rows))
            own = Block.of(torch.tensor(own_columns), torch.tensor(own_rows), block, 2)
            slots.add_blocks(y, x[:, list(own_columns)], [own], slots.place(0, 1))
            assert not y[:, :2].any()
            found[:, list(own_rows)] += y[:, 2:]
    torch.testing.assert_close(found, expected)


def test_layers_of_as_many_parts_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler takes the second from its cache: neither code nor sizes differ, only what is read. On a GPU, whose
    way through `product` is taken here."""
    slots = Slots(torch.randn(SLOTS + 1, 5, RANK, RANK), 64)
    monkeypatch.setattr(slots, "_on_cpu", False)
    slots.update(torch.tensor([0, -1, 2]))
    graphs: list[tuple[str, list[torch.Size]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append((graph.code, [tensor.shape for tensor in inputs]))
        return graph.forward

    u = torch.randn(3, 2 * RANK)
    found = []
    for first in (0, 2, 3):
        torch.compiler.reset()
        compiled = torch.compile(slots.product, backend=keep, fullgraph=True)
        found.append(compiled(u, slots.place(first, 2)))
        torch.testing.assert_close(found[-1], slots.product(u, slots.place(first, 2)))
    assert graphs[0] == graphs[1] == graphs[2]
    assert not torch.equal(found[0], found[1])


def test_a_step_of_the_base_alone_is_idle() -> None:
    slots = Slots(torch.zeros(SLOTS + 1, 1, RANK, RANK), 64)
    slots.update(torch.tensor([-1, -1]))
    assert slots.idle
    slots.update(torch.tensor([-1, 2]))
    assert not slots.idle
