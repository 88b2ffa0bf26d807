"""A merge that is killed goes on where it was; one at a time; all problems at once; several adapters as one."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasb_export.merging.merge
from lorasb_export import Adapter, Basis, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.errors import ArtifactError, BaseModelError, OutputError, SettingsError
from lorasb_export.files.lock import only_writer
from lorasb_export.files.storage import read_json
from lorasb_export.merging import plan
from lorasb_export.merging.folder import bytes_of_an_earlier_try, resumable_folder
from tests.merging import MODULES, adapter_for
from tests.random_adapter import save_adapter
from tests.tiny import make_llama

# Forks after the imports: each child merges, and is killed at its n-th call of one that changes the disk.
KILLING = """
import itertools, os, signal, sys
from lorasb_export import merge
def kill_at(name, n):
    calls, real = itertools.count(), getattr(os, name)
    def call(*a, **k):
        if next(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(os, name, call)
for moment in sys.argv[3:]:
    pid = os.fork()
    if not pid:
        name, n = moment.split(":")
        kill_at(name, int(n))
        try: merge(sys.argv[1], sys.argv[2], max_shard_size="30KB")
        finally: os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.path.exists(sys.argv[2]))
"""
# What is replaced are the shards' marks.
MOMENTS = ["mkdir:0", "posix_fallocate:0", "pwrite:0", "pwrite:9", "fsync:1", "replace:1", "pwrite:3", "replace:1"]


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", MODULES, relative_size=0.3)
    return tmp_path / "a"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_killed_again_and_again_it_ends_with_the_same_bytes(adapter: Path, tmp_path: Path) -> None:
    """Every try of one folder is killed a little later than the last; what remains goes to the next."""
    merge(adapter, tmp_path / "whole", max_shard_size="30KB")
    command = [sys.executable, "-c", KILLING, str(adapter), str(tmp_path / "model"), *MOMENTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-9 False"] * len(MOMENTS), done.stdout + done.stderr
    result = merge(adapter, tmp_path / "model", max_shard_size="30KB")
    assert 2 <= result["shards_reused"] < result["shards"]
    assert digests(tmp_path / "model") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model", "whole"]


def test_finished_shards_are_reused_for_the_same_plan_alone(adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with suppress(KeyboardInterrupt), resumable_folder(target, "one plan") as folder:
        (folder.path / "model.safetensors").write_bytes(b"weights")
        folder.mark("model.safetensors", {"retained": {}})
        raise KeyboardInterrupt
    with suppress(KeyboardInterrupt), resumable_folder(target, "one plan") as folder:
        assert folder.finished("model.safetensors") == {"bytes": 7, "retained": {}}
        (folder.path / "model.safetensors").write_bytes(b"short")
        assert folder.finished("model.safetensors") is None
        raise KeyboardInterrupt
    with suppress(KeyboardInterrupt), resumable_folder(target, "another plan") as folder:
        assert folder.finished("model.safetensors") is None
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_killed_while_it_is_put_in_place_the_shards_are_still_there(
    adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what of the base is not there any more is not in the merged folder either."""
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text("a bad one")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorasb_export.merging.folder.put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, tmp_path / "model", base=base)
    (base / "chat_template.jinja").unlink()
    result = merge(adapter, tmp_path / "model", base=base)
    assert result["shards_reused"] == result["shards"]
    assert not [path.name for path in (tmp_path / "model").iterdir() if path.name.startswith((".", "chat_template"))]


