"""How many bytes does one more task send to the Hub, and what becomes of a push when the Hub fails?

The server is the loopback Hub, which counts every byte of every request and what xet writes; so there is no peer.
An unchanged push asks what is there, with requests that carry nothing: it uploads 0 bytes and makes no commit.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from integration.hub_client import Hub, make_basis, serve
from integration.hub_faults import FAULTS
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.files.storage import write_json
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.quickstart.model import small_model
from lorasb_export.training.record import plot_losses
from tests.tiny import make_llama

RANK = 64
REPORTED = ("bytes_new_task", "r_bytes", "bytes_unchanged")
TRANSPORTS: dict[str, dict[str, str]] = {"xet": {}, "lfs": {"HF_HUB_DISABLE_XET": "1"}}


def run(*, quick: bool) -> dict[str, Any]:
    sizes, tried, failed = {}, 0, []
    with tempfile.TemporaryDirectory() as root:
        base = make_llama(Path(root, "base"))
        for name, changes in TRANSPORTS.items():
            with _hub(Path(root, name), base, changes) as hub:
                sizes[name] = _sizes(hub, Path(root, f"{name}-folders"))
                seeds = itertools.count(1)
                for what in list(FAULTS)[:: 4 if quick else 1]:
                    tried += 1
                    failed += _try(hub, what, Path(root, f"{name}-{tried}"), next(seeds))
    columns = ("R", "one more task", "unchanged", "its requests", "its commits")
    print("bytes".ljust(6), *(f"{title:>14}" for title in columns))
    for name, found in sizes.items():
        print(name.ljust(6), *(f"{value:14,}" for value in found.values()))
    print("".join(f"failed: {what}\n" for what in failed), end="")
    worst = {key: max(found[key] for found in sizes.values()) for key in REPORTED}
    return {**worst, "faults_tried": tried, "faults_ok": tried - len(failed)}


@contextmanager
def _hub(root: Path, base: Path, changes: dict[str, str]) -> Iterator[Hub]:
    root.mkdir()
    yield from serve(root, base, **changes)


def _sizes(hub: Hub, root: Path) -> dict[str, int]:
    """Push a basis of SmolLM2-135M's shapes and two adapters of random R; count the second, then it again."""
    basis = _basis(root / "basis")
    assert hub.push(basis, "me/basis")["changed"]
    assert hub.push(_adapter(root / "a", basis, seed=1), "me/a", basis_repo="me/basis")["changed"]
    second = _adapter(root / "b", basis, seed=2)
    before = hub.bytes_received()
    assert hub.push(second, "me/b", basis_repo="me/basis")["changed"]
    new_task, uploaded, commits = hub.bytes_received() - before, hub.bytes_uploaded(), hub.commits("me/b")
    hub.requests.clear()
    assert not hub.push(second, "me/b", basis_repo="me/basis")["changed"]
    return {
        "r_bytes": (second / "adapter.safetensors").stat().st_size,
        "bytes_new_task": new_task,
        "bytes_unchanged": hub.bytes_uploaded() - uploaded,
        "requests_unchanged": len(hub.requests),
        "commits_unchanged": hub.commits("me/b") - commits,
    }


def _basis(folder: Path) -> Path:
    base, generator = BaseModel.resolve(small_model()), torch.Generator().manual_seed(0)
    names = [key.removesuffix(".weight") for key in base.tensors if key.endswith("_proj.weight")]
    modules = {}
    for name in names:
        rows, columns = base.tensors[f"{name}.weight"][1].shape
        B = torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0].contiguous()
        A = torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous()
        modules[name] = ModuleBasis(B, A, torch.ones(RANK))
    Basis(base.ref(names), RANK, modules, {"samples": 1}).save(folder)
    return folder


def _adapter(folder: Path, basis: Path, seed: int) -> Path:
    """With the files that `fit` leaves beside R: the log of 200 entries, its picture, provenance."""
    found, generator = Basis.load(basis), torch.Generator().manual_seed(seed)
    R = {name: torch.randn(RANK, RANK, generator=generator) for name in found.modules}
    training = {"task": folder.name, "steps": 2000, "plot": "training.png"}
    Adapter(found.base, found.sha256, found.source, R, training=training).save(folder)
    history = [{"step": step, "loss": 2 / (1 + step), "learning_rate": 0.006} for step in range(10, 2010, 10)]
    (folder / "training_log.jsonl").write_text("".join(f"{entry}\n".replace("'", '"') for entry in history))
    plot_losses(history, folder / "training.png", title=folder.name)
    write_json(folder / "lorasb.json", {"kind": "adapter", "base": dict(found.base.__dict__)})
    return folder


def _try(hub: Hub, what: str, folder: Path, seed: int) -> list[str]:
    """What went wrong, if anything did."""
    hub.clear()
    try:
        FAULTS[what](hub, make_basis(folder / "basis", hub.base, seed=seed))
    except AssertionError as error:
        return [f"{what}: {error}"]
    return [f"{what}: {violation}" for violation in hub.violations]
