"""Metrics against known values, and `evaluate` on every kind of row."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer, GenerationConfig

from lorasb_export import Adapter, evaluation, fit, inference, merge
from lorasb_export.base import BaseModel
from lorasb_export.batches import collate, row_losses
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data import TaskData, load_task
from lorasb_export.encoding import encode, prompt_ids
from lorasb_export.errors import DataError, SettingsError
from lorasb_export.evaluation import evaluate, row_scores
from lorasb_export.exporting.onnx_verify import HeldOut
from lorasb_export.inference import answers, expected_answers, max_answer_tokens
from lorasb_export.layer import LoRASBLinear
from lorasb_export.metrics import accuracy, exact_match, mcc, pearson
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.random_adapter import save_adapter
from tests.rows import CHAT_LINE, CLASS, GOOD, MARKED
from tests.tiny import TEMPLATE, make_gpt2, make_llama, save_tokenizer

LLAMA_MODULES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]
BERT_MODULES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]


def test_exact_match_and_accuracy() -> None:
    assert exact_match(["2", " 3\n", "x"], ["2", "3", "4"]) == pytest.approx(2 / 3)
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75


def test_mcc() -> None:
    assert mcc(list("yynny"), list("yynny")) == 1
    assert mcc([0, 0, 1, 1], [1, 1, 0, 0]) == -1
    found, expected = [1] * 6 + [1] + [0] * 3 + [0] * 2, [1] * 6 + [0] + [0] * 3 + [1] * 2
    tp, fp, tn, fn = 6, 1, 3, 2
    of_two = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert mcc(found, expected) == pytest.approx(of_two)
    # Three classes: the correlation of the one-hot indicators, summed over classes, as Gorodkin defines it.
    found, expected = [0, 1, 2, 2, 1, 0, 0], [0, 1, 2, 1, 1, 2, 0]
    a, b = (torch.nn.functional.one_hot(torch.tensor(side)).double() for side in (found, expected))
    a, b = a - a.mean(0), b - b.mean(0)
    assert mcc(found, expected) == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    assert mcc([1, 1, 1], [0, 1, 1]) == mcc([0, 1, 1], [1, 1, 1]) == mcc([1, 1], [1, 1]) == 0


def test_pearson() -> None:
    assert pearson([1, 2, 3], [-1, 3, 7]) == pytest.approx(1)
    assert pearson([1, 2, 3], [5, 4, 3]) == pytest.approx(-1)
    found, expected = [0.1, 0.7, 0.3, 0.9], [1.0, 2.0, 2.5, 3.0]
    known = float(torch.corrcoef(torch.tensor([found, expected], dtype=torch.float64))[0, 1])
    assert pearson(found, expected) == pytest.approx(known)
    assert pearson([1e-170, 2e-170], [1, 2]) == pytest.approx(1)
    assert pearson([0.1] * 3, [1, 2, 3]) == pearson([1, 2, 3], [0.1] * 3) == pearson([1], [2]) == 0


def task_of(lines: str, folder: Path) -> TaskData:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(lines)
    return load_task("t", folder)


def adapter_on(base: Path, folder: Path, task_type: str, **training: Any) -> Adapter:
    """A random adapter of `base`, whose head has an output for each of training's labels, or one."""
    num_labels = len(training.get("labels", [])) or 1
    network = BaseModel.resolve(base).load(task_type, num_labels=num_labels if task_type == SEQ_CLS else None)
    modules = LLAMA_MODULES if task_type == CAUSAL_LM else BERT_MODULES
    adapter = save_adapter(base, network, folder, modules, task_type=task_type, relative_size=0.3)
    adapter.training = training
    return adapter


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template that marks what the assistant says."""
    base = make_llama(tmp_path_factory.mktemp("bases") / "chatty")
    (base / "chat_template.jinja").write_text(MARKED)
    return base


@pytest.fixture(scope="module")
def generates(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return adapter_on(chatty, tmp_path_factory.mktemp("adapters") / "a", CAUSAL_LM)


GENERATION = {
    "prompt/completion": (GOOD, "exact_match"),
    "messages": (CHAT_LINE, "exact_match"),
    "text": ('{"text": "1+1=2"}\n', "loss"),
}


@pytest.mark.parametrize("kind", GENERATION)
def test_metrics_of_generated_text(kind: str, generates: Adapter, tmp_path: Path) -> None:
    lines, default = GENERATION[kind]
    task = task_of(lines, tmp_path / "data")
    found = evaluate(generates, task, split="train")
    assert (found["metric"], found["rows"]) == (default, 1)
    loss = evaluate(generates, task, split="train", metric="loss", dtype="float64")
    assert loss["base"] > 0
    assert abs(loss["base"] - loss["adapter"]) > 1e-3
    with pytest.raises(SettingsError, match=rf"metric 'mcc' does not fit {kind} rows \(.*\)\. Use .*loss"):
        evaluate(generates, task, split="train", metric="mcc")
    with pytest.raises(SettingsError, match=r"limit is 0. Give at least 1"):
        evaluate(generates, task, split="train", limit=0)


def test_the_loss_is_the_mean_over_all_tokens(chatty: Path, generates: Adapter, tmp_path: Path) -> None:
    texts = ["1+1=2", "a somewhat longer text", "b" * 30]
    task = task_of("".join(json.dumps({"text": text}) + "\n" for text in texts), tmp_path / "data")
    found = evaluate(generates, task, split="train", dtype="float64")["base"]
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float64"), base.load_tokenizer()
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        total += float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found == pytest.approx(total / count, abs=1e-6)


def test_answers_are_greedy_whatever_the_base_says_about_chats(chatty: Path) -> None:
    """Qwen's instruct models bring a penalty on repetition, which no other way of running an adapter would apply."""
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float32"), base.load_tokenizer()
    plain = answers(network, tokenizer, ["1+1"], max_tokens=16)
    own = GenerationConfig(repetition_penalty=1.7, no_repeat_ngram_size=2, eos_token_id=2)
    network.generation_config = own
    assert answers(network, tokenizer, ["1+1"], max_tokens=16) == plain
    assert network.generation_config is own
    ids = torch.tensor([prompt_ids(tokenizer, "1+1")])
    found = network.generate(ids, max_new_tokens=16)  # type: ignore[operator]
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) != plain[0]


