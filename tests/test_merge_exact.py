"""Every touched entry is the float64 sum rounded once, whatever the dtype; and what is said to be kept, is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from lorasb_export import merge
from lorasb_export.base.model import BaseModel
from lorasb_export.base.products import weight_of
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.merging import retained, sums, write
from lorasb_export.merging.retained import Retained
from lorasb_export.merging.sums import Update, add
from lorasb_export.settings import BLOCK
from tests.random_adapter import save_adapter
from tests.tiny import make_llama

ROWS, COLUMNS, RANK = 768, 515, 16


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "BLOCK", 100 * COLUMNS)


def merged(
    dtype: torch.dtype, size: float, *, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Retained]:
    """(W0, Δ in float64, what was stored, what is said of it) for an update of relative size `size`."""
    generator = torch.Generator().manual_seed(0)
    shape = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    B, A = (torch.linalg.qr(torch.randn(n, RANK, generator=generator))[0] for n in shape)
    R = torch.randn(RANK, RANK, generator=generator)
    R *= size * 0.02 * (ROWS * COLUMNS) ** 0.5 / R.norm() / 2
    weights = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).to(dtype)
    weights[3] = 0  # a row of padding: its sums are as small as Δ
    factors = ModuleBasis(B, A.T.contiguous(), torch.ones(RANK))
    update = Update.of([(factors, R, 2.0)], transposed=transposed, source=dtype, stored=dtype)
    out = torch.empty_like(weights)
    found = Retained()
    for start in range(0, ROWS, 256):
        rows = slice(start, start + 256)
        found += add(weights[rows], update, rows, out[rows], measure=1)
        again = torch.empty_like(out[rows])
        add(weights[rows], update, rows, again, measure=2**30)
        assert (again != out[rows]).float().mean() < 1e-4
    delta = 2.0 * B.double() @ R.double() @ A.double().T
    return weights, delta.T if transposed else delta, out, found


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    low = torch.iinfo(integers).max
    x, y = (torch.where(bits < 0, -(bits & low), bits) for bits in (t.view(integers).long() for t in (a, b)))
    return (x - y).abs()


def rounded_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """numpy rounds float64 → fp16 in one step; for bf16 the 45 lowest bits are rounded off before torch sees it."""
    if dtype != torch.bfloat16:
        return torch.from_numpy(values.numpy().astype({torch.float16: np.float16, torch.float32: np.float32}[dtype]))
    bits = values.numpy().view(np.uint64)
    kept, rest = bits >> np.uint64(45), bits & np.uint64((1 << 45) - 1)
    kept = kept + ((rest > 1 << 44) | ((rest == 1 << 44) & (kept % 2 == 1))).astype(np.uint64)
    return torch.from_numpy((kept << np.uint64(45)).view(np.float64)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_that_of_float64_rounded_once(dtype: torch.dtype, size: float, transposed: bool) -> None:
    weights, delta, out, _ = merged(dtype, size, transposed=transposed)
    steps = ulps(rounded_once(weights.double() + delta, dtype), out)
    assert steps.max() <= 1
    assert (steps == 0).double().mean() >= 0.9999


def test_factors_on_a_device_are_folded_on_the_host() -> None:
    """Where the basis was loaded onto it."""
    with FakeTensorMode():  # tensors without values, of any device
        B, R, A, S = (torch.empty(shape, device="cuda") for shape in [(6, 2), (2, 2), (2, 5), (2,)])
        parts = [(ModuleBasis(B, A, S), R, 1.0)]
        update = Update.of(parts, transposed=False, source=torch.float32, stored=torch.float32)
    assert update.left.device == update.right.device == torch.device("cpu")


@pytest.mark.parametrize(("size", "cosine"), [(1e-2, 0.987), (1e-3, 0.641), (1e-4, 0.214)])
def test_what_bf16_retains(size: float, cosine: float) -> None:
    """The cosines are those the neighbours' dossier measured; said, measured and foretold agree."""
    weights, delta, out, said = merged(torch.bfloat16, size)
    kept = out.double() - weights.double()
    assert said.cosine == pytest.approx(float((kept * delta).sum() / kept.norm() / delta.norm()), abs=1e-4)
    assert said.relative_error == pytest.approx(float((kept - delta).norm() / delta.norm()), rel=1e-4)
    assert said.cosine == pytest.approx(cosine, abs=0.03)
    guess = retained.expected(weights.view(-1)[4000:8000], size * 0.02, torch.bfloat16)
    assert guess.cosine == pytest.approx(cosine, abs=0.06)


def test_where_one_block_in_eight_is_measured_it_stands_for_all() -> None:
    """Or a module of many blocks would count an eighth of one with a single block."""
    rows, columns, generator = 3 * sums.BLOCK // 64, 64, torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator).bfloat16()
    B, A = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
    parts = [(ModuleBasis(B, A, torch.ones(4)), torch.eye(4), 1e-2)]
    update = Update.of(parts, transposed=False, source=torch.bfloat16, stored=torch.bfloat16)
    of_all, of_one = (
        sums.add(weights, update, slice(0, rows), torch.empty_like(weights), measure=measure) for measure in (1, 8)
    )
    assert of_one.delta == pytest.approx(of_all.delta, rel=0.02)
    assert of_one.error == pytest.approx(of_all.error, rel=0.02)


def test_a_warning_names_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        retained.warn({"cosine": 0.95, "relative_error": 0.3}, "BF16")
        assert not caplog.text
        retained.warn({"cosine": 0.5, "relative_error": 0.9}, "BF16")
    assert "--dtype float16 or float32, or serve the adapter unmerged" in caplog.text


def test_nothing_to_keep_is_all_kept() -> None:
    assert (Retained().cosine, Retained().relative_error) == (1.0, 0.0)
    assert Retained(1.0, 1.0, -1.0).cosine == 0.0  # nothing moved


def test_of_a_block_every_row_is_measured_and_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R lies in a few rows of W, of which one piece in eight may hold none."""
    monkeypatch.setattr(sums, "BLOCK", 4 * 64)
    monkeypatch.setattr(write, "PIECE", 4 * 64)
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16, width=64)
    network = BaseModel.resolve(base).load()
    modules = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")]
    adapter = save_adapter(base, network, tmp_path / "a", modules, rank=16, relative_size=1e-3, directions=BLOCK)
    foretold = merge(adapter, tmp_path / "m", dry_run=True)["expected_retained"]
    merge(adapter, tmp_path / "m", report=tmp_path / "kept.json")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    said = json.loads((tmp_path / "kept.json").read_text())
    stored = BaseModel.resolve(tmp_path / "m").load()
    for name in modules:
        factors, before = adapter.load_basis().modules[name], weight_of(network.get_submodule(name)).double()
        delta = adapter.scaling * (factors.B.double() @ adapter.R[name].double() @ factors.A.double())
        kept = weight_of(stored.get_submodule(name)).double() - before
        cosine = float((kept * delta).sum() / kept.norm() / delta.norm())
        assert said["modules"][name]["cosine"] == pytest.approx(cosine, abs=1e-3)
    least = min(modules, key=lambda name: said["modules"][name]["cosine"])
    assert said["worst"] == {"module": least, **said["modules"][least]}
    assert foretold["cosine"] == pytest.approx(said["cosine"], abs=0.05)
