"""The two folders of the format: byte-stable, strict, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.adapter import check_same_basis
from lorasb_export.base import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.errors import ArtifactError, BaseModelError, MissingPackageError, OutputError, ServerError
from lorasb_export.format import sealed
from lorasb_export.kind import artifact_kind
from lorasb_export.provenance import published_training
from lorasb_export.settings import CalibrationSettings
from lorasb_export.storage import parse_json, read_header, sha256_file
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def folders(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved basis and a saved adapter beside it."""
    root = tmp_path_factory.mktemp("project")
    calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4)).save(root / "basis")
    network = BaseModel.resolve(llama).load()
    adapter = Adapter.attach(network, Basis.load(root / "basis"))
    for R in adapter.R.values():
        R.data.add_(torch.randn(R.shape, generator=torch.Generator().manual_seed(0)))
    adapter.save(root / "adapters" / "a")
    return root / "basis", root / "adapters" / "a"


def test_both_are_printed_in_a_line(folders: tuple[Path, Path], llama: Path) -> None:
    basis, adapter = Basis.load(folders[0]), Adapter.load(folders[1])
    digest, of = basis.sha256[:12], f"14 modules of {llama}"
    assert repr(basis) == f"<Basis {folders[0]}: rank 4 for {of}>"
    assert repr(adapter) == f"<Adapter a: CAUSAL_LM, rank 4 on {of}, basis {digest}>"


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(sealed(config)))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    config = f"{Path(name).stem}_config.json"
    if (folder / config).exists():  # of our own; a base has none
        edit(folder, config, lambda c: c.update(sha256=sha256_file(folder / name)))