def test_answers_end_where_tokenizer_or_generation_config_says(chatty: Path) -> None:
    """Of Gemma and Phi-3 the end of a turn is not the tokenizer's end of sequence, and stands in the latter alone."""
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float32"), base.load_tokenizer()
    whole = answers(network, tokenizer, ["ab"], max_tokens=16)[0].split()  # this tokenizer writes its tokens so
    end, before = whole[2], " ".join(whole[:2])
    assert end not in before
    token = tokenizer.convert_tokens_to_ids(end)
    for named in (token, [tokenizer.eos_token_id, token]):
        network.generation_config.eos_token_id = named
        assert answers(network, tokenizer, ["ab", "1+1"], max_tokens=16)[0] == before
    network.generation_config.eos_token_id, tokenizer.eos_token = None, end
    assert answers(network, tokenizer, ["ab"], max_tokens=16) == [before]


THINKING = MARKED.replace("{% generation %}", "{% generation %}[] ")  # as Qwen3's, whose thoughts are plain tokens
OPENED = MARKED.replace(
    "add_generation_prompt %}<s>", "add_generation_prompt %}<s>["
)  # when it is asked, and only then
CHAT = json.loads(CHAT_LINE)


@pytest.mark.parametrize(
    ("row", "template", "read"),
    [
        (json.loads(GOOD), MARKED, "2"),
        ({"prompt": "1+1=", "completion": " 2</s>"}, MARKED, "2"),
        ({"prompt": "the drink", "completion": "cafe\N{COMBINING ACUTE ACCENT}"}, MARKED, "c a f é"),
        (CHAT, MARKED, "2"),
        (CHAT, THINKING, "[ ]   2"),
        (CHAT, THINKING.replace("{% endgeneration", "~{% endgeneration"), "[ ]   2"),  # `~` after the end
        (CHAT, OPENED, "2"),
    ],
)
def test_an_answer_is_right_that_says_what_was_trained(
    row: dict[str, Any], template: str, read: str, chatty: Path
) -> None:
    tokenizer = BaseModel.resolve(chatty).load_tokenizer()  # writes a blank between tokens
    tokenizer.backend_tokenizer.normalizer = NFC()
    tokenizer.add_tokens(["é"])
    tokenizer.chat_template = template
    (expected,) = expected_answers(tokenizer, [row], {tokenizer.eos_token_id}, unit="row")
    assert expected.strip() == read


