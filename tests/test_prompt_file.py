"""`lorasb generate` of a file of prompts, and with a system message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.errors import BaseModelError
from lorasb_export.evaluation import side_by_side
from lorasb_export.evaluation.inference import answers
from tests.conftest import lorasb
from tests.random_adapter import adapter_on
from tests.rows import CHAT, GOOD, in_csv
from tests.tiny import make_gpt2, make_llama

SYSTEM, USER = {"role": "system", "content": "add"}, {"role": "user", "content": "1+1="}
ROWS: list[dict[str, Any]] = [
    {"prompt": "a prompt that is longer than the others", "id": 7},
    json.loads(GOOD),
    CHAT,
    {"messages": [SYSTEM, USER]},
    {"prompt": "2+2="},
]
QUESTIONS = [ROWS[0]["prompt"], "1+1=", [USER], [SYSTEM, USER], "2+2="]
SHORT = ("--max-tokens", "4")


@pytest.fixture
def adapter(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """The only one of the project in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("asked.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return adapter_on(llama, tmp_path / "adapters" / "a", CAUSAL_LM)


def said(adapter: Adapter, questions: list[Any]) -> list[dict[str, str]]:
    """What base and adapter answer to each, by themselves."""
    base = adapter.base.resolve()
    network = base.load()
    of_base = [answers(network, base.tokenizer, [question], max_tokens=4)[0] for question in questions]
    adapter.inject(network)
    of_adapter = [answers(network, base.tokenizer, [question], max_tokens=4)[0] for question in questions]
    return [{"base": before, "a": after} for before, after in zip(of_base, of_adapter, strict=True)]


def test_every_row_is_answered_in_its_order_on_one_loaded_base(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = said(adapter, QUESTIONS)
    assert len({answer for row in expected for answer in row.values()}) > 4
    loads: list[BaseModel] = []
    load = BaseModel.load
    monkeypatch.setattr(BaseModel, "load", lambda self, **options: loads.append(self) or load(self, **options))
    words = ("generate", "--prompts", "asked.jsonl", *SHORT, "--batch-size", "2")
    done = lorasb(*words, "--out", "new/answers.jsonl", "--json")
    assert json.loads(done.stdout) == {"out": "new/answers.jsonl", "rows": 5, "names": ["base", "a"]}
    lines = [json.loads(line) for line in Path("new/answers.jsonl").read_text().splitlines()]
    numbered = enumerate(zip(ROWS, expected, strict=True), 1)
    assert lines == [{"number": number, "row": row, "answers": told} for number, (row, told) in numbered]
    assert len(loads) == 1
    assert json.loads(lorasb(*words, "--json").stdout) == {"answered": lines}
    printed = lorasb(*words).stdout
    assert f"\n\n4. 1+1=\n[base] {expected[3]['base']}\n[a] {expected[3]['a']}\n\n5. 2+2=\n" in printed


def test_a_system_message_goes_before_what_has_none(adapter: Adapter) -> None:
    other = {"role": "system", "content": "multiply"}
    users = [{"role": "user", "content": question} for question in (ROWS[0]["prompt"], "1+1=", "1+1=", "", "2+2=")]
    expected = said(adapter, [[other, user] for user in users[:3]] + [QUESTIONS[3], [other, users[4]]])
    words = ("generate", "--system", "multiply", *SHORT, "--json")
    done = lorasb(*words, "--prompts", "asked.jsonl")
    assert [line["answers"] for line in json.loads(done.stdout)["answered"]] == expected
    assert json.loads(lorasb(*words, "1+1=").stdout) == {"prompt": "1+1=", "answers": expected[1]}
    assert expected[1] != said(adapter, ["1+1="])[0]


def test_rows_may_be_csv(adapter: Adapter) -> None:
    in_csv(Path(), 'prompt,label,more\n1+1=,1,x\n"2,\n2",2,y\n')
    done = lorasb("generate", "--prompts", "rows.csv", *SHORT, "--json")
    rows = [line["row"] for line in json.loads(done.stdout)["answered"]]
    assert rows == [{"prompt": "1+1=", "label": "1", "more": "x"}, {"prompt": "2,\n2", "label": "2", "more": "y"}]


BAD = """{"prompt": "good"}

{"prompt": 1}
{"prompt": "broken
{"text": "a", "label": "b"}
{"messages": [{"role": "assistant", "content": "2"}]}
{"messages": "1+1="}
{"messages": [{"role": "user", "content": "1"}], "tools": [{}]}
"""


def test_all_bad_rows_are_told_before_the_base_is_loaded(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseModel, "load")
    Path("asked.jsonl").write_text(BAD)
    done = lorasb("generate", "--prompts", "asked.jsonl", "--out", "new/answers.jsonl")
    told = done.stderr.splitlines()
    assert (done.exit_code, told[0]) == (1, "Error: 6 problems, nothing was asked:")
    for line, number, what in zip(
        told[1:],
        range(3, 9),
        (
            "'prompt' is not a string",
            "broken JSON",
            "neither 'prompt' nor 'messages' (it has text, label)",
            "the messages ask nothing",
            "'messages' is not a list",
            "tool 1 is no function with a name",
        ),
        strict=True,
    ):
        assert what in line
        assert f"(asked.jsonl:{number}). " in line
    assert not Path("new").exists()
    for text, problems in (("\n", "there are no rows to ask (asked.jsonl)"), ("x\n" * 50, "10 problems")):
        Path("asked.jsonl").write_text(text)
        assert problems in lorasb("generate", "--prompts", "asked.jsonl").stderr
    in_csv(Path(), "prompt,more\n1\n2\n3,4\n")
    assert "rows.csv:2" in (told_of_csv := lorasb("generate", "--prompts", "rows.csv").stderr)
    assert "2 problems" in told_of_csv
    assert "cannot read the data" in lorasb("generate", "--prompts", "nowhere.jsonl").stderr


def test_what_the_base_cannot_be_asked_is_told_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(BaseModel, "load")
    base = make_gpt2(tmp_path / "base")
    file, words = tmp_path / "asked.jsonl", ("generate", "--model", str(base))
    file.write_text("".join(json.dumps({"prompt": "1" * length}) + "\n" for length in (1, 1000, 2, 1010)))
    told = lorasb(*words, "--prompts", str(file)).stderr
    assert "2 problems, nothing was answered" in told
    for number, length in ((2, 1000), (4, 1010)):
        assert f"an answer of 128; the base's positions end at 1024 ({file}: row {number})" in told
        assert f"a prompt of {length + 3} tokens" in told
    template = base / "chat_template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}1")
    told = lorasb(*words, "1+1=", "--system", "add").stderr
    assert "the chat template refuses the messages: no system role (prompt 1)" in told
    template.unlink()
    file.write_text(json.dumps(CHAT) + "\n" + json.dumps(CHAT))
    for more in (("1+1=", "--system", "add"), ("--prompts", str(file))):
        told = lorasb(*words, *more).stderr
        assert f"messages are given, but the tokenizer has no chat template ({base}). Use rows of prompts" in told


def test_an_encoder_is_asked_nothing(bert: Path) -> None:
    with pytest.raises(BaseModelError, match="BertModel does not generate text"):
        side_by_side.ask_adapters(["1+1="], {}, base=str(bert), max_tokens=4, dtype="auto", unit="prompt")


def test_a_file_that_is_there_is_kept(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseModel, "load")
    Path("mine.jsonl").write_text("mine")
    words = ("generate", "--prompts", "asked.jsonl", "--out")
    told = lorasb(*words, "mine.jsonl").stderr
    assert told == "Error: the file exists (mine.jsonl). Choose another path, or pass --overwrite\n"
    Path("link.jsonl").symlink_to("asked.jsonl")
    told = lorasb(*words, "link.jsonl", "--overwrite").stderr
    assert told == "Error: these are the prompts to be asked (link.jsonl). Give --out another file\n"
    assert "the file exists (adapters). Choose another path\n" in lorasb(*words, "adapters", "--overwrite").stderr
    assert f"cannot write: File exists ({Path.cwd()}/mine.jsonl/x)" in lorasb(*words, "mine.jsonl/x").stderr
    assert Path("mine.jsonl").read_text() == "mine"
    assert len(Path("asked.jsonl").read_text().splitlines()) == len(ROWS)


def test_the_answers_are_there_whole_or_not_at_all(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.jsonl").write_text("mine")
    words = ("generate", "--prompts", "asked.jsonl", *SHORT, "--overwrite", "--out", "mine.jsonl")
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError

        patch.setattr(side_by_side, "answers_of_ids", fail)
        assert "Try a smaller --batch-size" in lorasb(*words).stderr
    assert Path("mine.jsonl").read_text() == "mine"
    assert lorasb(*words).stdout == "Wrote mine.jsonl: 5 rows, answered by base, a\n"
    assert len(Path("mine.jsonl").read_text().splitlines()) == 5
    assert sorted(path.name for path in Path().iterdir()) == ["adapters", "asked.jsonl", "mine.jsonl"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "give a PROMPT, or --prompts FILE"),
        (("hi", "--prompts", "asked.jsonl"), "give a PROMPT, or --prompts FILE"),
        (("hi", "--overwrite"), "--overwrite is for the file of --out"),
        (("hi", "--onnx", "x", "--batch-size", "4"), "--onnx goes without --batch-size"),
    ],
)
def test_words_that_do_not_go_together(words: tuple[str, ...], told: str) -> None:
    done = lorasb("generate", *words)
    assert (done.exit_code, told in done.output) == (2, True)


