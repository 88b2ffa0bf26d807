"""Merged weights: exact, streamed, sharded, in another dtype, as transformers loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.merging import sums
from lorasb_export.merging.layout import parse_size
from tests.merging import MODULES, adapter_for, logits, unmerged_logits
from tests.tiny import make_gpt2, make_llama, write_index

# The peak memory of a merge of each adapter into the folder after it, in a process that has imported and no more.
PEAKS = """
import os, resource, sys
from lorasb_export import merge
for adapter, out in zip(sys.argv[1::2], sys.argv[2::2]):
    if not os.fork():
        merge(adapter, out)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_oracle_14_merged_equals_unmerged(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    result = merge(adapter, tmp_path / "model", verify=True)
    assert result["modules"] == len(MODULES)
    assert result["verify"]["relative_difference"] < 1e-5
    merged = logits(BaseModel.resolve(tmp_path / "model").load())
    assert (merged - unmerged_logits(llama, adapter)).abs().max() < 1e-5
    assert (merged - logits(BaseModel.resolve(llama).load())).abs().max() > 0.1  # the adapter does something


def test_an_adapter_that_is_on_a_model_is_merged_as_it_is(llama: Path, tmp_path: Path) -> None:
    basis = Adapter.load(adapter_for(llama, tmp_path / "a")).load_basis()
    network = BaseModel.resolve(llama).load()
    live = Adapter.attach(network, basis)
    with torch.no_grad():
        for R in live.R.values():
            R += 0.1
    merge(live, tmp_path / "model")
    assert (logits(BaseModel.resolve(tmp_path / "model").load()) - logits(network)).abs().max() < 1e-5


def test_what_moves_the_buffers_of_a_model_leaves_the_basis_alone(llama: Path, tmp_path: Path) -> None:
    """FSDP2 does, in place; of the model's device and dtype the buffer would be the basis's own tensor."""
    basis = Adapter.load(adapter_for(llama, tmp_path / "a")).load_basis()
    network = BaseModel.resolve(llama).load()
    Adapter.attach(network, basis)
    for buffer in network.buffers():
        buffer.data = torch.empty(0)
    assert all(factors.A.numel() and factors.B.numel() for factors in basis.modules.values())


@pytest.mark.parametrize("directions", ["random", "block"])
def test_every_touched_tensor_is_the_float64_sum_rounded_once(directions: str, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = Adapter.load(adapter_for(base, tmp_path / "a", directions=directions))
    merge(tmp_path / "a", tmp_path / "model")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    assert list(before) == list(after)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in adapter.R:
            factors = adapter.load_basis().modules[module]
            B, A = factors.B.double(), factors.A.double()
            exact = tensor.double() + adapter.scaling * B @ adapter.R[module].double() @ A
            assert (exact.to(torch.bfloat16) == after[name]).float().mean() > 0.999
            assert torch.allclose(exact, after[name].double(), rtol=2**-8, atol=0)  # never off by more than one ulp
        else:
            assert torch.equal(tensor, after[name])


def test_sharded_base_and_sharded_output(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", shards="40KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = adapter_for(base, tmp_path / "a")
    result = merge(adapter, tmp_path / "model", max_shard_size="30KB")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == result["shards"] > 2
    assert index["metadata"]["total_size"] == result["bytes"]
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert (logits(BaseModel.resolve(tmp_path / "model").load()) - unmerged_logits(base, adapter)).abs().max() < 1e-5


def test_parse_size() -> None:
    assert [parse_size(size) for size in ("5GB", "10 MB", "3kb", "7", 9)] == [5 * 10**9, 10**7, 3000, 7, 9]
    for size in ("²GB", "٥GB", "1.5GB"):
        with pytest.raises(SettingsError, match="is not a whole number with KB, MB or GB"):
            parse_size(size)


def test_the_weights_are_those_that_transformers_loads(tmp_path: Path) -> None:
    """A second file of weights beside model.safetensors, a backup or its maker's own format, is not read."""
    base = make_llama(tmp_path / "base")
    adapter, before = adapter_for(base, tmp_path / "a"), load_file(base / "model.safetensors")
    backup = {name: torch.zeros_like(tensor) for name, tensor in before.items()} | {"more": torch.zeros(1)}
    save_file(backup, base / "model_backup.safetensors")
    merge(adapter, tmp_path / "model", verify=True)
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert set(after) == set(before)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_other_dtype(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    merge(adapter, tmp_path / "model", dtype="bfloat16", verify=True)
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(SettingsError, match="dtype is 'int8'"):
        merge(adapter, tmp_path / "other", dtype="int8")


def test_an_older_config_names_the_new_dtype_alone(llama: Path, tmp_path: Path) -> None:
    """Its `torch_dtype` would be read by older programs, as that of the base."""
    base = shutil.copytree(llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    merge(adapter_for(base, tmp_path / "a"), tmp_path / "model", dtype="float16")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("float16", False)


def test_a_buffer_that_float16_cannot_hold_is_bounded_and_a_weight_refused(llama: Path, tmp_path: Path) -> None:
    """GPT-Neo's and GPT-J's checkpoints hold a mask of -1e9 that nobody reads."""
    base = shutil.copytree(llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.masked_bias": torch.tensor([-1e9])}, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_for(base, tmp_path / "a")
    merge(adapter, tmp_path / "model", dtype="float16")
    stored = load_file(tmp_path / "model" / "model.safetensors")["model.masked_bias"]
    assert float(stored) == torch.finfo(torch.float16).min
    save_file({**tensors, "model.odd.weight": torch.tensor([-1e9])}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.odd\.weight does not fit float16"):
        merge(adapter, tmp_path / "other", dtype="float16")


def test_a_sum_that_float16_cannot_hold_is_refused_whichever_block_it_is_in(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "BLOCK", 2 * 32)  # of bf16 one in eight would be measured, and not the last
    base, module = shutil.copytree(llama, tmp_path / "base"), "model.layers.0.self_attn.q_proj"
    tensors = load_file(base / "model.safetensors")
    tensors[f"{module}.weight"][-1, -1] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_for(base, tmp_path / "a", [module])
    with pytest.raises(ArtifactError, match=rf"module {module} does not fit the stored dtype"):
        merge(adapter, tmp_path / "model", dtype="float16")
    assert not (tmp_path / "model").exists()


def test_gpt2_stores_its_weights_transposed(tmp_path: Path) -> None:
    """attn.c_proj is square: its orientation cannot be told from its shape."""
    base = make_gpt2(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "a", ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"])
    merge(adapter, tmp_path / "model")
    assert (logits(BaseModel.resolve(tmp_path / "model").load()) - unmerged_logits(base, adapter)).abs().max() < 1e-5


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak RSS of a merge of 400 MB of untouched tensors stays within 100 MB of that of a tiny one."""
    small = make_llama(tmp_path / "small")
    large = tmp_path / "large"
    shutil.copytree(small, large)
    save_file({f"extra.{i}": torch.zeros(5_000_000) for i in range(20)}, large / "extra.safetensors")
    write_index(large)
    folders = []
    for base in (small, large):
        folders += [str(adapter_for(base, tmp_path / f"a-{base.name}")), str(tmp_path / f"m-{base.name}")]
    done = subprocess.run([sys.executable, "-c", PEAKS, *folders], capture_output=True, text=True, check=True)
    peaks = [int(line) / 1024 for line in done.stdout.splitlines()]
    assert peaks[1] - peaks[0] < 100


def test_torch_has_its_threads_again_after_a_merge(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    torch.set_num_threads(2)
    try:
        merge(adapter, tmp_path / "model")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
