"""Training in several processes, on a CPU (gloo): the same R as in one; and under torchrun a killed worker."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from shutil import copytree

import pytest
from safetensors.torch import load_file

from integration.torture.zygote import shared_zygote
from lorasb_export import Adapter, calibrate
from lorasb_export.environment import child_environment
from lorasb_export.settings import CalibrationSettings
from tests.conftest import lorasb, write_splits
from tests.tiny import make_llama

PROJECT = """
model = "llama"
[fit]
batch_size = 4
epochs = 2
learning_rate = 1e-2
dtype = "float64"
checkpoint_every = 3
[tasks.plus]
data = "plus"
[tasks.minus]
data = "minus"
"""
FSDP = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from lorasb_export import Adapter, Basis, distributed
from lorasb_export.base.model import BaseModel
from lorasb_export.training.muon import Muon, groups_of

def train(sharding, optimizer):
    model = BaseModel.resolve("llama").load(dtype="float32", device="cpu").train()
    adapter = Adapter.attach(model, Basis.load("basis"))
    if sharding != "whole":
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if sharding == "mixed" else MixedPrecisionPolicy()
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    if optimizer == "muon":
        steps = Muon(groups_of(model), lr=1e-2)
    else:
        # eps: an entry whose gradient bf16 cannot tell from zero would take a whole step, to this side or that.
        steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    for step in range(3):
        ids = torch.randint(3, 98, (4, 12), generator=torch.Generator().manual_seed(step))
        mine = ids[distributed.rank() :: distributed.world_size()]
        model(mine, labels=mine, use_cache=False).loss.backward()
        steps.step()
        steps.zero_grad()
    adapter.save(f"{sharding}/{optimizer}")

distributed.start()
for sharding in ("plain", "mixed") if distributed.world_size() > 1 else ("whole",):
    for optimizer in ("adamw", "muon"):
        train(sharding, optimizer)
distributed.stop()
"""
POISON = """
import shutil, time
import torch
from lorasb_cli.main import main
from lorasb_export import distributed
from lorasb_export.training.trainer import RTrainer

step = RTrainer.training_step
def poisoned(self, *inputs):
    names = [run.task.name for run in self.runs]
    if self.state.global_step == 1 and distributed.rank() == 1 and "minus" in names:
        for parameter in self._parameters[names.index("minus")]:
            parameter.data.fill_(torch.nan)
    return step(self, *inputs)
RTrainer.training_step = poisoned
remove = shutil.rmtree
def slow(*paths, **options):  # as a network's disk is; the other process must not end before
    time.sleep(2)
    remove(*paths, **options)
if __name__ == "__main__" and distributed.os.environ["RANK"] == "0":
    shutil.rmtree = slow
main()
"""
KILLED = """
import os, signal
from lorasb_cli.main import main
from lorasb_export import distributed
from lorasb_export.training.trainer import RTrainer

step = RTrainer.training_step
def killed(self, *inputs):
    if self.state.global_step == 7 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *inputs)
RTrainer.training_step = killed
main()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project, and what one process trains in it: `alone/plus`, and both tasks in `together`. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "llama")
    for name, sign in (("plus", 1), ("minus", -1)):
        rows = [{"prompt": f"{a}{name}{b}=", "completion": str(a + sign * b)} for a in range(5) for b in range(5)]
        write_splits(folder / name, {"train": rows[:17], "valid": rows[17:]})
    data = {name: folder / name for name in ("plus", "minus")}
    calibrate(str(folder / "llama"), data, CalibrationSettings(rank=4, dtype="float64")).save(folder / "basis")
    (folder / "lorasb.toml").write_text(PROJECT)
    for place, how in (("alone", "plus"), ("together", "--together")):
        with chdir(folder):
            done = lorasb("fit", how)
        assert done.exit_code == 0, done.output
        (folder / "adapters").rename(folder / place)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A copy."""
    return copytree(made, tmp_path, dirs_exist_ok=True)


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = child_environment("bitsandbytes", OMP_NUM_THREADS="1")  # which takes a second to import
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def difference(found: Path, expected: Path) -> float:
    """The largest entry of the difference of two adapters."""
    one, two = (load_file(folder / "adapter.safetensors") for folder in (found, expected))
    return max(float((one[key] - two[key]).abs().max()) for key in two)


