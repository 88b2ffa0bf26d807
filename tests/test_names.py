"""Which adapters the words of `lorasb serve --adapters` mean."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from lorasb_cli.main import app
from lorasb_cli.words import listed, low_scores, spelled_out
from typer.testing import CliRunner

from lorasb_export import names
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.names import (
    adapters_in,
    name_problem,
    ours_in,
    resolve_adapters,
    served_name_problem,
    task_name_problem,
)
from lorasb_export.project.project import Project
from tests.artifacts import forbid


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with adapters/billing and adapters/shipping, and an adapter in runs/7."""
    monkeypatch.chdir(tmp_path)
    for name in ("adapters/billing", "adapters/shipping", "runs/7"):
        folder(tmp_path / name)
    return tmp_path


def resolve(*names: str) -> dict[str, Path | str]:
    return resolve_adapters(names, Path("adapters"), ["billing", "later"])


def test_project_names_folders_and_hub_ids_in_the_order_given(project: Path) -> None:
    found = resolve("shipping", "billing", "./runs/7", f"old={project}/runs/7", "me/task-lorasb", "v1=me/x@refs/pr/1")
    assert found == {
        "shipping": Path("adapters/shipping"),
        "billing": Path("adapters/billing"),
        "7": Path("runs/7"),
        "old": project / "runs" / "7",
        "task-lorasb": "me/task-lorasb",
        "v1": "me/x@refs/pr/1",
    }
    assert list(found)[:2] == ["shipping", "billing"]


def test_names_may_be_read_from_a_file(project: Path) -> None:
    """More of them than Linux takes in one word of a command; a path there may have a comma."""
    Path("names.txt").write_text("\ufeffa\n\n other/x,y \r\nowner/name@v1\n")
    assert listed("@names.txt") == ["a", "other/x,y", "owner/name@v1"]
    Path("nothing.txt").write_text("\n")
    Path("bytes.txt").write_bytes(b"\xff")
    reasons = {"gone.txt": "cannot read a list of names: No such file or directory (gone.txt)."}
    reasons |= {
        "nothing.txt": "the list of names is empty (nothing.txt).",
        "bytes.txt": "cannot read a list of names: ",
    }
    for verb in ("serve --dry-run", "generate hi"):
        for file, reason in reasons.items():
            done = CliRunner().invoke(app, [*verb.split(), "--adapters", f"@{file}"])
            assert (done.exit_code, done.stderr.startswith(f"Error: {reason}")) == (1, True), done.stderr
            assert done.stderr.endswith(f"({file}). After @ give a file with one name a line\n")