def test_an_onnx_export_is_asked_the_same(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(folder: Path, prompts: list[Any], *_: Any, **__: Any) -> dict[str, list[str]]:
        asked.append(prompts)
        return {"base": ["yes"] * len(prompts)}

    monkeypatch.setattr("lorasb_export.exporting.onnx_ask.ask_onnx", ask)
    words = ("generate", "--onnx", "x", "--prompts", "asked.jsonl", "--out", "answers.jsonl")
    assert lorasb(*words).exit_code == 0
    assert asked == [QUESTIONS]
    lines = Path("answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answers"] for line in lines] == [{"base": "yes"}] * 5
    assert lorasb("generate", "--onnx", "x", "1+1=", "--system", "add").stdout == "[base] yes\n"
    assert asked[1] == [[SYSTEM, USER]]


def test_the_lines_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_llama(tmp_path / "base")
    adapter_on(base, tmp_path / "adapters" / "billing", CAUSAL_LM)
    Path("asked.jsonl").write_text(GOOD * 3)
    page = (Path(__file__).parents[1] / "docs/how-to/evaluate.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    (lines,) = [block for block in blocks if "asked.jsonl" in block]
    names: dict[str, Any] = {}
    exec(lines.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base)), names)
    assert len(names["said"]) == len(names["said_briefly"]) == 3
    assert names["said"][0] != names["said_briefly"][0]
