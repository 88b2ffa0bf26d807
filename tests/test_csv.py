"""Rows from CSV files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasb_export import TaskSource, load_task
from lorasb_export.errors import DataError
from tests.rows import PAIR, in_csv, rows_of


def test_csv(tmp_path: Path) -> None:
    """Quotes, a line break in a cell, an empty line, the mark that Windows editors begin with."""
    path = in_csv(tmp_path, '\ufeffquestion,answer,more\r\n"1+1=, ""say""\nit",2,x\r\n\r\n3,4,\r\n')
    assert rows_of(path, columns=PAIR) == [
        {"prompt": '1+1=, "say"\nit', "completion": "2"},
        {"prompt": "3", "completion": "4"},
    ]
    for separator in ";\t":
        text = f'prompt{separator}completion\n"a, {separator} b"{separator}1,5\n'
        assert rows_of(in_csv(tmp_path, text)) == [{"prompt": f"a, {separator} b", "completion": "1,5"}]
    upper = in_csv(tmp_path, "text\n" + "x" * 200_000, "LONG.CSV")
    assert len(rows_of(upper)[0]["text"]) == 200_000


LABELS = {
    "yes no": (["yes", "no"], False),
    "1 0": ([1, 0], False),
    "+1 -1": ([1, -1], False),
    "1 0.5": ([1, 0.5], True),
    "1 2 3+": (["1", "2", "3+"], False),
    "007 7": (["007", "7"], False),
    "123456789012345678 7": ([123456789012345678, 7], False),
    "1234567890123456789 7": (["1234567890123456789", "7"], False),  # an id: no other program keeps it as a number
    "-1.5e3 .25": ([-1500.0, 0.25], True),
    "1e-05 4": ([1e-05, 4], True),  # as pandas writes it
    "1e5 1.": ([1e5, 1.0], True),
    "nan inf": (["nan", "inf"], False),  # names, for all we know
    "none some": (["none", "some"], False),
    "NA null": (["NA", "null"], False),
    f"{'9' * 5000} 0x1": (["9" * 5000, "0x1"], False),
}


@pytest.mark.parametrize("cells", LABELS)
def test_labels_of_csv_that_are_written_as_numbers_are_numbers(cells: str, tmp_path: Path) -> None:
    text = "mood;text;more\n" + "".join(f"{cell};7;8\n" for cell in cells.split())
    source = TaskSource(str(in_csv(tmp_path, text.replace(";", "\t"))), {"text": "text", "label": "mood"})
    labels, regression = LABELS[cells]
    task = load_task("t", source)
    assert task.rows("train") == [{"text": "7", "label": label} for label in labels]
    assert [type(row["label"]) for row in task.rows("train")] == [type(label) for label in labels]
    assert task.regression == regression


def test_a_decimal_comma_is_one_where_commas_do_not_separate(tmp_path: Path) -> None:
    assert [row["label"] for row in rows_of(in_csv(tmp_path, "text;label\na;2,50\nb;-3\n"))] == [2.5, -3]
    assert [row["label"] for row in rows_of(in_csv(tmp_path, 'text,label\na,"2,50"\n'))] == ["2,50"]
    assert [row["label"] for row in rows_of(in_csv(tmp_path, "text\tlabel\na\t2,50\n"))] == ["2,50"]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("prompt,completion\na,b\na\n", "more or fewer cells", 3),
        ("prompt,completion\na,b,c\n", "more or fewer cells", 2),
        ('prompt,completion\na,"b\n', "broken CSV", 2),
        ('prompt,completion\na,b\n"x"y,c\n', "broken CSV", 3),
        ("text,label\na,yes\nb,\n", "the label is empty", 3),
        (b"prompt,completion\na,\xe4\n", "broken CSV", ""),
        ("prompt,completion\na,\n", "the completion is empty", 2),
        ("question,answer\na,b\n", "neither 'prompt' nor 'text' nor 'messages'", 2),
        ("prompt\na\n", "lacks field 'completion'", 2),
        ("prompt,completion\n", "no training rows", ""),
        ("", "no training rows", ""),
    ],
)
def test_bad_csv_is_refused_with_its_line(text: str | bytes, message: str, line: int | str, tmp_path: Path) -> None:
    path = in_csv(tmp_path, text)
    with pytest.raises(DataError) as error:
        load_task("t", path)
    assert message in str(error.value)
    assert (f"{path}:{line}" if line else str(path)) in str(error.value)


def test_names_with_blanks_around_them_and_twice(tmp_path: Path) -> None:
    assert rows_of(in_csv(tmp_path, "text, label\ngood, yes\n")) == [{"text": "good", "label": "yes"}]
    assert rows_of(in_csv(tmp_path, "text,label,,\ngood,yes,,\n"))[0]["label"] == "yes"
    with pytest.raises(DataError, match=r"two columns called 'label' \(.*rows\.csv:1\)"):
        rows_of(in_csv(tmp_path, "text,label,label\na,b,c\n"))


def test_a_column_of_labels_that_is_not_read_may_be_empty(tmp_path: Path) -> None:
    path = in_csv(tmp_path, "question,answer,label\na,b,\n")
    assert rows_of(path, columns=PAIR) == [{"prompt": "a", "completion": "b"}]
    assert rows_of(in_csv(tmp_path, "prompt,completion,label\na,b,\n"))[0]["completion"] == "b"


def test_a_folder_of_csv(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, ending in {"train": "csv", "validation": "CSV", "other": "csv"}.items():
        in_csv(tmp_path, f"prompt,completion\n{split},1\n", f"{split}.{ending}")
    task = load_task("t", tmp_path)
    assert {split: rows[0]["prompt"] for split, rows in task.splits.items()} == {
        "train": "train",
        "valid": "validation",
    }
    assert "other.csv in" in caplog.text
    in_csv(tmp_path, "prompt,completion\na,b\n", "valid.csv")
    with pytest.raises(DataError, match=r"both valid\.csv and validation\.CSV"):
        load_task("t", tmp_path)
    (tmp_path / "validation.CSV").unlink()
    (tmp_path / "train.jsonl").write_text('{"prompt": "lines", "completion": "of JSON"}')
    mixed = load_task("t", tmp_path).splits
    assert {split: rows[0]["prompt"] for split, rows in mixed.items()} == {"train": "lines", "valid": "a"}
    assert "other.csv, train.csv in" in caplog.text


def test_labels_are_numbers_in_all_splits_or_in_none(tmp_path: Path) -> None:
    in_csv(tmp_path, "text,label\na,09\nb,10\n", "train.csv")
    in_csv(tmp_path, "text,label\na,10\n", "valid.csv")
    assert load_task("t", tmp_path).labels == ["09", "10"]
    assert load_task("t", tmp_path).rows("valid")[0]["label"] == "10"


def test_a_number_among_which_one_is_none_is_refused(tmp_path: Path) -> None:
    path = in_csv(tmp_path, "text,label\na,0.5\nb,n/a\nc,2\n")
    with pytest.raises(DataError, match=r"the label 'n/a' is no number, and others are \(.*rows\.csv:3\)"):
        load_task("t", path)


@pytest.mark.parametrize("missing", ["NaN", "NA", "null", "None", "nan"])
@pytest.mark.parametrize("number", ["7", "0.5"])
def test_a_missing_label_among_numbers_is_no_class(missing: str, number: str, tmp_path: Path) -> None:
    in_csv(tmp_path, f"text,label\na,1\nb,{number}\n", "train.csv")
    path = in_csv(tmp_path, f"text,label\na,1\nb, {missing}\nc,NA\n", "valid.csv")
    with pytest.raises(DataError, match=rf"the label '{missing}' is that of an empty cell.* \({path}:3\)"):
        load_task("t", tmp_path)


def test_rows_to_predict_that_have_no_labels_are_named(tmp_path: Path) -> None:
    """As a competition gives them out."""
    in_csv(tmp_path, "id,text,label\n1,a,x\n2,b,y\n", "train.csv")
    in_csv(tmp_path, "id,text\n3,c\n", "test.csv")
    with pytest.raises(DataError, match=r"a text row among text/label rows \(.*test\.csv:2\)\. Add its label, or"):
        load_task("t", tmp_path)


def test_an_answer_with_a_decimal_comma_stays_as_it_is(tmp_path: Path) -> None:
    file = in_csv(tmp_path, "q;label\nhow much?;1,5\n")
    assert rows_of(file, columns={"prompt": "q", "completion": "label"})[0]["completion"] == "1,5"
    labelled = in_csv(tmp_path, "text;price\na;1,5\nb;2\n", "labels.csv")
    assert rows_of(labelled, columns={"text": "text", "label": "price"})[0]["label"] == 1.5


def test_a_column_called_label_beside_prompts_is_left_alone(tmp_path: Path) -> None:
    rows = rows_of(in_csv(tmp_path, "prompt,completion,text,label\na,b,c,\nd,e,f,1\n"))
    assert [row["label"] for row in rows] == ["", "1"]
