"""Several processes, on a CPU (gloo), against one process; and torchrun, told to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from integration import child_environment
from integration.torture.zygote import shared_zygote
from lorasb_export import Adapter, distributed
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.calibration import calibrate as decomposition
from lorasb_export.calibration.calibrate import calibrate
from lorasb_export.calibration.gradients import draw, gradients_of_rows
from lorasb_export.data.task import load_task
from lorasb_export.files.lock import only_writer
from lorasb_export.layers.targets import find_targets
from lorasb_export.project.project import Project
from lorasb_export.settings import CalibrationSettings
from tests.conftest import write_splits
from tests.tiny import make_llama

PROJECT = """
model = "llama"
[basis]
rank = 4
samples = 13
reduction = "raw"
loss = "token"
batch_size = 3
dtype = "float64"
[tasks.a]
data = "data"
"""
CALIBRATE = """
import sys
from pathlib import Path
from unittest.mock import Mock
import torch
from integration.test_distributed import decomposed, sums_of
from lorasb_cli.main import main
from lorasb_export import distributed
from lorasb_export.calibration import calibrate as decomposition

distributed.start()
assert distributed.world_size() == 2
sums = [sums_of(Path.cwd(), rows) for rows in (13, 1)]
torch.save(sums, f"sums-{distributed.rank()}.pt")
svds = decomposition.truncated_svd = Mock(side_effect=decomposition.truncated_svd)
made = decomposed(sums[0])
torch.save((svds.call_count, made), f"decomposed-{distributed.rank()}.pt")
sys.argv = ["lorasb", "calibrate", "--json"]
try:
    main()
finally:
    assert not torch.distributed.is_initialized()  # or the end of Python might abort it
"""
RESUME = """
import os
from pathlib import Path
from lorasb_export import Adapter, distributed, fit
from lorasb_export.errors import SettingsError
from lorasb_export.settings import FitSettings
from lorasb_export.training import checkpoints, runs

distributed.start()
settings = FitSettings(max_steps=4, checkpoint_every=2, learning_rate=1e-3)
train = runs.RTrainer.train
def stopping(self, **options):
    self.args.max_steps = 2
    train(self, **options)
    raise InterruptedError
runs.RTrainer.train = stopping
try:
    fit("llama", "basis", "data", "a", settings)
except InterruptedError:
    pass
runs.RTrainer.train = train
if not distributed.is_main():  # its view of a network's disk is old
    checkpoints.last_complete = lambda folder: None
fit("llama", "basis", "data", "a", settings, resume=True)
assert Adapter.load("a").training["steps"] == 4
if not distributed.is_main():
    os.mkdir("elsewhere")
distributed.barrier()
distributed._SEEN_WITHIN = 0
try:
    fit("llama", "basis", "data", "b" if distributed.is_main() else "elsewhere/b", settings)
except SettingsError as error:
    Path(f"error-{distributed.rank()}").write_text(str(error))
try:
    fit("llama", "basis", "data", "a", settings)
except OSError as error:
    Path(f"exists-{distributed.rank()}").write_text(str(error))
distributed.stop()
"""
STOPPED = """
import os, signal, sys
from lorasb_cli.main import main
from lorasb_export import distributed
from lorasb_export.training.trainer import RTrainer

step = RTrainer.training_step
def stopping(self, *arguments):
    if self.state.global_step == 5 and distributed.rank() == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    return step(self, *arguments)
RTrainer.training_step = stopping
sys.argv = "lorasb fit a --model llama --data data --basis basis --out a --max-steps 2000".split()
main()
"""
BUSY = """
import json
from pathlib import Path
from lorasb_export import distributed
from lorasb_export.project.fit import fit_tasks
from lorasb_export.project.project import Project
from lorasb_export.project.request import FitRequest
from lorasb_export.settings import FitSettings

project, settings = Project.load("lorasb.toml"), FitSettings(max_steps=1, learning_rate=1e-3)
found = []
for options in ({"overwrite": True}, {"resume": True}):
    outcomes = fit_tasks(FitRequest(project, "abc", settings, **options))
    found.append({name: type(outcome).__name__ for name, outcome in outcomes})
