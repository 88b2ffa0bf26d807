"""Cards that people edit, in the folder or on the Hub: nothing they wrote is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorasb_export.cards import card
from lorasb_export.cards.readme import BEGIN, END, front_matter, merge, update
from lorasb_export.cards.sections import Facts
from lorasb_export.errors import ArtifactError, OutputError
from tests.cards import ADAPTER, FIGURES, adapter


def test_an_update_replaces_the_block_and_keeps_the_rest(tmp_path: Path) -> None:
    keys = "license: mit # ours\nlanguage: no\ntags:\n- mine\n- lorasb\nlibrary_name: old\n"
    user = f"---\n{keys}---\n# My title\n\nBefore.\n"
    (tmp_path / "README.md").write_text(user)
    card.write(tmp_path, adapter(scaling=1.0))
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nAfter: \\1 stays.\n")
    card.write(tmp_path, adapter(scaling=7.5))
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert "| scaling s | 7.5 |" in text
    assert "| scaling s | 1 |" not in text
    assert text.index("# My title\n\nBefore.") < text.index(BEGIN)
    assert text.endswith("\nAfter: \\1 stays.\n")
    front = text.split("---\n")[1]
    assert "license: mit # ours\nlanguage: no\n" in front  # not turned into `language: false`
    keys = yaml.safe_load(front)
    assert keys["library_name"] == "lorasb"
    assert keys["tags"] == ["lora-sb", "lorasb", "mine"]


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    card.write(tmp_path, adapter())
    first = (tmp_path / "README.md").read_bytes()
    card.write(tmp_path, adapter())
    assert (tmp_path / "README.md").read_bytes() == first


def test_an_opened_block_that_never_ends_swallows_nothing() -> None:
    text = update(f"{BEGIN}\nMine.\n", adapter())
    text = update(text, adapter(scaling=7.5))
    assert "\nMine.\n" in text
    assert text.count("| scaling s |") == 1


@pytest.mark.parametrize(("tags", "added"), [("mine", ["mine"]), ("[mine, yours]", ["mine", "yours"]), ("", [])])
def test_tags_of_the_user(tags: str, added: list[str]) -> None:
    old = f"---\ntags: {tags}\n---\n"
    for text in (update(old, adapter()), merge("", old, adapter())):
        assert front_matter(text)["tags"] == ["lora-sb", "lorasb", *added]


def test_tags_that_are_none_are_refused() -> None:
    with pytest.raises(ArtifactError, match="the card's tags are 5, not words"):
        update("---\ntags: 5\n---\n", adapter())


def test_broken_front_matter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\ntext\n")
    with pytest.raises(ArtifactError, match="front matter is not valid YAML") as caught:
        card.write(tmp_path, adapter())
    assert str(tmp_path / "README.md") in str(caught.value)
    assert (tmp_path / "README.md").read_text().endswith("text\n")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\ntags: [*b, *b]", "has an alias"),  # 20 such lines: a million words
        ("a: &a {x: 1}\nb: {<<: *a}", "has an alias"),
        ("a:\n" + "".join(f"{'  ' * depth}- b:\n" for depth in range(11)), "is nested more than 20 deep"),
        (f"a: {'[' * 2000}{']' * 2000}", "is nested more than 20 deep"),  # they took 16 s
        ("license: !!int ''", "is not valid YAML, or JSON cannot hold it"),
        ("license: !!timestamp mine", "is not valid YAML, or JSON cannot hold it"),
        (f"license: 0x{'f' * 5000}", "is not valid YAML, or JSON cannot hold it"),
        ("2020-01-01: mine", "is not valid YAML, or JSON cannot hold it"),
    ],
)
def test_front_matter_of_anybody_ends_in_an_error_that_says_where(keys: str, what: str) -> None:
    theirs = f"---\n{keys}\n---\ntext\n"
    with pytest.raises(ArtifactError, match=f"the card's front matter {what}") as caught:
        merge("", theirs, adapter())
    assert caught.value.where == "README.md on the Hub"
    with pytest.raises(ArtifactError, match=what):
        update(theirs, adapter(), where="a/README.md")


def test_tags_that_are_none_are_shown_in_short() -> None:
    with pytest.raises(ArtifactError, match="the card's tags are") as caught:
        update(f"---\ntags: [{'x' * 5000}, 5, 5]\n---\n", adapter())
    assert str(caught.value).startswith("the card's tags are ['xxxxxxxxxxxx...xxxxxxxxxxxxx', 5, 5], not words")


MINE = "---\nlanguage: no\n---\nWritten in the folder.\n"
THEIRS = "Written on the Hub.\n"


def on_the_hub(card: str, text: str) -> str:
    """The published card after somebody wrote `text` under it on the website."""
    return f"{card}\n{text}"


def test_text_written_on_the_hub_survives_a_push() -> None:
    first = merge("", "", adapter())
    second = merge("", on_the_hub(first, THEIRS), adapter(scaling=7.5))
    assert THEIRS in second
    assert "| scaling s | 7.5 |" in second
    assert merge("", second, adapter(scaling=7.5)) == second


def test_text_written_in_the_folder_replaces_what_was_published_from_there() -> None:
    first = merge(MINE, "", adapter())
    assert "language: no\n" in first
    again = merge(MINE.replace("folder", "new folder"), first, adapter())
    assert "Written in the new folder." in again
    assert "Written in the folder." not in again
    assert "Written in the folder." in merge("", first, adapter())  # the folder was written anew: nothing is lost


def test_text_written_on_both_sides_is_not_lost_in_silence() -> None:
    published = merge(MINE, "", adapter())
    edited = published.replace("in the folder", "on the Hub")
    kept = merge(MINE, edited, adapter())  # edited there alone
    assert kept == edited
    for theirs in (edited, kept):
        with pytest.raises(OutputError, match="edited here and on the Hub, differently"):
            merge(MINE.replace("folder", "new folder"), theirs, adapter())
    assert merge(edited, edited, adapter()).count("Written on the Hub.") == 1


def test_nothing_generated_of_another_adapter_survives() -> None:
    """A new R without an evaluation, on a base and data that are folders now."""
    training = {"task": "dates", "data": "me/dates", "evaluation": {"test": {"exact_match": FIGURES}}}
    theirs = merge(MINE, "", card.adapter_card(ADAPTER | {"training": training}, "me/a", Facts({"license": "mit"})))
    local = card.adapter_card({**ADAPTER, "base_model_name_or_path": "base"}, "me/a")
    keys = front_matter(merge(MINE, theirs, local))
    assert {"language", "license"} == set(keys) - set(front_matter(local))
    assert {"base_model", "datasets", "metrics", "model-index"} & set(keys) == set()


def test_a_published_licence_stays_until_the_folder_says_another() -> None:
    def licence(mine: str, theirs: str) -> str:
        generated = card.adapter_card(ADAPTER, "me/a", Facts({"license": "apache-2.0"}))
        return str(front_matter(merge(mine, theirs, generated))["license"])

    published = merge("", "", card.adapter_card(ADAPTER, "me/a", Facts({"license": "mit"})))
    assert licence("", "") == "apache-2.0"
    assert licence("", published) == "mit"
    assert licence("---\nlicense: gpl-3.0\n---\n", published) == "gpl-3.0"
    named = merge("", "", card.adapter_card(ADAPTER, "me/a", Facts({"license": "other", "license_name": "llama3"})))
    assert "license_name" not in front_matter(merge("---\nlicense: gpl-3.0\n---\n", named, adapter()))


def test_a_byte_order_mark_hides_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\nMine.\n")
    card.write(tmp_path, card.adapter_card(ADAPTER))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (front_matter(text)["license"], text.count("license:")) == ("mit", 1)
