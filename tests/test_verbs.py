"""What the verbs say of themselves, and what they refuse before anything is loaded."""

from __future__ import annotations

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner


def test_no_verb_is_described_by_half_a_sentence() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0
    assert "...\n" not in done.stdout.partition("Commands:")[2]


@pytest.mark.parametrize(
    "words",
    ["merge --dtype foo", "fit --dtype foo", "export --format gguf", "export --precision int3", "serve --mode fast"],
)
def test_a_choice_that_is_none_is_wrong_usage(words: str) -> None:
    done = CliRunner().invoke(app, words.split())
    assert (done.exit_code, "is not one of" in done.stderr) == (2, True)