def test_the_room_that_an_earlier_try_takes_is_not_asked_for_again(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = merge(adapter, tmp_path / "model", dry_run=True)["bytes"] + plan._MARGIN_BYTES

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorasb_export.merging.folder.put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(OutputError, match="not enough disk"):
        merge(adapter, tmp_path / "other")
    assert merge(adapter, tmp_path / "model")["shards_reused"] == 1


@pytest.mark.parametrize(("name", "base_dtype"), [("b", "auto"), ("a", "nf4")])
def test_shards_of_another_adapter_or_of_a_rounded_base_are_not_reused(
    name: str, base_dtype: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tensors have the same names, shapes and dtypes."""
    other = Adapter.load(adapter)
    other.R = {module: -R for module, R in other.R.items()}
    other.basis_source = str(adapter)
    other.save(tmp_path / "b")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorasb_export.merging.folder.put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / name, tmp_path / "model", base_dtype=base_dtype)
    assert list((tmp_path / ".model.merge").glob("*.safetensors"))
    assert merge(adapter, tmp_path / "model")["shards_reused"] == 0


def test_a_base_that_changes_while_it_is_read_is_refused(
    adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    write = lorasb_export.merging.merge.write_shard

    def slow(*arguments: Any) -> Any:
        found = write(*arguments)
        os.utime(base / "model.safetensors")
        return found

    monkeypatch.setattr("lorasb_export.merging.merge.write_shard", slow)
    with pytest.raises(BaseModelError, match="changed while it was read"):
        merge(adapter, tmp_path / "model", base=base)
    assert not (tmp_path / "model").exists()


def test_a_basis_that_is_replaced_while_it_is_read_is_refused(adapter: Path, tmp_path: Path) -> None:
    basis = Basis.load(adapter)
    basis.save(tmp_path / "basis")
    opened = Basis.open(tmp_path / "basis")
    assert len(opened.modules[MODULES[0]].B)
    basis.save(tmp_path / "basis", overwrite=True)
    with pytest.raises(ArtifactError, match="replaced while it was read"):
        opened.modules[MODULES[0]]


def test_a_second_merge_into_the_same_target_is_refused(adapter: Path, tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "model", "a plan") as folder:
        (folder.path / "lorasb.json").write_text("{}")
        with pytest.raises(OutputError, match="another process is writing this target"):
            merge(adapter, tmp_path / "model")
    assert os.listdir(tmp_path / "model") == ["lorasb.json"]


def test_behind_a_link_lies_what_an_earlier_try_left_and_the_one_lock(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("disk/model")
    with suppress(KeyboardInterrupt), resumable_folder(tmp_path / "model", "a plan") as folder:
        (folder.path / "model.safetensors").write_bytes(bytes(8192))
        folder.mark("model.safetensors", {})
        raise KeyboardInterrupt
    assert bytes_of_an_earlier_try(tmp_path / "model") >= 8192
    with (
        only_writer(tmp_path / "model"),
        pytest.raises(OutputError, match="another process is writing this target"),
        only_writer(tmp_path / "disk" / "model"),
    ):
        pass


def test_all_problems_are_told_at_once(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="4 problems") as caught:
        merge(adapter, tmp_path / "model", base=tmp_path / "nowhere", dtype="int8", max_shard_size="many")
    for problem in ("not a folder lorasb wrote", "dtype is 'int8'", "size 'many'", "not found"):
        assert problem in str(caught.value)


def test_every_missing_module_is_named(llama: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    loaded = Adapter.load(adapter)
    loaded.R = {name.replace("up_proj", "experts.up_proj"): R for name, R in loaded.R.items()}
    with pytest.raises(BaseModelError, match="2 problems") as caught:
        merge(loaded, tmp_path / "model", base=base)
    assert str(caught.value).count("the base has no weight for module") == 2


def test_a_linear_combination_is_exact(llama: Path, tmp_path: Path) -> None:
    network = BaseModel.resolve(llama).load()
    first = save_adapter(llama, network, tmp_path / "a", MODULES)
    second = Adapter.load(tmp_path / "a")
    second.R = {name: torch.randn_like(R) for name, R in first.R.items()}
    second.scaling, second.basis_source = 0.5, str(tmp_path / "a")
    second.save(tmp_path / "b")
    result = merge({tmp_path / "a": 0.6, tmp_path / "b": -0.4}, tmp_path / "model", verify=True)
    assert result["verify"]["relative_difference"] < 1e-4
    assert result["adapter"] is None
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "model"))
    for name in MODULES:
        factors = first.load_basis().modules[name]
        B, A = factors.B.double(), factors.A.double()
        R = 0.6 * first.scaling * first.R[name].double() - 0.4 * 0.5 * second.R[name].double()
        exact = before[f"{name}.weight"].double() + B @ R @ A
        assert torch.equal(exact.float(), after[f"{name}.weight"])
    found = read_json(tmp_path / "model" / "lorasb.json")["adapters"]
    assert [(one["name"], one["weight"]) for one in found] == [("a", 0.6), ("b", -0.4)]
    unsaved = [replace(adapter, folder=None, basis_source=None, basis=first.basis) for adapter in (first, second)]
    merge([(unsaved[0], 0.6), (unsaved[1], -0.4)], tmp_path / "again", base=BaseModel.resolve(llama))
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_what_is_combined_is_read_once_and_not_overwritten(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Adapter.load(adapter)
    other.basis_source = str(adapter)
    other.save(tmp_path / "b")
    with pytest.raises(OutputError, match="the target holds what it is made from"):
        merge({adapter: 1.0, tmp_path / "b": 1.0}, tmp_path / "b", overwrite=True)
    read: list[Any] = []
    load = Adapter.load
    monkeypatch.setattr(Adapter, "load", lambda source: (read.append(source), load(source))[1])
    merge({adapter: 1.0, tmp_path / "b": 1.0}, tmp_path / "model")
    assert read == [adapter, tmp_path / "b"]


def test_adapters_of_two_bases_are_summed_and_rounded_once(tmp_path: Path) -> None:
    """Of ranks 4 and 6, on modules that overlap; the folder names both, and so does its refusal as a base."""
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    network = BaseModel.resolve(base).load()
    adapters = {
        "a": save_adapter(base, network, tmp_path / "a", MODULES[:4], relative_size=0.3),
        "b": save_adapter(base, network, tmp_path / "b", MODULES[2:], relative_size=0.3, rank=6, seed=1),
    }
    weights = {"a": 0.6, "b": -0.4}
    result = merge({tmp_path / name: weight for name, weight in weights.items()}, tmp_path / "model", verify=True)
    assert (result["modules"], result["verify"]["streamed"]) == (len(MODULES), True)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    for name in MODULES:
        exact = before[f"{name}.weight"].double()
        for adapter, weight in zip(adapters.values(), weights.values(), strict=True):
            if name in adapter.R:
                factors = adapter.load_basis().modules[name]
                B, A = factors.B.double(), factors.A.double()
                exact += weight * adapter.scaling * B @ adapter.R[name].double() @ A
        assert (exact.to(torch.bfloat16) == after[f"{name}.weight"]).float().mean() > 0.999
    found = read_json(tmp_path / "model" / "lorasb.json")["adapters"]
    assert [(one["name"], one["weight"], one["rank"]) for one in found] == [("a", 0.6, 4), ("b", -0.4, 6)]
    with pytest.raises(BaseModelError, match=r"already merged \(with adapter a, \w{12}, adapter b, \w{12}\)"):
        merge(tmp_path / "a", tmp_path / "twice", base=tmp_path / "model")


def test_what_does_not_add_up(llama: Path, adapter: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="weight nan"):
        merge({adapter: float("nan")}, tmp_path / "model")
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=3)
    modules = ["bert.encoder.layer.0.attention.self.query"]
    save_adapter(bert, network, tmp_path / "b", modules, task_type=SEQ_CLS)
    with pytest.raises(ArtifactError, match="it has a classification head"):
        merge({adapter: 1.0, tmp_path / "b": 1.0}, tmp_path / "model")


def test_interrupted_in_the_middle_leaves_no_model(llama: Path, tmp_path: Path) -> None:
    """The child interrupts itself between two tensors; a restart succeeds and cleans up."""
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