def test_basis_save_load_save_is_byte_stable(folders: tuple[Path, Path], tmp_path: Path) -> None:
    Basis.load(folders[0]).save(tmp_path / "again")
    for name in ("basis.safetensors", "basis_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folders[0] / name).read_bytes()


def test_oracle_22_save_load_save_is_byte_stable(folders: tuple[Path, Path]) -> None:
    target = folders[1].parent / "again"
    Adapter.load(folders[1]).save(target)
    for name in ("adapter.safetensors", "adapter_config.json", "README.md"):
        assert (target / name).read_bytes() == (folders[1] / name).read_bytes()


def test_oracle_22_the_file_holds_R_alone_in_one_block(folders: tuple[Path, Path]) -> None:
    """Oracle 22: the R-only file is r²·modules·4 bytes and a header; keys sorted."""
    header, _ = read_header(folders[1] / "adapter.safetensors")
    assert list(header) == sorted(header)
    assert all(name.endswith(".R") and info.dtype == "F32" for name, info in header.items())
    assert sum(info.nbytes for info in header.values()) == 14 * 4 * 4 * 4


def test_config_keys_are_those_of_the_format(folders: tuple[Path, Path]) -> None:
    basis, adapter = (
        json.loads((f / n).read_text())
        for f, n in zip(folders, ("basis_config.json", "adapter_config.json"), strict=True)
    )
    assert set(basis) == {
        "format_version",
        "base_model",
        "rank",
        "target_modules",
        "sha256",
        "calibration",
        "created_with",
        "config_sha256",
    }
    assert set(basis["base_model"]) == {"name_or_path", "revision", "fingerprint"}
    assert adapter["peft_type"] == "LORA_SB"
    assert set(adapter) == {
        *("peft_type", "format_version", "base_model_name_or_path", "revision", "base_fingerprint", "task_type", "r"),
        *("scaling", "target_modules", "basis", "training", "sha256", "config_sha256"),
    }
    assert adapter["basis"] == {"sha256": basis["sha256"], "source": "../../basis"}


def test_peft_refuses_our_folder(folders: tuple[Path, Path]) -> None:
    from peft import PeftConfig

    with pytest.raises((KeyError, ValueError)):
        PeftConfig.from_pretrained(str(folders[1]))


def test_embedded_adapter_stands_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = Adapter.load(folders[1])
    adapter.save(tmp_path / "alone", embed=True)
    Adapter.load(tmp_path / "alone").save(tmp_path / "again")
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    moved = tmp_path / "moved"
    (tmp_path / "alone").rename(moved)
    assert Adapter.load(moved).load_basis().sha256 == adapter.basis_sha256


def test_an_adapter_is_where_and_what_it_was_saved_as(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = Adapter.start(Basis.load(folders[0]))
    assert adapter.name is None
    adapter.save("mine")
    assert (adapter.name, adapter.folder) == ("mine", tmp_path / "mine")
    adapter.hub_source = "me/theirs@0123"
    adapter.save("copy")
    assert (adapter.name, adapter.provenance()) == ("copy", Adapter.load("copy").provenance())


def test_an_adapter_or_a_basis_is_a_key(folders: tuple[Path, Path]) -> None:
    for load, folder in ((Basis.load, folders[0]), (Adapter.load, folders[1])):
        one, two = load(folder), load(folder)
        assert {one: 0.5, two: 0.25}[one] == 0.5
        assert two in [one, two]


def test_adapters_name_the_folder_that_a_basis_was_saved_to(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = replace(Basis.load(folders[0]), source=None)  # as `calibrate` makes it
    Adapter.start(basis).save(tmp_path / "before")
    assert (tmp_path / "before" / "basis.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    basis.save("basis")
    Adapter.start(basis).save("after")
    assert not (tmp_path / "after" / "basis.safetensors").exists()
    assert Adapter.load("after").basis_source == basis.source == str(tmp_path / "basis")
    of_hub = replace(basis, source="me/basis@main")
    of_hub.save("copy")
    assert of_hub.source == "me/basis@main"


@pytest.fixture(scope="module")
def blocks(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved basis of blocks."""
    folder = tmp_path_factory.mktemp("blocks") / "basis"
    calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="block")).save(folder)
    return folder


def test_of_a_block_the_file_holds_its_place_alone(blocks: Path, tmp_path: Path) -> None:
    header, _ = read_header(blocks / "basis.safetensors")
    assert all(name.endswith(".block") and info.nbytes == 32 for name, info in header.items())
    Basis.load(blocks).save(tmp_path / "again")
    for name in ("basis.safetensors", "basis_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (blocks / name).read_bytes()


def test_an_adapter_in_blocks_stands_alone(llama: Path, blocks: Path, tmp_path: Path) -> None:
    Adapter.attach(BaseModel.resolve(llama).load(), Basis.load(blocks)).save(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.basis_source is None
    assert adapter.load_basis().sha256 == Basis.load(blocks).sha256


@pytest.mark.parametrize(
    "block", [[[-1, 3], [0, 4]], [[0, 5], [0, 4]], [[0, 4], [29, 33]], [[4, 0], [0, 4]], [[0.0, 4.0], [0.0, 4.0]]]
)
def test_a_block_outside_of_its_weight_is_refused(blocks: Path, tmp_path: Path, block: list[list[float]]) -> None:
    bad, name = copy(blocks, tmp_path / "bad"), "model.layers.0.self_attn.q_proj.block"
    edit_tensors(bad, "basis.safetensors", lambda tensors: tensors.update({name: torch.tensor(block)}))
    edit(bad, "basis_config.json", lambda c: c.update(sha256=sha256_file(bad / "basis.safetensors")))
    with pytest.raises(ArtifactError, match=rf"tensor {name} is "):
        Basis.load(bad)


def test_basis_inside_the_adapter_folder_is_found(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter.load(folders[1])
    adapter.basis_source = str(tmp_path / "a" / "basis")
    adapter.save(tmp_path / "a")
    copy(folders[0], tmp_path / "a" / "basis")
    monkeypatch.chdir("/")
    assert Adapter.load(tmp_path / "a").load_basis().sha256 == adapter.basis_sha256


def test_adapters_behind_a_link_find_their_basis_from_both_sides(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """`adapters` leads to another disk; then all of it moves."""
    copy(folders[0], tmp_path / "all" / "project" / "basis")
    (tmp_path / "all" / "scratch" / "me" / "runs").mkdir(parents=True)
    (tmp_path / "all" / "project" / "adapters").symlink_to("../scratch/me/runs")
    adapter = replace(Adapter.load(folders[1]), basis_source=str(tmp_path / "all" / "project" / "basis"))
    adapter.save(tmp_path / "all" / "project" / "adapters" / "a")
    adapter.save(tmp_path / "all" / "project" / "adapters" / "old")
    real = tmp_path / "all" / "scratch" / "me" / "runs"
    edit(real / "old", "adapter_config.json", lambda c: c["basis"].update(source="../../basis"))  # of the first ones
    (tmp_path / "all").rename(tmp_path / "moved")
    for folder in ("project/adapters/a", "scratch/me/runs/a", "project/adapters/old"):
        assert Adapter.load(tmp_path / "moved" / folder).load_basis().sha256 == adapter.basis_sha256


def test_a_project_reached_through_links_may_move(folders: tuple[Path, Path], tmp_path: Path) -> None:
    project, link = tmp_path / "disk" / "project", tmp_path / "link"
    copy(folders[0], tmp_path / "shared" / "basis")
    project.mkdir(parents=True)
    (project / "basis").symlink_to(tmp_path / "shared" / "basis")
    link.symlink_to(project)
    adapter = replace(Adapter.load(folders[1]), basis_source=str(link / "basis"))
    adapter.save(link / "adapters" / "a")
    assert Adapter.load(link / "adapters" / "a").basis_source == str(project / "basis")
    project.rename(tmp_path / "moved")
    assert Adapter.load(tmp_path / "moved" / "adapters" / "a").basis_source == str(tmp_path / "moved" / "basis")


def test_the_picture_of_the_curve_goes_where_the_adapter_is_published(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = copy(folders[1], tmp_path / "adapter")
    edit(adapter, "adapter_config.json", lambda config: config["training"].update(plot="../secret.png"))
    (tmp_path / "secret.png").write_bytes(b"secret")
    for with_picture, plot in ((False, None), (True, "training.png")):
        if with_picture:
            (adapter / "training.png").write_bytes(b"curve")
        into = tmp_path / f"into-{with_picture}"
        into.mkdir()
        assert published_training(Adapter.load(adapter), into).get("plot") == plot
        assert [path.read_bytes() for path in into.iterdir()] == [b"curve"] * with_picture
    assert "plot" not in published_training(Adapter.load(adapter))  # nowhere to copy it to


@pytest.mark.parametrize(
    "training",
    [
        {"data": ["a.jsonl", "b.jsonl"]},
        {"settings": None},
        {"evaluation": {"accuracy": 0.93}},
        {"evaluation": {"test": {"accuracy": 0.93}}},
        {"evaluation": {"test": {"accuracy": {"adapter": 0.93}}}},
    ],
)
def test_what_a_card_reads_of_the_training_has_its_shape(
    training: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, (key,) = Adapter.load(folders[1]), training
    adapter.training = training
    with pytest.raises(ArtifactError, match=f"training says {key} in another shape"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    edit(copy(folders[1], tmp_path / "b"), "adapter_config.json", lambda config: config.update(training=training))
    with pytest.raises(ArtifactError, match=rf"training says {key} .* \(.*/b/adapter_config.json\)"):
        Adapter.load(tmp_path / "b")
    adapter.training = {"notes": ["anything"], "evaluation": {"test": {"f1": {"base": None, "adapter": 1, "rows": 2}}}}
    adapter.save(tmp_path / "a")
    assert "| test | f1 | 2 | - | 1 |" in (tmp_path / "a" / "README.md").read_text()


def check_refused(load: Callable[[Path], object], folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ArtifactError) as error:
        load(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


BAD_BASIS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other hash": (lambda f: edit(f, "basis_config.json", lambda c: c.update(sha256="0" * 64)), "sha256 is not"),
    "unknown key": (lambda f: edit(f, "basis_config.json", lambda c: c.update(extra=1)), "unknown extra"),
    "missing key": (lambda f: edit(f, "basis_config.json", lambda c: c.pop("rank")), "missing rank"),
    "other version": (lambda f: edit(f, "basis_config.json", lambda c: c.update(format_version=2)), "format version 2"),
    "rank too large": (lambda f: edit(f, "basis_config.json", lambda c: c.update(rank=99)), "rank 99 does not fit"),
    "other shape": (
        lambda f: edit(
            f, "basis_config.json", lambda c: c["target_modules"].update({"model.layers.0.mlp.up_proj": [64, 33]})
        ),
        "expected BF16/F16/F32/F64 [4, 33]",
    ),
    "missing tensor": (lambda f: edit_tensors(f, "basis.safetensors", lambda t: t.popitem()), "missing"),
    "wrong type": (lambda f: edit(f, "basis_config.json", lambda c: c.update(rank="4")), "rank is '4'"),
    "no shape": (
        lambda f: edit(f, "basis_config.json", lambda c: c["target_modules"].update({"model.layers.0.mlp.up_proj": 7})),
        "has no shape [out, in]",
    ),
    "base without fingerprint": (
        lambda f: edit(f, "basis_config.json", lambda c: c["base_model"].pop("fingerprint")),
        "missing fingerprint",
    ),
    "broken json": (lambda f: (f / "basis_config.json").write_text("{"), "unreadable JSON"),
    "truncated": (lambda f: os.truncate(f / "basis.safetensors", 5000), "truncated"),
    "no file": (lambda f: (f / "basis.safetensors").unlink(), "file not found"),
}


@pytest.mark.parametrize("case", BAD_BASIS)
def test_bad_basis_is_refused(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    check_refused(Basis.load, copy(folders[0], tmp_path / "basis"), *BAD_BASIS[case])


def nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def half(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})


def with_head(folder: Path, name: str, *shape: int) -> None:
    edit(folder, "adapter_config.json", lambda c: c.update(task_type=SEQ_CLS))
    edit_tensors(folder, "adapter.safetensors", lambda t: t.update({name: torch.ones(shape)}))


BAD_ADAPTER: dict[str, tuple[Callable[[Path], object], str]] = {
    "non-finite": (lambda f: edit_tensors(f, "adapter.safetensors", nan), "non-finite"),
    "wrong dtype": (lambda f: edit_tensors(f, "adapter.safetensors", half), "is F16 [4, 4], expected F32 [4, 4]"),
    "other rank": (lambda f: edit(f, "adapter_config.json", lambda c: c.update(r=5)), "expected F32 [5, 5]"),
    "extra tensor": (
        lambda f: edit_tensors(f, "adapter.safetensors", lambda t: t.update(junk=torch.zeros(1))),
        "unknown junk",
    ),
    "unknown key": (lambda f: edit(f, "adapter_config.json", lambda c: c.update(extra=1)), "unknown extra"),
    "wrong type": (
        lambda f: edit(f, "adapter_config.json", lambda c: c.update(target_modules="all")),
        "target_modules is",
    ),
    "scaling not finite": (
        lambda f: edit(f, "adapter_config.json", lambda c: c.update(scaling=float("nan"))),
        "scaling is nan",
    ),
    "other kind": (lambda f: edit(f, "adapter_config.json", lambda c: c.update(peft_type="LORA")), "not LORA_SB"),
    "other version": (
        lambda f: edit(f, "adapter_config.json", lambda c: c.update(format_version=9)),
        "format version 9",
    ),
    "truncated": (lambda f: os.truncate(f / "adapter.safetensors", 3000), "truncated"),
    "not safetensors": (
        lambda f: (f / "adapter.safetensors").write_bytes(b"PK\x03\x04" + b"\xff" * 64),
        "not a safetensors file",
    ),
    "a head that is a weight of the body": (
        lambda f: with_head(f, "model.embed_tokens.weight", 2, 3),
        "model.embed_tokens.weight [2, 3] is no tensor of a classifier's head",
    ),
    "a head without numbers": (lambda f: with_head(f, "score.weight", 0, 32), "score.weight [0, 32] is no tensor"),
    "empty file": (lambda f: (f / "adapter.safetensors").write_bytes(b""), "not a safetensors file"),
}


@pytest.mark.parametrize("case", BAD_ADAPTER)
def test_bad_adapter_is_refused(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    check_refused(Adapter.load, copy(folders[1], tmp_path / "a"), *BAD_ADAPTER[case])


def test_oracle_22_an_adapter_of_another_basis_is_refused(
    folders: tuple[Path, Path], llama: Path, sums: Path, tmp_path: Path
) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, seed=9))
    with pytest.raises(ArtifactError, match="trained in basis"):
        check_same_basis(Adapter.load(folders[1]), other)
    other.save(tmp_path / "basis")
    folder = copy(folders[1], tmp_path / "adapters" / "a")
    edit(folder, "adapter_config.json", lambda c: c["basis"].update(source="../../basis"))
    with pytest.raises(ArtifactError, match="do not belong together"):
        Adapter.load(folder).load_basis()


def test_oracle_22_an_adapter_of_another_rank_is_refused(folders: tuple[Path, Path], llama: Path, sums: Path) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=5))
    with pytest.raises(ArtifactError, match="rank 4, the basis has 5"):
        check_same_basis(Adapter.load(folders[1]), other)


def test_oracle_22_an_adapter_of_another_target_set_is_refused(
    folders: tuple[Path, Path], llama: Path, sums: Path
) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="q_proj"))
    with pytest.raises(ArtifactError, match="target modules differ"):
        check_same_basis(Adapter.load(folders[1]), other)


def test_oracle_22_another_base_is_refused(folders: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folders[1])
    BaseModel.resolve(llama).verify(adapter.base, adapter.R)
    other = copy(llama, tmp_path / "other")
    edit_tensors(other, "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"].add_(0.01))
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        BaseModel.resolve(other).verify(adapter.base, adapter.R)


def test_missing_module_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = make_llama(tmp_path / "small")
    edit_tensors(small, "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    adapter = Adapter.load(folders[1])
    with pytest.raises(BaseModelError, match="no weight for module"):
        BaseModel.resolve(small).verify(adapter.base, adapter.R)


def test_attach_refuses_a_model_of_another_shape(folders: tuple[Path, Path]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(ArtifactError, match="the basis was made for"):
        Adapter.attach(LlamaForCausalLM(config), Basis.load(folders[0]))


def test_an_existing_target_is_kept(folders: tuple[Path, Path]) -> None:
    before = (folders[0] / "basis.safetensors").read_bytes()
    with pytest.raises(OutputError, match="the target exists"):
        Basis.load(folders[0]).save(folders[0])
    assert (folders[0] / "basis.safetensors").read_bytes() == before


@pytest.mark.parametrize("note", ["{}", '{"kind": "other"}', '{"kind": {}}'])
def test_a_folder_of_a_kind_that_nobody_knows_is_of_none(note: str, tmp_path: Path) -> None:
    (tmp_path / "lorasb.json").write_text(note)
    with pytest.raises(ArtifactError, match="neither a basis, an adapter nor a model folder"):
        artifact_kind(tmp_path)


def test_a_key_that_stands_there_twice_is_found_in_one_pass() -> None:
    names = [f'"{number}": 0' for number in range(30_000)]
    started = time.perf_counter()
    with pytest.raises(ValueError, match="duplicate key '29999'"):
        parse_json(f"{{{', '.join([*names, names[-1]])}}}")
    assert time.perf_counter() - started < 2  # looking through all names for every name takes ten


def test_errors_survive_pickling() -> None:
    import pickle

    for kind in (ArtifactError, OutputError, MissingPackageError, ServerError):  # with what is built in beside ours
        error = kind("bad", where="here", fix="Do this")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.__dict__) == (kind, "bad (here). Do this", error.__dict__)
    error.silent = True
    assert pickle.loads(pickle.dumps(error)).silent


def test_a_tensor_without_numbers_may_be_listed_after_the_one_it_lies_before(tmp_path: Path) -> None:
    header = {name: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]} for name, n in (("b", 2), ("a", 0))}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert list(read_header(tmp_path / "x.safetensors")[0]) == ["a", "b"]


def test_a_basis_is_not_written_under_the_digest_of_other_bytes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    basis = Basis.load(folders[0])
    basis.__dict__["sha256"] = "0" * 64  # as of a file that another version of safetensors laid out
    with pytest.raises(ArtifactError, match="lays the basis out otherwise"):
        basis.save(tmp_path / "again")
