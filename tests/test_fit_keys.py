"""Keys of [fit] in lorasb.toml: what each of them does to the R of a run, or to its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorasb_export import Adapter, calibrate
from lorasb_export.settings import CalibrationSettings
from tests.conftest import lorasb


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one task with its basis, of an S large enough to be seen beside a step; the working folder."""
    monkeypatch.chdir(tmp_path)
    calibrate(str(llama), {"a": sums}, CalibrationSettings(rank=4, eta=0.01, dtype="float64")).save("basis")
    (tmp_path / "lorasb.toml").write_text(
        f'model = "{llama}"\n[tasks.a]\ndata = "{sums}"\n'
        '[fit]\ndtype = "float64"\nkeep = "last"\nwarmup = 0\nmax_grad_norm = 1e9\n'
    )
    return tmp_path


def fitted(project: Path, *keys: str, steps: int = 1) -> Adapter:
    """The adapter of a run in which [fit] has these keys too."""
    file = project / "lorasb.toml"
    as_made = file.read_text()
    file.write_text(as_made + "\n".join([*keys, f"max_steps = {steps}"]))
    done = lorasb("fit", "a", "--overwrite")
    assert done.exit_code == 0, done.stderr
    file.write_text(as_made)
    return Adapter.load("adapters/a")


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
        ("constant_with_warmup", [1, 1, 1, 1]),
    ],
)
def test_the_schedule_is_that_of_the_steps(schedule: str, shares: list[float], project: Path) -> None:
    fitted(project, f'schedule = "{schedule}"', "learning_rate = 1e-3", steps=4)
    log = [json.loads(line) for line in Path("adapters/a/training_log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates == pytest.approx([1e-3 * share for share in shares], rel=1e-5)


@pytest.mark.parametrize(("init", "share"), [("svd", 0.5), ("zero", 0)])
def test_R_starts_where_init_and_scaling_say(init: str, share: float, project: Path) -> None:
    """At S/s, or at zero: after a step of next to nothing it is still there."""
    adapter = fitted(project, f'init = "{init}"', "scaling = 2.0", "learning_rate = 1e-12")
    assert adapter.scaling == 2
    modules = adapter.load_basis().modules
    for name, R in adapter.R.items():
        assert modules[name].S.max() > 0.01
        torch.testing.assert_close(R, torch.diag(share * modules[name].S).to(R.dtype), rtol=1e-6, atol=1e-9)


def test_training_is_blind_to_the_scaling_at_the_scaled_rate(project: Path) -> None:
    """Theorem 5, of AdamW: at the rate lr/s the update s·R goes the same way; so s is in every forward pass."""
    plain, scaled = (
        fitted(project, f"scaling = {s}", f"learning_rate = {0.03 / s}", 'optimizer = "adamw"', steps=5)
        for s in (1.0, 3.0)
    )
    start = Adapter.fresh(plain.load_basis())
    for name, R in plain.R.items():
        assert (R - start.R[name]).abs().max() > 0.02
        torch.testing.assert_close(3 * scaled.R[name], R, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_shrinks_R_by_the_rate(optimizer: str, project: Path) -> None:
    """Decoupled: in one step lr·λ·R0 is all that it takes."""
    keys = (f'optimizer = "{optimizer}"', "learning_rate = 0.1")
    plain, decayed = fitted(project, *keys), fitted(project, *keys, "weight_decay = 0.5")
    start = Adapter.fresh(plain.load_basis())
    for name, R in plain.R.items():
        expected = 0.1 * 0.5 * start.R[name]
        assert expected.max() > 1e-3
        torch.testing.assert_close((R - decayed.R[name]).double(), expected.double(), rtol=0, atol=1e-6)