Path(f"found-{distributed.rank()}").write_text(json.dumps(found))
distributed.stop()
"""
OTHERS = """
from pathlib import Path
from lorasb_export import BaseModel, calibrate, distributed, fit
from lorasb_export.errors import SettingsError
from lorasb_export.settings import CalibrationSettings, FitSettings

distributed.start()
first, said = distributed.is_main(), []
made = {"rank": 2, "samples": 4}
for begin in (
    lambda: fit("llama", "basis", "data" if first else "changed", "a", FitSettings(max_steps=2)),
    lambda: fit("llama", "basis", "data" if first else "longer", "b", FitSettings(epochs=1)),
    lambda: calibrate("llama", {"a": "data" if first else "changed"}, CalibrationSettings(**made)),
    lambda: calibrate("llama" if first else "moved", {"a": "data"}, CalibrationSettings(**made)),
):
    try:
        begin()
        said.append("done")
    except SettingsError as error:
        said.append(str(error))
Path(f"said-{distributed.rank()}").write_text("\\n".join(said))
distributed.stop()
"""


def two_processes(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Of `script`, in `folder`, as torchrun starts them."""
    (folder / "script.py").write_text(script)
    done = shared_zygote().run("script.py", folder=folder, processes=2)
    assert done.returncode == 0, done.stderr
    return done


def torchrun(script: str, folder: Path, code: int) -> subprocess.CompletedProcess[str]:
    """Two processes of `script` in `folder`."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = child_environment("bitsandbytes", OMP_NUM_THREADS="1")  # which takes a second to import
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a base, a task and a basis."""
    make_llama(tmp_path / "llama")
    write_splits(tmp_path / "data", {"train": [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)]})
    calibrate(str(tmp_path / "llama"), {}, CalibrationSettings(rank=2, directions="random")).save(tmp_path / "basis")
    return tmp_path


def sums_of(folder: Path, rows: int) -> dict[str, torch.Tensor]:
    base = BaseModel.resolve(folder / "llama")
    network, pad_id = base.load(dtype="float64"), base.tokenizer.pad_token_id
    settings = CalibrationSettings(samples=rows, loss="token", batch_size=3)
    drawn = draw(load_task("a", folder / "data"), base, [], settings)
    return gradients_of_rows(network, find_targets(network, "all-linear"), drawn, pad_id, settings)


def decomposed(sums: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a basis is made of, in an order that counts."""
    settings = CalibrationSettings(rank=4, reduction="raw")
    modules, energy, ratios = decomposition._decompose(dict(sums), settings, torch.float64, torch.device("cpu"))
    factors = {name: dict(module.tensors()) for name, module in modules.items()}
    return {"factors": factors, "energy": energy, "ratios": ratios.modules, "overall": ratios.overall()}


def test_processes_wait_for_the_first_one_longer_than_nccl_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be waiting for another run that calibrates the same basis."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    state, group = Mock(), Mock()
    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr("torch.distributed.new_group", group)
    monkeypatch.setattr(distributed, "_hosts", None)
    distributed.start()
    assert group.call_args.kwargs["timeout"] > timedelta(hours=12)
    assert state.call_args == ((), {})  # what they compute together is not waited for so long


def test_the_first_process_decides_where_to_resume_and_all_must_see_its_disk(small: Path) -> None:
    """A process that sees no checkpoint would begin anew, while the other one goes on; both would wait for ever."""
    two_processes(RESUME, small)
    for rank in (0, 1):
        assert "number 1 does not see what number 0 writes" in (small / f"error-{rank}").read_text()
        assert str(small / "a") in (small / f"exists-{rank}").read_text()


def test_processes_that_have_read_other_inputs_do_not_compute_together(small: Path) -> None:
    """A copy on a node's own disk: R would be of both, or, where the one has more rows, both would wait for ever."""
    rows = [{"prompt": f"{a}+1=", "completion": "x"} for a in range(8)]
    write_splits(small / "changed", {"train": rows})
    write_splits(small / "longer", {"train": [*rows, *rows]})
    shutil.copytree(small / "llama", small / "moved")
    network = BaseModel.resolve(small / "llama").load()
    network.model.layers[0].mlp.down_proj.weight.data.add_(1)
    network.save_pretrained(small / "moved")
    two_processes(OTHERS, small)
    said = (small / "said-0").read_text()
    assert said == (small / "said-1").read_text()
    of_each = ["data, tokens", "data, tokens", "rows", "base"]
    for names, error in zip(of_each, said.splitlines(), strict=True):
        assert re.fullmatch(rf"of the 2 .* number 1 \(on \S+\) has other {names}\. Let all nodes .*", error)


def test_sigterm_to_torchrun_stops_all_after_the_same_step_with_a_checkpoint(small: Path) -> None:
    done = torchrun(STOPPED, small, code=1)  # torchrun's own
    assert done.stderr.count("Interrupted. ") == 1
    assert "FutureWarning" not in done.stderr
    (marker,) = small.glob(".a.run/checkpoint-*/complete.json")
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in marker.parent.iterdir()}


