"""What is said of a dataset where the Hub fails: that it does, in the words of `datasets` as it is installed."""

from __future__ import annotations

import pytest

from integration.hub_client import Hub
from integration.hub_server import Fault

LOAD = """
import sys
from lorasb_export import load_task
from lorasb_export.errors import DataError
try:
    load_task("a", sys.argv[1])
except DataError as error:
    print(error)
"""


def fault(status: int, **headers: str) -> Fault:
    return Fault("datasets/", status=status, headers=headers, times=99)


@pytest.mark.parametrize(
    ("of_hub", "text"),
    [
        (fault(503), "the Hub fails (503) (me/rows). Try again later"),
        (fault(429), "the Hub's rate limit is reached (me/rows). Wait a few minutes"),
        (fault(401), "the Hub asks for a valid token (me/rows). Run `hf auth login`"),
        (fault(403), "this token may not do that: fault (me/rows)."),
        (Fault("datasets/", "lost", times=99), "the Hub cannot be reached (me/rows). Check the network"),
    ],
)
def test_a_hub_that_fails_is_no_wrong_path(any_hub: Hub, of_hub: Fault, text: str) -> None:
    any_hub.faults.append(of_hub)
    _, said, errors = any_hub.start(LOAD, "me/rows")
    assert said.startswith(f"the dataset cannot be read: {text}"), said + errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the dataset cannot be read: the Hub cannot be reached (me/rows)"),
        ({"HF_HUB_OFFLINE": "1"}, "the dataset cannot be read: HF_HUB_OFFLINE is set and the cache does not have it"),
        ({}, "no such file, folder or Hub dataset: Dataset 'me/rows' doesn't exist on the Hub"),
    ],
)
def test_neither_reached_nor_there(any_hub: Hub, changes: dict[str, str], text: str) -> None:
    _, said, errors = any_hub.start(LOAD, "me/rows", **changes)
    assert said.startswith(text), said + errors


def test_a_connection_that_breaks_is_tried_again(any_hub: Hub) -> None:
    any_hub.faults.append(lost := Fault("datasets/", "lost", times=2))
    _, said, errors = any_hub.start(LOAD, "me/rows")
    assert lost.times == 0
    assert "doesn't exist on the Hub" in said, said + errors
