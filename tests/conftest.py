"""Tiny random models and tiny tasks, made once a session."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

# The tests hand tensors on the host to bases that would lie on a GPU. Set by you, the variable shows them one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from lorasb_cli.main import app
from typer.testing import CliRunner, Result

from tests.tiny import make_bert, make_llama

torch.set_num_threads(1)  # on matrices this small a second thread only waits


# A shell starts background jobs with SIGINT ignored; our children would inherit that and never see a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


def write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lorasb(*words: str) -> Result:
    """A command, run in this process."""
    return CliRunner().invoke(app, words)
