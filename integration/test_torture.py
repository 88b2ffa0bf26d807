"""Short runs of the harnesses in `integration/torture`."""

from __future__ import annotations

import pytest

from integration.torture import concurrency, kill, lies


def test_lies_are_refused_or_read_rightly() -> None:
    tally = lies.run(200, seed=0)
    assert tally.tried == 200
    assert not tally.problems


def test_the_harness_finds_a_reader_that_believes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness counts as accepted is not only what raises."""
    believing = lies.Target(("train.jsonl",), lambda folder: len(list(folder.iterdir())), lambda folder: "rows")
    monkeypatch.setattr(lies, "TARGETS", {"rows": believing})
    tally = lies.run(5, seed=0)
    assert tally.accepted_bad == 5


def test_killed_verbs_go_on_and_end_with_the_same_bytes() -> None:
    verbs = {name: kill.VERBS[name] for name in ("calibrate", "fit", "merge", "peft")}
    tally = kill.run(2, seed=0, verbs=verbs, hub=False)
    assert tally.tried == 8
    assert not tally.problems


def test_two_commands_on_one_folder_do_not_mix() -> None:
    tally = concurrency.run(1, seed=0)
    assert tally.tried == 7
    assert not tally.problems
