"""The sum of adapters of one basis, written as an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasb_export import Adapter, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.data.trained_template import TEMPLATE_KEY
from lorasb_export.errors import ArtifactError, OutputError
from lorasb_export.files.storage import read_json
from lorasb_export.merging.combine import combine_into
from tests.conftest import lorasb
from tests.merging import MODULES
from tests.random_adapter import save_adapter


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", MODULES)
    return tmp_path / "a"


def test_the_sum_of_adapters_of_one_basis_is_an_adapter(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    second = Adapter.load(adapter)
    second.R = {name: torch.randn_like(R) for name, R in second.R.items()}
    second.scaling, second.basis_source = 0.5, str(adapter)
    second.training = {"settings": {"max_length": 7, "dtype": "nf4"}, TEMPLATE_KEY: "t", "task": "b"}
    second.save(tmp_path / "b")
    first = Adapter.load(adapter)
    first.training = {"settings": {"max_length": 8, "dtype": "nf4"}, TEMPLATE_KEY: "t", "task": "a"}
    first.save(adapter, overwrite=True)
    words = [f"{adapter}=0.6", "./b=-0.4"]
    done = lorasb("merge", *words, "--as-adapter", "--out", "adapters/mixed", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "adapters/mixed"
    mixed = Adapter.load("adapters/mixed")
    for name, R in mixed.R.items():
        expected = 0.6 * first.scaling * first.R[name].double() - 0.4 * 0.5 * second.R[name].double()
        assert torch.equal(mixed.scaling * R, expected.float())
    common = {"settings": {"dtype": "nf4"}, TEMPLATE_KEY: "t"}
    assert mixed.training == {"combined": [f"0.6 · {adapter.name}", "-0.4 · b"], **common}
    weights = [one["weight"] for one in read_json(Path("adapters/mixed/lorasb.json"))["combined"]]
    assert weights == [0.6, -0.4]
    merge({adapter: 0.6, tmp_path / "b": -0.4}, "of_two")
    assert lorasb("merge", "mixed", "--out", "of_one").exit_code == 0
    two, one = (load_file(tmp_path / folder / "model.safetensors") for folder in ("of_two", "of_one"))
    assert all(torch.allclose(two[name], one[name], atol=1e-6) for name in two)

    done = lorasb("merge", *words, "--as-adapter", "--out", "adapters/mixed")
    assert "the target exists" in done.stderr
    done = lorasb("merge", *words, "--as-adapter", "--out", "adapters/mixed", "--overwrite")
    assert done.stdout.startswith(f"Wrote adapters/mixed: 0.6·{adapter.name} + -0.4·b, ")
    done = lorasb("merge", "mixed", "b", "--as-adapter", "--out", "b", "--overwrite")
    assert "the target holds what it is made from" in done.stderr
    assert lorasb("merge", *words, "--as-adapter", "--out", "x", "--verify").exit_code == 2
    assert lorasb("merge", *words, "--as-adapter").exit_code == 2


def test_adapters_of_two_bases_are_no_adapter(tmp_path: Path, llama: Path) -> None:
    network = BaseModel.resolve(llama).load()
    for name, seed in (("a", 0), ("b", 1)):
        save_adapter(llama, network, tmp_path / name, MODULES, seed=seed)
    with pytest.raises(ArtifactError, match=r"another basis than the first.* \(.*/b\)\. Merge them into a model"):
        combine_into({tmp_path / "a": 1.0, tmp_path / "b": 1.0}, tmp_path / "out")
    with pytest.raises(ArtifactError, match="not finite"):
        combine_into({tmp_path / "a": 1e39}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_in_which_their_basis_lies_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    for name in ("b", "c"):
        other = Adapter.load(adapter)
        other.basis_source = str(adapter)
        other.save(tmp_path / name)
    with pytest.raises(OutputError, match="the target holds what it is made from"):
        combine_into({tmp_path / "b": 1.0, tmp_path / "c": 1.0}, adapter, overwrite=True)