def test_evaluate_and_fit_compare_with_what_was_trained(
    chatty: Path, generates: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(chatty, tmp_path / "base")
    (base / "chat_template.jinja").write_text(THINKING)
    tokenizer = BaseModel.resolve(base).load_tokenizer()
    perfect = tokenizer("[] 2", add_special_tokens=False).input_ids
    monkeypatch.setattr(inference, "generate_ids", lambda _, prompts, **options: [perfect] * len(prompts))
    task = task_of(CHAT_LINE, tmp_path / "data")
    assert evaluate(generates, task, base=base, split="train")["adapter"] == 1
    task = replace(task, splits={"train": [CHAT], "valid": [CHAT]})
    settings = FitSettings(max_steps=1, metric="exact_match")
    adapter = fit(str(base), CalibrationSettings(rank=2), task, tmp_path / "a", settings)
    assert adapter.training["valid_metrics"] == {"exact_match": 1}


def test_prompts_that_cannot_be_answered_are_named(chatty: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(), base.load_tokenizer()
    assert answers(network, tokenizer, []) == []  # a process with more peers than rows has none
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(DataError, match=r"chat template refuses the messages: no system message \(prompt 1\)"):
        answers(network, tokenizer, ["1+1"])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no tokens.* \(prompt 2\)"):
        answers(network, tokenizer, ["1+1", ""])
    learned = BaseModel.resolve(make_gpt2(tmp_path / "gpt2")).load()
    with pytest.raises(DataError, match=r"prompt of 1000 tokens and an answer of 30; .* end at 1024 \(test row 2\)"):
        answers(learned, tokenizer, ["1+1", "1" * 1000], max_tokens=30, unit="test row")


def test_such_prompts_are_found_before_training(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    save_tokenizer(base, template=False)
    (base / "chat_template.jinja").unlink()
    data = {"train": GOOD, "valid": GOOD + '{"prompt": "", "completion": "2"}\n'}
    (tmp_path / "data").mkdir()
    for split, lines in data.items():
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    settings = FitSettings(max_steps=1, metric="exact_match")
    with pytest.raises(DataError, match=r"no tokens.* \(a: valid row 2\)"):
        fit(str(base), CalibrationSettings(rank=2), tmp_path / "data", tmp_path / "a", settings)


def test_messages_that_end_with_the_user(generates: Adapter, chatty: Path, tmp_path: Path) -> None:
    turns = [*json.loads(CHAT_LINE)["messages"], {"role": "user", "content": "thanks"}]
    task = task_of(CHAT_LINE + json.dumps({"messages": turns}) + "\n", tmp_path / "data")
    with pytest.raises(DataError, match=r"do not end with the assistant's answer \(train row 2\). Use the metric loss"):
        evaluate(generates, task, split="train")
    assert evaluate(generates, task, split="train", metric="loss")["rows"] == 2
    asked = HeldOut(replace(task, splits={"test": task.rows("train")}), BaseModel.resolve(chatty).load_tokenizer())
    asked.ask(Mock(eos_ids=set(), context=64, generate=lambda prompts, _: [[5]] * len(prompts)))
    assert asked.compare(BaseModel.resolve(chatty).load())["rows_left_out"] == 1


def test_an_adapter_on_a_given_network_is_not_taken_for_the_base(
    chatty: Path, generates: Adapter, tmp_path: Path
) -> None:
    task = task_of(GOOD, tmp_path / "data")
    expected = evaluate(generates, task, split="train", metric="loss")
    network = BaseModel.resolve(chatty).load()
    for _ in range(2):
        generates.inject(network)  # as `fit` leaves its own there
        assert evaluate(generates, task, split="train", metric="loss", network=network) == expected
    assert not any(isinstance(module, LoRASBLinear) for module in network.modules())


def test_a_network_that_a_loop_has_left_at_training_is_scored_without_dropout(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "gpt2")
    network = BaseModel.resolve(base).load()
    adapter = save_adapter(base, network, tmp_path / "a", ["transformer.h.0.mlp.c_proj"], relative_size=0.3)
    task = task_of(GOOD, tmp_path / "data")
    network.train()
    given = evaluate(adapter, task, split="train", metric="loss", network=network)
    assert network.training
    assert given == evaluate(adapter, task, split="train", metric="loss")
    tokenizer = BaseModel.resolve(base).load_tokenizer()
    assert len({answers(network, tokenizer, ["1+1"] * 8, batch_size=1)[i] for i in range(8)}) == 1


def test_the_rows_of_a_single_file_are_held_out(generates: Adapter, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    found = evaluate(generates, tmp_path / "rows.jsonl", metric="loss")
    assert (found["split"], found["rows"]) == ("test", 1)


def test_an_answer_may_be_as_long_as_the_template_makes_it(chatty: Path) -> None:
    tokenizer = BaseModel.resolve(chatty).load_tokenizer()
    assert max_answer_tokens(tokenizer, [CHAT]) < 20
    tokenizer.chat_template = THINKING.replace("[]", "[" + "1" * 40 + "]")
    assert max_answer_tokens(tokenizer, [CHAT]) >= 44  # with the brackets, the answer and its end


def test_a_pad_token_without_an_embedding_is_none(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(base)
    found = BaseModel.resolve(base).load_tokenizer()
    assert found.pad_token == found.eos_token


def test_a_tokenizer_is_the_one_of_its_hugging_face_files(tmp_path: Path) -> None:
    """Mistral's own, which vLLM brings and transformers would take, has no chat template; serving asks with it."""
    mistral_common = pytest.importorskip("mistral_common")
    base = make_llama(tmp_path / "base")
    shutil.copyfile(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", base / "tekken.json")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    tokenizer = BaseModel.resolve(base).load_tokenizer()
    assert tokenizer.chat_template == TEMPLATE


def test_a_given_classifier_keeps_its_head(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2, seed=7)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    task = task_of(CLASS + CLASS.replace("yes", "no"), tmp_path / "data")
    found = evaluate(adapter, task, split="train", network=network)
    assert found == evaluate(adapter, task, split="train")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_metrics_of_classes(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    task = task_of(
        CLASS + CLASS.replace("yes", "no") + '{"text": "a", "text_pair": "b", "label": "no"}\n', tmp_path / "d"
    )
    found = evaluate(adapter, task, split="train")
    assert (found["metric"], found["base"], found["rows"]) == ("accuracy", None, 3)
    assert found["adapter"] in (1 / 3, 2 / 3)  # the first two rows are one text
    adapter.save(tmp_path / "b")
    assert evaluate(tmp_path / "b", tmp_path / "d", split="train", base=bert) == found | {"task": "d"}
    assert -1 <= evaluate(adapter, task, split="train", metric="mcc")["adapter"] <= 1
    for metric in ("pearson", "f1"):
        expected = rf"metric '{metric}' does not fit text/label rows \(.*\)\. Use accuracy or mcc"
        with pytest.raises(SettingsError, match=expected):
            evaluate(adapter, task, split="train", metric=metric)


def test_a_loss_is_taken_of_one_row_at_a_time(llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies of the logits of sixteen rows of a large vocabulary would not fit where training did."""
    network, tokenizer = BaseModel.resolve(llama).load(), BaseModel.resolve(llama).load_tokenizer()
    rows = encode(load_task("sums", sums).rows("valid"), tokenizer, CAUSAL_LM, [], 64)
    batch = collate(rows, tokenizer.pad_token_id)
    with torch.inference_mode():
        losses, counts = row_losses(network(**batch).logits, batch["labels"])
    watched = Mock(side_effect=row_losses)
    monkeypatch.setattr(evaluation, "row_losses", watched)
    found = row_scores(network, rows, tokenizer.pad_token_id)
    assert {len(logits) for (logits, _), _ in watched.call_args_list} == {1}
    assert [count for _, count, _ in found] == counts.tolist()
    assert [loss for loss, _, _ in found] == pytest.approx(losses.tolist())


def test_a_decoder_classifies_by_the_tokenizers_padding_whatever_its_config_says(tmp_path: Path) -> None:
    """Of some checkpoints (huggyllama/llama-7b) the config names another token."""
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    model = BaseModel.resolve(base)
    network, tokenizer = model.load(SEQ_CLS, num_labels=2), model.load_tokenizer()
    rows = [{"text": text, "label": "no"} for text in ("hello", "a longer text")]
    encoded = encode(rows, tokenizer, SEQ_CLS, ["no", "yes"], 64)
    together, alone = (row_scores(network, part, tokenizer.pad_token_id)[0][0] for part in (encoded, encoded[:1]))
    assert together == pytest.approx(alone, abs=1e-5)
    adapter = save_adapter(base, network, tmp_path / "a", LLAMA_MODULES, task_type=SEQ_CLS)
    adapter.training = {"labels": ["no", "yes"]}
    assert merge(adapter, tmp_path / "merged", verify=True)["verify"]["relative_difference"] < 1e-4


def test_a_pair_is_read_as_everybody_calls_the_tokenizer(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=[], regression=True)
    network, tokenizer = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=1), BaseModel.resolve(bert).load_tokenizer()
    adapter.inject(network)
    pairs = [("one", "two, longer"), ("three", "x"), ("a", "b")]
    rows = [{"text": a, "text_pair": b, "label": i + 0.5} for i, (a, b) in enumerate(pairs)]
    found = [x for *_, x in row_scores(network, encode(rows, tokenizer, SEQ_CLS, [], 64), tokenizer.pad_token_id)]
    asked = [tokenizer(*pair, return_tensors="pt") for pair in pairs]
    with torch.inference_mode():
        assert found == pytest.approx([float(network(**batch).logits) for batch in asked], abs=1e-5)
        apart = [float(network(batch.input_ids, attention_mask=batch.attention_mask).logits) for batch in asked]
    assert found != pytest.approx(apart, abs=1e-3)  # the second text is told from the first
    task = task_of("".join(json.dumps(row) + "\n" for row in rows), tmp_path / "data")
    adapter.training = {**adapter.training, "data": str(tmp_path / "data"), "data_sha256": task.sha256}
    verified = merge(adapter, tmp_path / "merged", verify=True)["verify"]
    assert (verified["rows"], verified["relative_difference"] < 1e-4) == (3, True)


def test_token_types_are_for_models_that_tell_them_apart(tmp_path: Path) -> None:
    """GPT-2 would take them for tokens and add their embeddings."""
    base = make_gpt2(tmp_path / "gpt2")
    save_tokenizer(base, token_types=True)
    tokenizer = BaseModel.resolve(base).load_tokenizer()
    rows = [{"text": "a", "text_pair": "b", "label": "no"}]
    assert "token_type_ids" not in encode(rows, tokenizer, SEQ_CLS, ["no"], 64)[0]


def test_regression_merged_predicts_the_same_number(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=[], regression=True)
    assert merge(adapter, tmp_path / "model", verify=True)["verify"]["relative_difference"] < 1e-5
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=1)
    adapter.inject(network)
    texts = ["one", "two, longer", "three"]
    with torch.inference_mode():
        found = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
        expected = [float(network(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert found == pytest.approx(expected, abs=1e-5)

    lines = "".join(json.dumps({"text": t, "label": 2 * x + 1}) + "\n" for t, x in zip(texts, found, strict=True))
    result = evaluate(adapter, task_of(lines, tmp_path / "data"), split="train")
    assert (result["metric"], result["base"]) == ("pearson", None)
    assert result["adapter"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(SettingsError, match="metric 'accuracy' does not fit regression rows"):
        evaluate(adapter, task_of(lines, tmp_path / "data"), split="train", metric="accuracy")
    with pytest.raises(DataError, match=r"the data is SEQ_CLS, the adapter SEQ_CLS \(regression\)"):
        evaluate(adapter, task_of(CLASS + CLASS.replace("yes", "no"), tmp_path / "data"), split="train")
