"""Mutated inputs, each read by the product in a process of its own: refused by our own error, or proven equal.

What is read: an adapter, a basis, a base model, a project file, the rows of a task, an ONNX adapter. A refusal may
take 2 s of the processor and 300 MB of memory. An accepted mutant of an artifact must be the original, value for value;
what a user writes by hand, rows and project file, must be read as an independent reader reads it.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from integration.torture.mutations import mutate
from integration.torture.tally import Tally
from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import load_task
from lorasb_export.errors import LoraSBError
from lorasb_export.exporting.onnx_adapters import export_onnx_adapters
from lorasb_export.exporting.onnx_run import OnnxDecoder
from lorasb_export.exporting.onnx_swap import read_adapter
from lorasb_export.files.storage import read_header, read_json, sha256_file
from lorasb_export.format import sealed
from lorasb_export.inspection import inspect_folder
from lorasb_export.project.project import Project
from lorasb_export.settings import CalibrationSettings
from tests.tiny import make_llama

_SECONDS, _BYTES = 2.0, 300_000_000
_HANG = 20.0  # of the clock, on a machine that may be busy

_TOML = """\
model = "base"
[basis]
rank = 4
samples = 8
[fit]
epochs = 1
learning_rate = 0.01
[tasks.a]
data = "rows.jsonl"
weight = 2.0
[hub]
repo = "me/a"
"""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        files: those of its folder that are damaged.
        read: what the product makes of the folder; compared by equality.
        independent: what another reader makes of the damaged folder; None where only the original is acceptable.
        prepare: what a liar does after the damage.
    """

    files: tuple[str, ...]
    read: Callable[[Path], Any]
    independent: Callable[[Path], Any] | None = None
    prepare: Callable[[Path], None] | None = None


def run(n: int, seed: int) -> Tally:
    """`n` mutants, drawn with `seed`."""
    tally = Tally("lies", seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _make(root)
        good = {name: _fingerprint(target.read(root / name)) for name, target in TARGETS.items()}
        while tally.tried < n:  # a process that dies or hangs is followed by another, at the next mutant
            for end, problem in _worker(root, good, seed, tally.tried, n):
                tally.add(end, problem)
    return tally


def _worker(root: Path, good: dict[str, str], seed: int, first: int, n: int) -> Iterator[tuple[str, str]]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_try_all, args=(root, good, seed, first, n, there))
    process.start()
    there.close()
    number = first
    try:
        while number < n:
            if not here.poll(_HANG):
                yield "wrong", f"#{number} hangs: {_label(seed, number)}"
                return
            yield here.recv()
            number += 1
    except EOFError:
        process.join()
        yield "wrong", f"#{number} killed the process ({process.exitcode}): {_label(seed, number)}"
    finally:
        process.kill()
        process.join()
        here.close()


def _label(seed: int, number: int) -> str:
    return f"{Random(f'{seed}-{number}').choice(list(TARGETS))}"


def _try_all(root: Path, good: dict[str, str], seed: int, first: int, n: int, results: Connection) -> None:
    torch.set_num_threads(1)
    for number in range(first, n):
        random = Random(f"{seed}-{number}")
        name = random.choice(list(TARGETS))
        target = TARGETS[name]
        place = root / "mutants"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root, place, ignore=shutil.ignore_patterns("mutants"))
        changes = [
            f"{file}: {mutate(place / name / file, random)}"
            for file in random.sample(target.files, min(len(target.files), random.choice([1, 1, 1, 2])))
        ]
        if target.prepare is not None:
            target.prepare(place / name)
        end, problem = _judge(target, place / name, good[name])
        results.send((end, f"#{number} {name}: {problem} [{'; '.join(changes)}]" if problem else ""))


def _judge(target: Target, folder: Path, original: str) -> tuple[str, str]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process's memory starts anew
    before, clock = _memory("VmRSS"), time.process_time()
    try:
        found = _fingerprint(target.read(folder))
    except LoraSBError as error:
        found = ""
        if not (error.what and (error.where or error.fix)):
            return "wrong", f"the error says neither where nor what to do: {error}"
        if len(str(error)) > 2000:
            return "wrong", f"an error of {len(str(error))} characters"
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {error!s:.200}"
    seconds, grown = time.process_time() - clock, _memory("VmHWM") - before
    if seconds > _SECONDS or grown > _BYTES:
        return "wrong", f"{seconds:.1f} s, {grown / 1e6:.0f} MB"
    if not found:
        return "ok", ""
    expected = original
    if target.independent is not None:
        try:
            expected = _fingerprint(target.independent(folder))
        except Exception as error:
            return "accepted_bad", f"accepted; another reader: {type(error).__name__}: {error!s:.100}"
    return ("ok", "") if found == expected else ("accepted_bad", "accepted")


