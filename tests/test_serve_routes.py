"""The product by token: every one meets the R of its slot."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lorasb_export.serving.shared.routes import Block, Routes

SLOTS, RANK = 3, 4


@pytest.mark.parametrize(
    "slots",
    [
        [0],
        [-1, 0, 2, 1, -1, 0],  # decode
        [1] * 9,  # one prompt
        [-1] * 9 + [0, 2, -1] + [2] * 20 + [1],  # prompts and decode in one step
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_every_token_meets_the_R_of_its_slot(slots: list[int], parts: int) -> None:
    R = torch.randn(SLOTS + 1, 4, RANK, RANK)
    R[SLOTS] = 0
    first = 4 - parts
    u = torch.randn(max(3, len(slots)), parts, RANK)
    routes = Routes(R.mT.contiguous(), 64)
    for wrong in ([0, 1, 2], slots):  # a step before this one leaves nothing behind
        routes.update(torch.tensor(wrong))
        v = routes.product(u[: len(wrong)].flatten(1), parts, first).view(-1, parts, RANK)
    expected = torch.stack(
        [torch.einsum("ijk,ik->ij", R[slot, first:], row) for slot, row in zip(slots, u, strict=False)]
    )
    torch.testing.assert_close(v, expected)
    base = torch.tensor(slots) < 0
    assert not v[base].any()
    spans = [(slice(0, RANK), slice(RANK * part, RANK * (part + 1))) for part in range(parts)]
    columns, rows = torch.arange(RANK * parts), torch.arange(8)
    blocks = [Block.of(columns, rows, block, 8 * part) for part, block in enumerate(spans)]
    y = torch.zeros(len(slots), 8 * parts)
    routes.add_blocks(y, u[: len(slots)].flatten(1), blocks, first)
    torch.testing.assert_close(y.view(-1, parts, 8), torch.cat([expected, torch.zeros_like(expected)], dim=-1))


@pytest.mark.parametrize("slots", [[0, -1, 2], [1] * 9])
@pytest.mark.parametrize("columns", [[range(12)], [range(6), range(6, 12)], [range(9), range(9, 12)]])
@pytest.mark.parametrize("rows", [[range(10)], [range(5), range(5, 10)], [[0, 1, 2, 5, 6], [3, 4, 7, 8, 9]]])
def test_a_block_may_lie_in_several_processes(
    slots: list[int], columns: list[Sequence[int]], rows: list[Sequence[int]]
) -> None:
    """Each has some columns or some rows of W; of a module that fills several slices, some of each."""
    block, R = (slice(3, 3 + RANK), slice(5, 5 + RANK)), torch.randn(SLOTS + 1, 1, RANK, RANK)
    R[SLOTS] = 0
    routes = Routes(R.mT.contiguous(), 64)
    routes.update(torch.tensor(slots))
    x, expected = torch.randn(len(slots), 12), torch.zeros(len(slots), 10)
    expected[:, block[0]] = torch.stack([R[slot, 0] @ row for slot, row in zip(slots, x[:, block[1]], strict=True)])
    found = torch.zeros_like(expected)
    for own_columns in columns:
        for own_rows in rows:
            y = torch.zeros(len(slots), 2 + len(own_rows))
            own = Block.of(torch.tensor(own_columns), torch.tensor(own_rows), block, 2)
            routes.add_blocks(y, x[:, list(own_columns)], [own], 0)
            assert not y[:, :2].any()
            found[:, list(own_rows)] += y[:, 2:]
    torch.testing.assert_close(found, expected)


def test_a_step_of_the_base_alone_is_idle() -> None:
    routes = Routes(torch.zeros(SLOTS + 1, 1, RANK, RANK), 64)
    routes.update(torch.tensor([-1, -1]))
    assert routes.idle
    routes.update(torch.tensor([-1, 2]))
    assert not routes.idle
