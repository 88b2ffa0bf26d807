"""Short runs of the harnesses in `integration/torture`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration.torture import agree, concurrency, disk, kill, lies
from integration.torture.agree_ways import WAYS
from integration.torture.agree_world import Case
from integration.torture.faulty_disk import FAULTS, FaultyDisk
from integration.torture.zygote import shared_zygote
from lorasb_export.adapter import Adapter
from lorasb_export.exporting import peft
from tests.conftest import write_splits

pytestmark = pytest.mark.usefixtures("quick_exporters")


def test_lies_are_refused_or_read_rightly() -> None:
    tally = lies.run(200, seed=0)
    assert tally.tried == 200
    assert not tally.problems


def test_the_harness_finds_a_reader_that_believes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness counts as accepted is not only what raises."""
    believing = lies.Target(("train.jsonl",), lambda folder: len(list(folder.iterdir())), lambda folder: "rows")
    monkeypatch.setattr(lies, "TARGETS", {"rows": believing})
    monkeypatch.setattr(lies, "_make", lambda root: write_splits(root / "rows", {"train": [{"prompt": "1"}]}))
    tally = lies.run(5, seed=0)
    assert tally.accepted_bad == 5


def test_killed_verbs_go_on_and_end_with_the_same_bytes() -> None:
    tally = kill.run(2, seed=0, verbs=("calibrate", "fit", "merge", "peft", "onnx"), hub=False, serve=False)
    assert tally.tried == 10
    assert tally.disturbed > 0  # a signal may come after the end, but not always
    assert not tally.problems


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_fork_ends_the_child(tmp_path: Path, number: signal.Signals) -> None:
    """It is not lost in the hooks of `os.fork`, which then leave their locks shut."""
    for _ in range(20):
        shared_zygote().start(tmp_path, "inspect", ".", log=tmp_path / "log", number=number, after=0)
        assert shared_zygote().wait()[0] in (-number, 128 + number), (tmp_path / "log").read_text()


def test_a_faulty_disk_costs_nothing_but_the_run() -> None:
    tally = disk.run(3, seed=0, verbs=("calibrate",), hub=False)
    assert tally.tried > 30
    assert not tally.problems


def test_the_faulty_disk_fails_where_it_is_told_to(tmp_path: Path) -> None:
    """A writer that looks at no error is found out: half its text is there."""
    (tmp_path / "mount").mkdir()
    faulty = FaultyDisk(tmp_path / "mount", tmp_path)
    path, heedless = tmp_path / "mount" / "x", "import sys; open(sys.argv[1], 'wb', 0).write(b'0123456789')"
    faulty.arm(FAULTS["full"], call=2)
    for outside in (tmp_path / "y", path):
        subprocess.run([sys.executable, "-c", heedless, str(outside)], env=os.environ | faulty.variables, check=True)
    assert (faulty.heal(), faulty.hit) == (2, "write x")
    assert ((tmp_path / "y").read_text(), path.read_text()) == ("0123456789", "01234")


def test_two_commands_on_one_folder_do_not_mix() -> None:
    tally = concurrency.run(1, seed=0)
    assert tally.tried == 10
    assert not tally.problems


def test_every_way_out_gives_the_same_logits() -> None:
    tally = agree.run(3, seed=1, every=0)
    assert tally.tried == 3
    assert not tally.problems


def test_the_harness_finds_a_way_out_that_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = peft.folded_tensors

    def transposing(adapter: Adapter) -> dict[str, torch.Tensor]:
        adapter.R = {name: R.T.contiguous() for name, R in adapter.R.items()}
        return honest(adapter)

    monkeypatch.setattr(peft, "folded_tensors", transposing)
    monkeypatch.setattr(agree, "WAYS", {way: WAYS[way] for way in ("unmerged", "peft")})
    tally = agree.run(2, seed=1, every=0)
    assert tally.wrong == 2
    assert all("peft, a0: gap" in problem and "unmerged" not in problem for problem in tally.problems)


def test_gemma_has_its_exact_numbers_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that the ONNX builder rounds (√48, and 1 + w in bf16), nor attention scores without their bound."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = {**sizes, **heads, "tie_word_embeddings": True}
    adapters = {"a0": 1.0, "a1": 1.5}
    cases = [
        Case(0, number, family, config, "bfloat16", "all-linear", 8, 1.0, adapters, "random")
        for number, family in enumerate(("Gemma", "Gemma2"))
    ]
    monkeypatch.setattr(agree, "draw", lambda seed, number, served: cases[number])
    assert not agree.run(2, seed=0, every=0).problems
