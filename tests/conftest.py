"""Tiny random models, tiny tasks, bases and adapters of them, made once a session; and a machine without a network."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The tests hand tensors on the host to bases that would lie on a GPU. Set by you, the variable shows them one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from lorasb_cli.main import app
from typer.testing import CliRunner, Result

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.settings import CalibrationSettings
from tests.rows import MARKED
from tests.tiny import make_bert, make_llama

torch.set_num_threads(1)  # on matrices this small a second thread only waits


# A shell starts background jobs with SIGINT ignored; our children would inherit that and never see a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def fast_collections() -> Iterator[None]:
    """Garbage collections pass over all modules: transformers collects before each training, which took it 0.4 s."""
    gc.freeze()
    yield
    gc.collect()  # what this module leaves in cycles: the next one would freeze it
    gc.unfreeze()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with tied embeddings, grouped query attention and a tokenizer with a chat template."""
    return make_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT body of two layers (its checkpoint has no head and no prefix)."""
    return make_bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder: sums of two digits."""
    folder = tmp_path_factory.mktemp("data") / "sums"
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs]
    write_splits(folder, {"train": rows[:64], "valid": rows[64:76], "test": rows[76:]})
    return folder


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder unlike `sums`: long answers of different lengths."""
    folder = tmp_path_factory.mktemp("data") / "products"
    rows = [{"prompt": f"{a}*{b}=", "completion": "x" * a + str(a * b)} for a in range(1, 8) for b in range(8)]
    write_splits(folder, {"train": rows})
    return folder


@pytest.fixture(scope="session")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classification task folder: does the word hold an x?"""
    rng = random.Random(0)
    words = ["".join(rng.choices("abx", k=6)) for _ in range(80)]
    rows = [{"text": word, "label": "yes" if "x" in word else "no"} for word in words]
    folder = tmp_path_factory.mktemp("data") / "parity"
    write_splits(folder, {"train": rows[:60], "valid": rows[60:]})
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskData]:
    """Sums and differences, of prompts of various lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    return {"plus": write_task(folder / "plus", "+", 20, 1), "minus": write_task(folder / "minus", "-", 11, 2)}


@pytest.fixture(scope="session")
def basis(llama: Path, tasks: dict[str, TaskData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis of both `tasks`, as a folder."""
    folder = tmp_path_factory.mktemp("project") / "basis"
    calibrate(str(llama), tasks, CalibrationSettings(rank=8, dtype="float64")).save(folder)
    return folder


@pytest.fixture(scope="session")
def folders(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved basis and a saved adapter beside it. Not to be changed."""
    root = tmp_path_factory.mktemp("folders")
    calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4)).save(root / "basis")
    network = BaseModel.resolve(llama).load()
    adapter = Adapter.attach(network, Basis.load(root / "basis"))
    for R in adapter.R.values():
        R.data.add_(torch.randn(R.shape, generator=torch.Generator().manual_seed(0)))
    adapter.save(root / "adapters" / "a")
    return root / "basis", root / "adapters" / "a"


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template that marks what the assistant says."""
    base = make_llama(tmp_path_factory.mktemp("bases") / "chatty")
    (base / "chat_template.jinja").write_text(MARKED)
    return base


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    yield caplog
    logging.getLogger("lorasb_export").setLevel(logging.NOTSET)  # a verb sets it, for its process


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever connects fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, operation: str, rows: int, seed: int) -> TaskData:
    """Sums or differences of digits, of prompts of various lengths, with a valid split."""
    folder.mkdir(parents=True)
    digits = random.Random(seed)
    for split, count in (("train", rows), ("valid", 6)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                a, b = digits.randint(0, 9), digits.randint(0, 9)
                prompt = f"{'please ' * digits.randint(0, 2)}{a}{operation}{b}="
                value = a + b if operation == "+" else a - b
                print(json.dumps({"prompt": prompt, "completion": str(value)}), file=file)
    return load_task(folder.name, folder)


def lorasb(*words: str) -> Result:
    """A command, run in this process."""
    return CliRunner().invoke(app, words)