def _memory(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _fingerprint(value: Any) -> str:
    """A text that is equal for equal values, tensors bit by bit."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.contiguous().view(torch.uint8).numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_fingerprint(value[key])}" for key in sorted(value, key=repr)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_fingerprint, value)) + "]"
    return repr(value)


def _make(root: Path) -> None:
    base = BaseModel.resolve(make_llama(root / "base", shards="80KB", width=64))
    (root / "rows").mkdir()
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"} for i in range(8)]
    (root / "rows" / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "project").mkdir()
    (root / "project" / "lorasb.toml").write_text(_TOML)
    basis = calibrate(base, {"a": root / "rows"}, CalibrationSettings(rank=4, samples=8, dtype="float32"))
    basis.save(root / "basis")
    calibrate(base, {}, CalibrationSettings(rank=4, directions="block")).save(root / "blocks")
    adapter = Adapter.fresh(Basis.load(root / "basis"), scaling=2.0)
    generator = torch.Generator().manual_seed(0)
    adapter.R = {name: torch.randn(R.shape, generator=generator) for name, R in adapter.R.items()}
    adapter.save(root / "adapter")
    adapter.save(root / "resealed")
    export_onnx_adapters([root / "adapter"], root / "onnx", verify=False)


def _adapter(folder: Path) -> Any:
    adapter = Adapter.load(folder)
    basis = adapter.load_basis()
    inspect_folder(folder)
    ref = (adapter.base, adapter.basis_sha256, adapter.scaling, adapter.task_type, adapter.training)
    return ref, adapter.tensors(), _modules(basis)


def _basis(folder: Path) -> Any:
    basis, streamed = Basis.load(folder), Basis.open(folder)
    inspect_folder(folder)
    return basis.base, basis.rank, basis.calibration, basis.created_with, _modules(basis), _modules(streamed)


def _modules(basis: Basis) -> dict[str, tuple[torch.Tensor, ...]]:
    return {name: tuple(module.tensors().values()) for name, module in basis.modules.items()}


def _base(folder: Path) -> Any:
    base = BaseModel.resolve(folder)
    inspect_folder(folder)
    adapter = Adapter.load(folder.parent / "adapter")
    base.verify(adapter.base, adapter.R)
    base.load(device="cpu")
    return {name: (info.dtype, info.shape) for name, (_, info) in base.tensors.items()}


def _project(folder: Path) -> Any:
    project = Project.load(folder / "lorasb.toml")
    tasks = {
        name: {"data": task.data, "basis": task.basis, "weight": task.weight} for name, task in project.tasks.items()
    }
    return {
        **{"model": project.model, "revision": project.revision, "tasks": tasks, "fit": dict(project.fit)},
        **{
            "basis": {"path": project.basis_path, **project.calibration},
            "repo": project.repo,
            "public": project.public,
        },
    }


def _toml(folder: Path) -> Any:
    content = tomllib.loads((folder / "lorasb.toml").read_text(encoding="utf-8"))
    task = {"basis": None, "weight": 1.0}
    hub = content.get("hub", {})
    return {
        **{"model": content.get("model"), "revision": content.get("revision"), "fit": content.get("fit", {})},
        "tasks": {name: task | table for name, table in content.get("tasks", {}).items()},
        "basis": {"path": "basis", **content.get("basis", {})},
        **{"repo": hub.get("repo"), "public": hub.get("public", False)},
    }


def _rows(folder: Path) -> Any:
    return list(load_task("a", folder).splits["train"])


def _json_lines(folder: Path) -> Any:
    lines = (folder / "train.jsonl").read_bytes().decode("utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _reseal(folder: Path) -> None:
    """Make every digest in the adapter's config right again, where there is still something to digest."""
    try:
        config = read_json(folder / "adapter_config.json")
        read_header(folder / "adapter.safetensors")
        config["sha256"] = sha256_file(folder / "adapter.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(sealed(config)))
    except LoraSBError:
        pass


def _resealed(folder: Path) -> Any:
    adapter = Adapter.load(folder)
    return adapter.tensors(), adapter.scaling


def _by_others(folder: Path) -> Any:
    """R and s as the safetensors library reads them, if they can be an adapter's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter.safetensors")
    assert set(tensors) == {f"{name}.R" for name in config["target_modules"]}
    for tensor in tensors.values():
        assert tensor.dtype == torch.float32
        assert tensor.shape == (config["r"], config["r"])
        assert tensor.isfinite().all()
    return tensors, config["scaling"]


def _onnx(folder: Path) -> Any:
    decoder = OnnxDecoder(folder, "adapter", threads=1)
    return read_adapter(folder / "adapter.onnx_adapter"), decoder.generate([[5, 6, 7]], 4, set())


TARGETS = {
    "adapter": Target(("adapter.safetensors", "adapter_config.json"), _adapter),
    "resealed": Target(("adapter.safetensors", "adapter_config.json"), _resealed, _by_others, _reseal),
    "basis": Target(("basis.safetensors", "basis_config.json"), _basis),
    "blocks": Target(("basis.safetensors", "basis_config.json"), _basis),
    "base": Target(("model-00001-of-00003.safetensors", "model.safetensors.index.json"), _base),
    "project": Target(("lorasb.toml",), _project, _toml),
    "onnx": Target(("adapter.onnx_adapter", "lorasb.json"), _onnx),
    "rows": Target(("train.jsonl",), _rows, _json_lines),
}
