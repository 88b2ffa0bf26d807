"""Format version 1, read off its page and not by the code that writes it: what was published has to stay readable."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasb_export.base.model import BaseModel
from lorasb_export.format import sealed
from lorasb_export.settings import BLOCK
from tests.random_adapter import LLAMA_MODULES, save_adapter

ROOT = Path(__file__).parents[1]


def test_the_seal_of_a_config() -> None:
    by_hand = hashlib.sha256(b'{"a":"\\u00e9","b":1}').hexdigest()
    assert sealed({"b": 1, "a": "é"})["config_sha256"] == by_hand


def test_the_fingerprint_of_a_base(tmp_path: Path) -> None:
    """Three pages of each target, from its first byte, its middle one and its last."""
    save_file({"m.weight": torch.arange(6000.0).reshape(60, 100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    stored = struct.pack("<6000f", *range(6000))
    sampled = stored[:4096] + stored[12000:16096] + stored[-4096:]
    by_hand = hashlib.sha256(json.dumps(["m", [60, 100], "F32"]).encode() + sampled).hexdigest()
    assert BaseModel.resolve(tmp_path).fingerprint(["m"]) == by_hand


def test_a_block_is_applied_by_the_lines_of_the_docs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, ours = (BaseModel.resolve(llama).load() for _ in range(2))
    adapter = save_adapter(llama, model, Path("adapters/a"), LLAMA_MODULES, relative_size=0.3, directions=BLOCK)
    adapter.inject(ours)
    blocks = (ROOT / "docs" / "how-to" / "basis.md").read_text().split("```python\n")[1:]
    (lines,) = [block.partition("```")[0] for block in blocks if ".block" in block]
    ids = torch.tensor([[1, 20, 21, 22, 23, 2]])
    before = model(ids).logits
    exec(lines, {"model": model})
    torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