def test_a_pattern_stands_for_the_names_that_it_matches(project: Path) -> None:
    """Each once and in the order given; what has a / is a path, as a shell has written it out."""
    Path("some.txt").write_text("eu-2\nus-*\n")
    known = ["eu-1", "eu-2", "us-1"]
    assert spelled_out(["eu-?", "@some.txt", "runs/[7]", "owner/name"], lambda: known) == [
        *known,
        "runs/[7]",
        "owner/name",
    ]
    with pytest.raises(SettingsError, match=r"no name matches the pattern \(asia-\*\)"):
        spelled_out(["eu-1", "asia-*"], lambda: known)
    for words in (["fit", "x*"], ["evaluate", "x*"], ["export", "x*"], ["serve", "--adapters", "x*"]):
        done = CliRunner().invoke(app, words)
        assert (done.exit_code, "no name matches the pattern (x*)" in done.stderr) == (1, True), done.stderr
    for name in ("billing", "shipping"):
        (project / "adapters" / name / "adapter_config.json").write_text('{"peft_type": "LORA_SB"}')
    done = CliRunner().invoke(app, ["generate", "hi", "--adapters", "billing,sh*", "--model", "./none"])
    assert "no name matches" not in done.stderr
    (project / "adapters/peft").mkdir()
    (project / "adapters/peft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = CliRunner().invoke(app, ["evaluate", "pe*"])  # another tool's is no name of ours
    assert "no name matches the pattern (pe*)" in done.stderr


def test_the_worst_of_many_scores_are_told() -> None:
    """A lower loss is better; a classifier's base has no score, and a number may be missing."""
    exact = {f"t{k}": {"exact_match": {"base": 0.5, "adapter": k / 20}} for k in range(20)}
    assert low_scores(exact) == [
        "no better than the base: t0, t1, t2, t3, t4, t5, t6, t7, t8, t9 and 1 more",
        "lowest exact_match: t0 0.0%, t1 5.0%, t2 10.0%, t3 15.0%, t4 20.0%",
    ]
    losses = {f"t{k}": {"loss": {"base": None, "adapter": float(k)}} for k in range(11)}
    assert low_scores(losses) == ["highest loss: t10 10.0000, t9 9.0000, t8 8.0000, t7 7.0000, t6 6.0000"]
    two = {"a": {"loss": {"base": 1.0, "adapter": 2.0}, "exact_match": {"base": 0.1, "adapter": 0.2}}, "b": {}}
    assert low_scores(two) == []
    assert low_scores({"a": {"loss": {"base": 1.0, "adapter": 1.0}}, "b": {"loss": {"adapter": None}}}) == [
        "no better than the base: a"
    ]


def test_an_existing_folder_goes_before_a_hub_id(project: Path) -> None:
    assert resolve("runs/7", "b=runs/8") == {"7": Path("runs/7"), "b": "runs/8"}


def test_a_name_is_looked_up_in_the_project_then_here(project: Path) -> None:
    for path in ("billing", "here"):
        folder(project / path)
    (project / "later").mkdir()  # of the task's data, say
    assert resolve("b=billing", "here") == {"b": Path("adapters/billing"), "here": Path("here")}


@pytest.mark.parametrize("word", ["./adapters", "./runs/8", "/etc/passwd", "a=../../x", ".."])
def test_a_path_of_no_adapter_is_refused_when_it_is_read(project: Path, word: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--adapters", f"billing, {word},", "--dry-run"])
    assert "2 of 2 adapters cannot be served" in done.stderr
    message = "file not found" if word in ("./adapters", "..") else "neither a folder nor a Hub id"
    assert message in done.stderr.splitlines()[2]


def test_a_linked_folder_is_served_by_the_name_of_the_link(project: Path) -> None:
    (project / "adapters" / "latest").symlink_to("billing")
    assert list(resolve("adapters/latest", "runs/7/../7/")) == ["latest", "7"]


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "x" * 96])
def test_good_names(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", ".a", "-a", "a/b", "a b", "a\n", "é", "x" * 97, "a=b", "a,b"])
def test_bad_names(name: str) -> None:
    assert name_problem(name) is not None


def test_a_task_may_have_a_name_that_is_not_served() -> None:
    assert name_problem("text") is None
    assert "'text' cannot be served" in str(served_name_problem("text"))
    assert served_name_problem("texts") is None
    assert served_name_problem("a/b") == name_problem("a/b")


@pytest.mark.parametrize("name", ["base", "runs"])
def test_what_lies_or_answers_where_adapters_do_names_no_task(name: str, tmp_path: Path) -> None:
    assert name_problem(name) is None
    (tmp_path / "lorasb.toml").write_text(f'[tasks.{name}]\ndata = "a"\n')
    project = Project.load(tmp_path / "lorasb.toml")  # of an older one the other verbs go on
    for words, data in ((None, None), ([name], "rows.jsonl")):
        with pytest.raises(SettingsError, match=f"'{name}' cannot name a task"):
            project.tasks_to_fit(words, data)
    assert task_name_problem("bases") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("biling", "no adapter 'biling' (adapters). Write billing or ./biling for a folder elsewhere"),
        ("b=zzz", "no adapter 'zzz' (adapters). Write billing, shipping or ./zzz for a folder elsewhere"),
        ("later", "task later has no adapter yet (adapters). Run: lorasb fit later"),
        ("a b=runs/7", "'a b' cannot be served as a name"),
        ("=runs/7", "'' cannot be served as a name"),
        ("a=", "no adapter ''"),
        ("me/a..b", "'a..b' cannot be served as a name"),
    ],
)
def test_a_wrong_entry_says_why(project: Path, entry: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(entry)
    assert message in str(caught.value)


def test_a_folder_whose_name_cannot_be_served_needs_a_name(project: Path) -> None:
    folder(project / "runs" / "my task")
    with pytest.raises(SettingsError, match=r"Write NAME=\./runs/my task"):
        resolve("./runs/my task")
    assert resolve("mine=./runs/my task") == {"mine": Path("runs/my task")}


def test_a_folder_with_an_equals_sign_is_not_taken_for_a_name_and_another_folder(project: Path) -> None:
    """As when all adapters of a folder are served: `v2` would answer with `billing`."""
    folder(project / "adapters" / "v2=billing")
    with pytest.raises(SettingsError, match="Write NAME=v2=billing"):
        resolve("billing", "v2=billing")
    assert resolve("b=v2=billing")["b"] == Path("adapters/v2=billing")


def test_two_entries_of_one_name_are_refused(project: Path) -> None:
    folder(project / "other" / "billing")
    with pytest.raises(SettingsError, match="'billing' is given twice"):
        resolve("billing", "./other/billing")
    assert len(resolve("billing", "b=./other/billing")) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_links_may_not_lead_out_of_the_adapters_folder(project: Path, inside: bool) -> None:
    target = project / ("adapters/billing" if inside else "runs/7")
    (project / "adapters" / "link").symlink_to(target)
    if inside:
        assert resolve("link") == {"link": Path("adapters/link")}
        return
    with pytest.raises(SettingsError, match="leads out of adapters"):
        resolve("link")


def test_a_linked_file_inside_an_adapter_is_refused_too(project: Path) -> None:
    (project / "adapters" / "billing" / "adapter.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(SettingsError, match=r"adapter\.safetensors is a link that leads out of adapters"):
        resolve("billing")


def test_of_many_names_that_are_gone_ten_are_told_and_the_adapters_are_listed_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Mock(wraps=names.adapters_in)
    monkeypatch.setattr(names, "adapters_in", listed)
    with pytest.raises(SettingsError) as caught:
        resolve(*(f"gone-{k}" for k in range(50)))
    assert ("10 problems" in str(caught.value), "'gone-10'" in str(caught.value)) == (True, False)
    assert listed.call_count == 1
    with pytest.raises(SettingsError, match="task later has no adapter yet"):
        resolve("later")
    assert listed.call_count == 1
    passed = resolve_adapters([*(f"gone-{k}" for k in range(50)), "billing"], Path("adapters"), pass_over=True)
    assert list(passed) == ["billing"]


def test_all_problems_are_reported_at_once(project: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve("biling", "later", "shipping", "a b=billing")
    assert "3 problems, nothing is served" in str(caught.value)
    assert all(f"\n  {part}" in str(caught.value) for part in ("1. no adapter 'biling'", "2. task later", "3. 'a b'"))


def test_an_adapter_that_may_not_be_looked_into_is_left_to_who_loads_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be passed over in silence; lost+found is a disk's own."""
    (project / "adapters" / "lost+found").mkdir()
    for name in ("billing", "lost+found"):
        forbid(project / "adapters" / name, monkeypatch)
    assert adapters_in(project / "adapters") == ["billing", "shipping"]
    assert ours_in(project / "adapters") == ["billing"]  # the other is of no kind
    assert resolve("billing") == {"billing": Path("adapters/billing")}


def test_adapters_that_may_not_be_listed_are_not_none(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapters_in(project / "nowhere") == []
    forbid(project / "adapters", monkeypatch)
    with pytest.raises(ArtifactError, match=r"cannot be read: Permission denied \(.*/adapters\)\. Check who may"):
        Project.load(None).find_adapter(None)