def test_a_task_that_another_run_writes_leaves_the_others_their_turn_in_all_processes(small: Path) -> None:
    """Whether it is to be trained, or an adapter that is there to be kept: `b` is there, and another run has it."""
    tasks = "".join(f'[tasks.{name}]\ndata = "data"\n' for name in "abc")
    (small / "lorasb.toml").write_text(f'model = "llama"\n[basis]\npath = "basis"\n{tasks}')
    Adapter.fresh(Basis.load(small / "basis")).save(small / "adapters" / "b")
    with only_writer(small / "adapters" / "b"):
        two_processes(BUSY, small)
    for rank in (0, 1):
        found = json.loads((small / f"found-{rank}").read_text())
        assert found == [{"a": "Adapter", "b": "BusyError", "c": "Adapter"}] * 2


def test_calibrate_in_two_processes(tmp_path: Path) -> None:
    """They share 13 rows, and 1 row, of which the second has none, and the SVDs; then the verb writes one basis."""
    make_llama(tmp_path / "llama")
    rows = [{"prompt": f"{a}+{b}=", "completion": "x" * a + str(a + b)} for a in range(1, 6) for b in range(5)]
    write_splits(tmp_path / "data", {"train": rows})
    (tmp_path / "lorasb.toml").write_text(PROJECT)
    printed = json.loads(two_processes(CALIBRATE, tmp_path).stdout)  # one object, from one of them

    saved = [torch.load(tmp_path / f"sums-{rank}.pt") for rank in (0, 1)]
    for number, expected in enumerate(sums_of(tmp_path, rows) for rows in (13, 1)):
        for name, gradient in expected.items():
            for sums in saved:
                assert (sums[number][name] - gradient).norm() <= 1e-6 * gradient.norm()

    expected = decomposed(saved[0][0])
    names = list(expected["factors"])
    for svds, found in (torch.load(tmp_path / f"decomposed-{rank}.pt") for rank in (0, 1)):
        assert svds == len(names) / 2
        assert {key: list(found[key]) for key in found} == {key: list(expected[key]) for key in expected}
        assert all(found[key] == expected[key] for key in ("energy", "ratios", "overall"))
        for name, factors in expected["factors"].items():
            assert all(torch.equal(found["factors"][name][key], factor) for key, factor in factors.items())

    basis = Basis.load(tmp_path / "basis")
    settings = CalibrationSettings(**Project.load(tmp_path / "lorasb.toml").calibration)
    alone = calibrate(str(tmp_path / "llama"), {"a": tmp_path / "data"}, settings)
    assert printed["sha256"] == basis.sha256
    assert basis.calibration["samples"] == 13
    for name, module in alone.modules.items():
        assert torch.allclose(basis.modules[name].S, module.S, rtol=1e-6)
