"""A merged model in transformers (in vLLM: test_manifests), and a merge whose disk fills up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.random_adapter import save_adapter, write_in  # first: it hides broken optional packages

import torch  # isort: skip
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorasb_export import merge
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import BaseModelError
from lorasb_export.inspection import inspect_folder
from tests.tiny import make_llama, write_index

from .reference import generated

TOKENS = 24
PROMPTS = ["The capital of France is", "Write one sentence about the sea.", "Name three colours."]
MERGE = "import sys; from lorasb_export import merge; merge(*sys.argv[1:3], max_shard_size='20MB')"


def answers(model: PreTrainedModel, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = generated(model, tokenizer, tokenizer(PROMPTS)["input_ids"], TOKENS)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in found]


def test_transformers_and_lorasb_know_the_merged_folder(tmp_path: Path) -> None:
    """Transformers answers as base + adapter does; lorasb says what is in it and refuses it as a base."""
    base = make_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = answers(model, base)
    modules = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    adapter = save_adapter(base, model, tmp_path / "a", modules, rank=16, relative_size=0.5)
    result = merge(tmp_path / "a", tmp_path / "model", dtype="float32", verify=True)
    assert result["verify"]["streamed"]
    assert result["verify"]["relative_difference"] < 1e-4
    write_in(model, adapter)
    expected = answers(model, base)
    assert all(ours != other for ours, other in zip(expected, plain, strict=True))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert answers(merged, tmp_path / "model") == expected
    found = inspect_folder(tmp_path / "model")
    assert (found["kind"], found["adapter"]) == ("merged", {"name": "a", "sha256": adapter.sha256})
    with pytest.raises(BaseModelError, match=rf"already merged \(with adapter a, {adapter.sha256[:12]}\)"):
        merge(tmp_path / "a", tmp_path / "twice", base=tmp_path / "model")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_in_the_middle(small_disk: Path, tmp_path: Path) -> None:
    """There was room when the merge began; then somebody else took it."""
    base = make_llama(tmp_path / "base")
    save_file({f"extra.{i}": torch.full((5_000_000,), float(i)) for i in range(11)}, base / "extra.safetensors")
    write_index(base)
    model = BaseModel.resolve(base).load()
    save_adapter(base, model, tmp_path / "a", ["model.layers.1.mlp.up_proj"])
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    child = subprocess.Popen(
        [sys.executable, "-c", MERGE, str(tmp_path / "a"), str(small_disk / "model")], stderr=subprocess.PIPE, text=True
    )
    while not list(small_disk.glob(".model.merge/.*.safetensors.json")):
        assert child.poll() is None
        time.sleep(0.001)
    try:
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        with (small_disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - (1 << 20))
        child.send_signal(signal.SIGCONT)
        _, messages = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode != 0
    assert "OutputError: cannot write: No space left on device" in messages
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
