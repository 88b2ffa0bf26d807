"""What several tests look at: the small real model, a run of the quickstart, a Hub and what is pushed, ONNX exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration.hub_client import Hub, for_one_test, make_adapter, make_basis, serve
from integration.onnx_world import make_world
from integration.torture.forks import exporters_by
from integration.torture.zygote import shared_zygote
from lorasb_export.base.model import BaseModel
from lorasb_export.exporting.onnx_adapters import export_onnx_adapters
from lorasb_export.quickstart.model import small_model
from tests import conftest as fast_tests

llama, sums, fast_collections = fast_tests.llama, fast_tests.sums, fast_tests.fast_collections

# vLLM would pin every server to the first core, where two at a time, of two files of tests, share it.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", "1800")  # beside other tests

# A shell starts background jobs with SIGINT ignored; our children would inherit that and never see a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Begun first, longest first, so that no core waits at the end for one long file.
# Those that start vLLM lie apart: two servers on two cores may each take longer than a test waits.
_LONG = (
    "quickstart onnx_families training torture hub_names serve_shared onnx evidence distributed push_faults "
    "manifests cli push serve push_card"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones, the others of this folder, and then the fast ones, whose files have some of the same names."""
    here, order = Path(__file__).parent, {f"test_{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: (item.path.parent != here, order.get(item.path.name, len(_LONG))))


@dataclass(frozen=True)
class Quickstart:
    """What `lorasb quickstart --json` printed, and where."""

    folder: Path
    result: dict[str, Any]
    messages: str


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    return BaseModel.resolve(small_model()).folder


@pytest.fixture(scope="session")
def short_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first three layers under the same name: real shapes and weights, a tenth of the work."""
    folder = tmp_path_factory.mktemp("short") / smollm2.name
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=3, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(smollm2 / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart") / "project"
    command = [sys.executable, "-m", "lorasb_cli", "quickstart", "--out", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return Quickstart(folder, json.loads(done.stdout), done.stderr)


@contextmanager
def forked_exporters() -> Iterator[None]:
    """ONNX exporters are forks. Those of the quickstart are started as they are for users."""

    def forked(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        return shared_zygote().run(*command, folder=folder, together=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", exporters_by(forked))
        yield


@pytest.fixture(scope="module")
def quick_exporters() -> Iterator[None]:
    with forked_exporters():
        yield


@pytest.fixture(scope="session")
def xet(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Hub]:
    """A Hub whose transport is xet."""
    yield from serve(tmp_path_factory.mktemp("xet"), llama)


@pytest.fixture(scope="session")
def lfs(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Hub]:
    """A Hub whose transport is LFS."""
    yield from serve(tmp_path_factory.mktemp("lfs"), llama, HF_HUB_DISABLE_XET="1")


@pytest.fixture
def any_hub(xet: Hub) -> Iterator[Hub]:
    """For what does not depend on the transport."""
    yield from for_one_test(xet, "/lfs/")


@pytest.fixture
def basis(tmp_path: Path, llama: Path) -> Path:
    """For the base on the Hub."""
    return make_basis(tmp_path / "basis", llama)


@pytest.fixture
def adapter(tmp_path: Path, basis: Path) -> Path:
    return make_adapter(tmp_path / "adapters" / "a", basis)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def tasks_onnx(world: Path) -> Path:
    """The adapters red and blue in one export. Not to be changed."""
    with forked_exporters():  # before the fixture of a module
        export_onnx_adapters([world / "red", world / "blue"], world / "tasks-onnx")
    return world / "tasks-onnx"
