"""Merging: exact, streamed, tied, byte for byte where nothing changes; refused before a byte is written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, calibrate, fit, merge
from lorasb_export.base import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.errors import ArtifactError, BaseModelError, OutputError, SettingsError
from lorasb_export.head import head_parameters
from lorasb_export.merging.plan import parse_size
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.storage import read_json, write_json
from tests.random_adapter import save_adapter
from tests.tiny import make_bert, make_gpt2, make_llama, write_index

MODULES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])


def adapter_for(
    base: Path, folder: Path, modules: list[str] = MODULES, task_type: str = "CAUSAL_LM", directions: str = "random"
) -> Path:
    model = BaseModel.resolve(base).load(task_type, num_labels=3 if task_type == SEQ_CLS else None)
    save_adapter(base, model, folder, modules, task_type=task_type, relative_size=0.3, directions=directions)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def unmerged_logits(base: Path, adapter: Path, task_type: str = "CAUSAL_LM") -> torch.Tensor:
    network = BaseModel.resolve(base).load(task_type, num_labels=3 if task_type == SEQ_CLS else None)
    Adapter.load(adapter).inject(network)
    return logits(network)


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


def test_side_files_are_byte_equal_and_ties_stay_tied(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    for name in ("chat_template.jinja", "vocab.json", "merges.txt", "bpe.codes", "tokenizer.model.v3", "modeling_x.py"):
        (base / name).write_text(f"{name} of the base")
    for name in ("LICENSE", "LICENSE.md", "MODEL_LICENSE", "NOTICE", "USE_POLICY.md", "preprocessor_config.json"):
        (base / name).write_text(f"{name} of the base")
    left = {"model.safetensors", "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "SHA256SUMS"}
    left |= {".x.json", "events.out.tfevents.17.host", "train.jsonl"}
    for name in left - {"model.safetensors"}:
        (base / name).write_text(f"{name} of the base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("a template of a name")
    merge(adapter_for(base, tmp_path / "a"), tmp_path / "model")
    for path in filter(Path.is_file, base.rglob("*")):
        copied = tmp_path / "model" / path.relative_to(base)
        same = copied.is_file() and copied.read_bytes() == path.read_bytes()
        assert same == (path.name not in left), path.name
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    network = BaseModel.resolve(tmp_path / "model").load()
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert "library_name: transformers" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("named", [97, [97, 96], None])
def test_answers_of_transformers_end_where_trained_answers_end(llama: Path, tmp_path: Path, named: object) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "generation_config.json").unlink()
    if named is None:
        write_json(base / "config.json", read_json(base / "config.json") | {"eos_token_id": 97})
    else:
        write_json(base / "generation_config.json", {"eos_token_id": named, "repetition_penalty": 1.3})
    merge(adapter_for(base, tmp_path / "a"), tmp_path / "model")
    config = BaseModel.resolve(tmp_path / "model").load().generation_config
    assert config.eos_token_id == ([97, 96, 2] if named == [97, 96] else [97, 2])
    assert config.repetition_penalty == (1.3 if named else None)  # of a chat, as the base has it
    assert config.pad_token_id == (None if named else 2)


def test_no_link_of_the_base_brings_another_file_along(llama: Path, tmp_path: Path) -> None:
    base, secret, blobs = tmp_path / "base", tmp_path / "secret", tmp_path / "models--me--x" / "blobs"
    shutil.copytree(llama, base)
    adapter = adapter_for(base, tmp_path / "a")
    blobs.mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    links = {blobs / "0a1b": "vocab.txt", tmp_path / "shared" / "merges.txt": "merges.txt", secret: "notes.txt"}
    for target, link in links.items():
        target.write_text(link)
        (base / link).symlink_to(target)
    with pytest.raises(BaseModelError, match=r"a link to another file, .*secret \(.*notes.txt\)"):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (base / "notes.txt").unlink()
    merge(adapter, tmp_path / "model")  # as the Hub's cache holds every file, or a folder of links to a shared one
    for name in ("vocab.txt", "merges.txt"):
        assert (tmp_path / "model" / name).read_text() == name


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


def test_code_that_stays_on_the_hub_is_named_there(llama: Path, tmp_path: Path) -> None:
    """A base of the Hub is fetched without it, and whoever trusts remote code would look for it in the folder."""
    base = shutil.copytree(llama, tmp_path / "base")
    named = {"AutoConfig": "odd.OddConfig", "AutoModel": "other/repo--odd.Odd"}
    write_json(base / "config.json", read_json(base / "config.json") | {"auto_map": named})
    adapter = adapter_for(base, tmp_path / "a")
    merge(adapter, tmp_path / "here")
    assert read_json(tmp_path / "here" / "config.json")["auto_map"] == named
    of_hub = replace(BaseModel.resolve(base), name_or_path="owner/odd")
    merge(adapter, tmp_path / "there", base=of_hub)
    wanted = {**named, "AutoConfig": "owner/odd--odd.OddConfig"}
    assert read_json(tmp_path / "there" / "config.json")["auto_map"] == wanted


def test_gpt2_stores_its_weights_transposed(tmp_path: Path) -> None:
    """attn.c_proj is square: its orientation cannot be told from its shape."""
    base = make_gpt2(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "a", ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"])
    merge(adapter, tmp_path / "model")
    assert (logits(BaseModel.resolve(tmp_path / "model").load()) - unmerged_logits(base, adapter)).abs().max() < 1e-5


def test_classifier_with_its_head(tmp_path: Path) -> None:
    """The checkpoint is a body without prefix; the merged folder loads as a classifier, strictly."""
    from transformers import AutoModelForSequenceClassification

    base = make_bert(tmp_path / "base")
    modules = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    path = adapter_for(base, tmp_path / "a", modules, SEQ_CLS)
    positions = {"embeddings.position_ids": torch.arange(8)[None]}  # of a BERT saved years ago; first in the file
    save_file(load_file(base / "model.safetensors") | positions, base / "model.safetensors", {"format": "pt"})
    adapter = Adapter.load(path)
    adapter.training = {"labels": ["red", "green", "blue"]}
    merge(adapter, tmp_path / "model")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert info["unexpected_keys"] <= {"bert.embeddings.position_ids"}
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert all(torch.equal(p, adapter.head[name]) for name, p in head_parameters(model).items())
    assert (logits(model.eval()) - unmerged_logits(base, tmp_path / "a", SEQ_CLS)).abs().max() < 1e-5


def test_refusals_write_nothing(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="the target exists"):
        merge(adapter, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "full")
    with pytest.raises(BaseModelError, match="not found"):
        merge(adapter, tmp_path / "model", base=tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="file not found"):
        merge(tmp_path, tmp_path / "model")
    with pytest.raises(SettingsError, match="is not a whole number with"):
        merge(adapter, tmp_path / "model", max_shard_size="many")
    assert sorted(tmp_path.rglob("*")) == before


def test_no_adapter_is_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no adapter to merge. Name at least one"):
        merge({}, tmp_path / "out")


def test_another_and_a_merged_base_are_refused(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    merge(adapter, tmp_path / "model")
    with pytest.raises(BaseModelError, match="already merged"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "model")
    (tmp_path / "model" / "lorasb.json").write_text('{"kind": "merged"}')  # edited by hand
    with pytest.raises(BaseModelError, match="already merged"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "model")
    (tmp_path / "model" / "lorasb.json").unlink()  # and without the note, by the fingerprint
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "model")
    assert not (tmp_path / "twice").exists()


def test_a_merged_model_is_the_base_of_nothing(llama: Path, sums: Path, tmp_path: Path) -> None:
    """What is calibrated or trained on it would be refused by all else, once the time is spent."""
    merge(adapter_for(llama, tmp_path / "a"), tmp_path / "model")
    base, before = str(tmp_path / "model"), sorted(tmp_path.rglob("*"))
    gradient, drawn = CalibrationSettings(rank=4), CalibrationSettings(rank=4, directions="random")
    for attempt in (
        lambda: calibrate(base, {"sums": sums}, gradient),
        lambda: calibrate(base, {}, drawn),
        lambda: fit(base, gradient, sums, tmp_path / "b", FitSettings(max_steps=1)),
        lambda: fit(base, calibrate(str(llama), {}, drawn), sums, tmp_path / "b", FitSettings(max_steps=1)),
    ):
        with pytest.raises(BaseModelError, match=rf"already merged .*Use the plain base, {llama}"):
            attempt()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tensor_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    adapter = Adapter.load(adapter_for(base, tmp_path / "a"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 40)
    save_file(tensors, base / "model.safetensors")
    adapter.base = BaseModel.resolve(base).ref(adapter.R)  # the fingerprint alone would catch it
    with pytest.raises(ArtifactError, match=r"is F32 \[64, 40\], the basis was made for \[64, 32\]"):
        merge(adapter, tmp_path / "model")


def test_no_disk_space_is_seen_before_writing(llama: Path, tmp_path: Path) -> None:
    """A base that claims 8 TB in a sparse file: no disk here has room for it."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    adapter = adapter_for(base, tmp_path / "a")
    elements = 2 * 10**12
    header = {"huge": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}
    text = json.dumps(header).encode()
    with (base / "huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * elements)
    write_index(base)
    with pytest.raises(OutputError, match=r"not enough disk: 8000\.0 GB needed"):
        merge(adapter, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_what_is_merged_is_not_overwritten(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "adapters" / "a")
    for out, why in ((adapter, "the target holds what it is made from"), (adapter.parent, "not a folder lorasb wrote")):
        with pytest.raises(OutputError, match=why):
            merge(adapter, out, overwrite=True)
    assert (adapter / "adapter.safetensors").exists()
    with pytest.raises(SettingsError, match="the report's folder is not there"):
        merge(adapter, tmp_path / "model", report=tmp_path / "nowhere" / "kept.json")
    (tmp_path / "kept.png").write_text("a picture of mine")
    with pytest.raises(OutputError, match=r"the report exists \(.*kept\.png\)"):
        merge(adapter, tmp_path / "model", report=tmp_path / "kept.json")
    assert not (tmp_path / "model").exists()


def test_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    plan = merge(adapter_for(llama, tmp_path / "a"), tmp_path / "model", dry_run=True)
    assert (plan["modules"], plan["shards"]) == (6, 1)
    assert plan["bytes"] == sum(t.numel() * 4 for t in load_file(llama / "model.safetensors").values())
    assert not (tmp_path / "model").exists()


def test_interrupted_in_the_middle_leaves_no_model(llama: Path, tmp_path: Path) -> None:
    """The child interrupts itself between two tensors; a restart succeeds and cleans up. Kills: test_merge_resume."""
    adapter = adapter_for(llama, tmp_path / "a")
    script = (
        "import os, sys; from lorasb_export import merge; from lorasb_export.merging import write as module\n"
        "real = module._update\n"
        "def stopping(tensor, plan):\n"
        "    print(tensor.name, flush=True)\n"
        "    if tensor.name == 'model.layers.1.mlp.up_proj.weight': os.kill(os.getpid(), int(sys.argv[3]))\n"
        "    return real(tensor, plan)\n"
        "module._update = stopping\n"
        "merge(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", script, str(adapter), str(tmp_path / "model"), str(int(signal.SIGINT))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT, done.stderr  # Python ends so where nobody takes KeyboardInterrupt
    begun = done.stdout.split()
    assert len(begun) > 1
    assert begun[-1] == "model.layers.1.mlp.up_proj.weight"
    assert not (tmp_path / "model").exists()
    merge(adapter, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak RSS of a merge of 400 MB of untouched tensors stays within 100 MB of that of a tiny one."""
    small = make_llama(tmp_path / "small")
    large = tmp_path / "large"
    shutil.copytree(small, large)
    save_file({f"extra.{i}": torch.zeros(5_000_000) for i in range(20)}, large / "extra.safetensors")
    write_index(large)
    script = (
        "import resource, sys; from lorasb_export import merge; merge(*sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for base in (small, large):
        adapter = adapter_for(base, tmp_path / f"a-{base.name}")
        done = subprocess.run(
            [sys.executable, "-c", script, str(adapter), str(tmp_path / f"m-{base.name}")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 100


def test_parse_size() -> None:
    assert [parse_size(size) for size in ("5GB", "10 MB", "3kb", "7", 9)] == [5 * 10**9, 10**7, 3000, 7, 9]
    for size in ("²GB", "٥GB", "1.5GB"):
        with pytest.raises(SettingsError, match="is not a whole number with KB, MB or GB"):
            parse_size(size)