@pytest.fixture(scope="module")
def of_two(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """What two processes print and train: of plus, and of both tasks together."""
    found = {}
    for how in ("plus", "--together"):
        folder = copytree(made, tmp_path_factory.mktemp("two") / "project")
        done = shared_zygote().run("lorasb_cli", "fit", how, "--json", folder=folder, processes=2)
        assert done.returncode == 0, done.stderr
        found[how] = done.stdout, folder / "adapters"
    return found


@pytest.mark.parametrize("how", ["plus", "--together"], ids=["one-task", "together"])
def test_two_processes_train_the_R_of_one(how: str, made: Path, of_two: dict[str, tuple[str, Path]]) -> None:
    """17 rows, 4 a batch: the last batch has one row, of which the second process has none. Only one of them prints."""
    words, adapters = of_two[how]
    printed = json.loads(words)
    assert set(printed["adapters"]) == ({"plus"} if how == "plus" else {"plus", "minus"})
    for name, report in printed["adapters"].items():
        expected = made / ("alone" if how == "plus" else "together") / name
        assert difference(adapters / name, expected) < 1e-6
        alone = Adapter.load(expected).training
        assert report["valid_loss"] == pytest.approx(alone["valid_loss"], abs=1e-5)
        assert report["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-5)
    assert not list(adapters.glob(".*"))


@pytest.mark.parametrize("how", [["--together"], ["minus", "plus"]], ids=["together", "in-turn"])
def test_in_two_processes_a_task_that_diverges_leaves_the_others_their_R(how: list[str], project: Path) -> None:
    """It is the rows of one process that tell; both must leave it out at the same step."""
    (project / "poison.py").write_text(POISON)
    done = shared_zygote().run("poison.py", "fit", *how, "--json", folder=project, processes=2)
    found, messages = json.loads(done.stdout), done.stderr
    assert (done.returncode, list(found["adapters"]), list(found["failed"])) == (1, ["plus"], ["minus"]), messages
    assert "the loss of minus is not finite at step 2, on training rows" in found["failed"]["minus"]["what"]
    assert messages.count("Error: not all was done, 1 failed") == 1
    assert difference(project / "adapters" / "plus", project / "alone" / "plus") < 1e-6


def test_two_processes_foresee_and_keep_what_is_finished(of_two: dict[str, tuple[str, Path]], tmp_path: Path) -> None:
    """Only one of them prints; nothing is trained, written or said to be."""
    _, adapters = of_two["plus"]
    folder = copytree(adapters.parent, tmp_path / "project")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for words in (["plus", "minus", "--dry-run"], ["plus"]):
        done = shared_zygote().run("lorasb_cli", "fit", *words, "--resume", "--json", folder=folder, processes=2)
        assert done.returncode == 0, done.stderr
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        found = json.loads(done.stdout)
        if "--dry-run" in words:
            assert {name: task["action"] for name, task in found["tasks"].items()} == {"plus": "keep", "minus": "train"}
    assert list(found["adapters"]) == ["plus"]


def test_a_killed_worker_ends_the_run_and_it_resumes(project: Path, of_two: dict[str, tuple[str, Path]]) -> None:
    """In the eighth of ten steps, after the checkpoint of the sixth."""
    (project / "killed.py").write_text(KILLED)
    child = start([*TORCHRUN, "killed.py", "fit", "plus"], project)
    _, messages = child.communicate(timeout=600)
    assert child.returncode != 0
    assert "Signal 9 (SIGKILL)" in messages
    assert not (project / "adapters" / "plus").exists(), messages
    assert (project / "adapters" / ".plus.run" / "checkpoint-6" / "complete.json").exists(), messages
    resumed = shared_zygote().run("lorasb_cli", "fit", "plus", "--resume", folder=project, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    _, uninterrupted = of_two["plus"]
    assert difference(project / "adapters" / "plus", uninterrupted / "plus") == 0
    assert Adapter.load(uninterrupted / "plus").training["best_step"] > 7  # its R is none that the killed run had


@pytest.fixture(scope="module")
def sharded(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, and in it what `FSDP` trains: `whole` in this process; in two `plain` and `mixed`."""
    folder = copytree(made, tmp_path_factory.mktemp("sharded") / "project")
    (folder / "script.py").write_text(FSDP)
    with chdir(folder):
        runpy.run_path("script.py")
    done = shared_zygote().run("script.py", folder=folder, processes=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("sharding", "tolerance"), [("plain", 1e-6), ("mixed", 2e-2)], ids=["plain", "mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fsdp2_shards_the_model_and_trains_the_same_R(
    optimizer: str, sharding: str, tolerance: float, sharded: Path
) -> None:
    """Plain `fully_shard`; and in bf16 by its policy, where the frozen tensors are not of one dtype."""
    assert difference(sharded / sharding / optimizer, sharded / "whole" / optimizer) < tolerance
    trained = Adapter.load(sharded / sharding / optimizer)
    start = Adapter.fresh(trained.load_basis())
    assert all((R - start.R[name]).abs().max() > 1e-2 for name, R in trained.R.items())


def test_the_loop_of_ones_own_in_the_readme_runs_as_printed(project: Path) -> None:
    """In a fresh process, beside the broken optional packages that the README's own install brings."""
    blocks = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1:]
    (block,) = [block.partition("```")[0] for block in blocks if "Adapter.attach" in block]
    code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "llama")
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, timeout=300)  # nothing is hidden from it
    assert Adapter.load(project / "adapters" / "mine").rank == 4
