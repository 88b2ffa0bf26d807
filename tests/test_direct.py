"""What is written past the page cache, or where that cannot be, is what was given, wherever it starts."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorasb_export.merging.direct import PAGE, Buffers, OutputFile


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("direct", [True, False])
def test_ranges_written_by_threads_add_up(
    dtype: torch.dtype, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    rng = random.Random(0)
    whole = torch.tensor(list(rng.randbytes(40 * PAGE + 16)), dtype=torch.uint8)
    cuts = [0, 8, 16, 24, PAGE, *sorted(rng.sample(range(PAGE, len(whole), 8), 12)), len(whole)]
    buffers, out = Buffers(), OutputFile(tmp_path / "file", len(whole))

    def write(start: int, stop: int) -> int:
        value = buffers.take("value", (stop - start) // dtype.itemsize, dtype, start)
        value.view(torch.uint8).copy_(whole[start:stop])
        return out.write(start, value)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, cuts, cuts[1:])) == len(whole)
    assert out.write(3, whole[3 : 2 * PAGE]) == 2 * PAGE - 3  # from memory of any alignment, to any place
    out.close()
    assert (tmp_path / "file").read_bytes() == bytes(whole.tolist())
