"""Cards as they are generated: the metadata is right, and what is known of the run is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from lorasb_export.cards import card
from lorasb_export.cards.readme import front_matter
from lorasb_export.cards.sections import Facts
from lorasb_export.publishing import folder_card
from tests.cards import ADAPTER, FIGURES, adapter

BASE = {"name_or_path": "owner/base", "revision": None, "fingerprint": "f" * 64}
MERGED = {"kind": "merged", "base": BASE, "adapter": {"name": "a", "sha256": "1" * 64}, "task_type": "CAUSAL_LM"}
BASIS = {
    "base_model": BASE,
    "rank": 4,
    "target_modules": {"a": [8, 8]},
    "sha256": "0" * 64,
    "calibration": {"samples": 9, "energy": {"a": 0.25, "b": 0.75}},
    "created_with": {"torch": "2"},
}


@pytest.mark.parametrize(
    ("text", "library", "relation", "tags", "pipeline"),
    [
        (card.basis_card(BASIS), "lorasb", "adapter", {"lora-sb-basis"}, None),  # it is of no task
        (adapter(), "lorasb", "adapter", set(), "text-generation"),
        (card.peft_card(ADAPTER), "peft", "adapter", {"lora"}, "text-generation"),
        (card.merged_card(MERGED), "transformers", "finetune", set(), "text-generation"),
        (card.onnx_card({**MERGED, "kind": "onnx"}), "onnxruntime", "finetune", {"onnx"}, "text-generation"),
        (card.onnx_card({**MERGED, "kind": "onnx-adapters"}), "onnxruntime", "finetune", {"onnx"}, "text-generation"),
    ],
)
def test_front_matter(text: str, library: str, relation: str, tags: set[str], pipeline: str | None) -> None:
    keys = front_matter(text)
    assert (keys["library_name"], keys["base_model_relation"]) == (library, relation)
    assert keys["base_model"] == "owner/base"
    assert set(keys["tags"]) == {"lora-sb", "lorasb"} | tags
    assert keys.get("pipeline_tag") == pipeline


def test_of_a_thousand_tasks_and_more_a_basis_shows_the_first() -> None:
    one = {"source": "rows.jsonl", "rows": 8, "weight": 1.0, "sha256": "2" * 64}
    data = [{"name": f"task{number}", **one} for number in range(1001)]
    assert "The first" not in card.basis_card({**BASIS, "calibration": {**BASIS["calibration"], "data": data[:1000]}})
    text = card.basis_card({**BASIS, "calibration": {**BASIS["calibration"], "data": data}})
    assert "The first 1,000 of 1,001 tasks; `basis_config.json` has all." in text
    assert ("| task999 |" in text, "| task1000 |" in text) == (True, False)


@pytest.mark.parametrize("name", ["/home/somebody/models/base", "base"])  # as `fit` writes it, and a push
def test_a_local_base_is_named_nowhere(name: str) -> None:
    text = adapter(base_model_name_or_path=name)
    assert "base_model" not in front_matter(text)
    assert "base_model_relation" not in front_matter(text)
    assert "`base` (a base model that is not on the Hub)" in text
    assert 'from_pretrained("path/to/the/base/model")' in text
    assert "somebody" not in text


def test_training_is_shown_and_paths_are_cut() -> None:
    training = {
        **ADAPTER["training"],
        "task": "dates",
        "data": "/home/somebody/data/mine",
        "rows": 1200,
        "rows_left_out": 3,
        "data_sha256": "d" * 64,
        "trainable_parameters": 1_000_000,
        "lora_parameters": 6_500_000,
        "evaluation": {"test": {"accuracy": {"base": 0.5, "adapter": 0.9375, "rows": 64}}},
    }
    text = adapter(training=training)
    assert "| train loss | 0.125 |" in text
    assert "\nSettings: `epochs` 3.\n" in text
    assert "| mine | 1200 | 3 | not stated | dddddddddddd |" in text
    assert "| mine | 1200 | 3 | 7 | not stated |" in adapter(training=training | {"rows_cut": 7})
    assert "somebody" not in text
    assert "\n\n![Loss while training](training.png)\n" in text
    assert "| test | accuracy | 64 | 0.5 | 0.9375 |" in text
    assert "| trained parameters | 1,000,000 |" in text
    assert "| LoRA of this rank on these modules | 6,500,000 parameters, 6.5 times as many |" in text
    assert front_matter(text)["model-index"] == [
        {
            "name": "folder",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "dates", "type": "dates", "split": "test"},
                    "metrics": [{"type": "accuracy", "value": 0.9375}],
                }
            ],
        }
    ]
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["How to load it", "Method", "Data", "Training", "Evaluation", "Limits", "Provenance"]


def test_rows_that_chose_the_checkpoint_are_named_so() -> None:
    figures = {"evaluation": {split: {"loss": {"base": 2.0, "adapter": 1.0, "rows": 8}} for split in ("valid", "test")}}
    assert "| valid | loss |" in adapter(training=figures)
    for chosen in ({"best_step": 3}, {"learning_rates": {"0.001": 2.0}, "settings": {"metric": "loss"}}):
        text = adapter(training=figures | chosen)
        assert "| valid (these rows also chose the checkpoint) | loss |" in text
        assert "| test | loss |" in text


def test_the_hubs_own_reader_takes_the_metadata() -> None:
    training = {"task": "dates", "data": "owner/dates", "evaluation": {"test": {"exact_match": FIGURES}}}
    keys = yaml.safe_dump(front_matter(card.adapter_card(ADAPTER | {"training": training}, "me/a")))
    found = ModelCardData(**ModelCard(f"---\n{keys}---\n").data.to_dict(), ignore_metadata_errors=False)
    assert found.datasets == ["owner/dates"]
    results = ModelCard(f"---\n{keys}---\n").data.eval_results
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("owner/dates", "test", "exact_match", 0.75)
    ]


def test_what_is_not_known_is_among_the_limits() -> None:
    unscored, unlicensed = "No figure on held-out rows is known.", "The licence of the base model is not known here"
    scored = {"evaluation": {"test": {"exact_match": FIGURES}}}
    assert (unscored in adapter(), unlicensed in adapter()) == (True, True)
    text = card.adapter_card(ADAPTER | {"training": scored}, facts=Facts({"license": "mit"}))
    assert (unscored in text, unlicensed in text) == (False, False)


def test_data_among_what_a_run_reports_is_no_row_of_the_table() -> None:
    report = {
        "of_few": {str(number): number for number in range(24)},
        "of_many": dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 1),
    }
    text = adapter(training={"steps": 3, **report})
    assert ("| of few, 23 | 23 |" in text, "of many" in text) == (True, False)


def test_licences_of_base_and_data() -> None:
    training = {"task": "dates", "data": "owner/dates"}
    facts = Facts(
        {"license": "other", "license_name": "llama3"}, {"owner/dates": "cc-by-4.0"}, {"command": "lorasb fit"}
    )
    text = card.adapter_card(ADAPTER | {"training": training}, "me/a", facts)
    assert (front_matter(text)["license"], front_matter(text)["license_name"]) == ("other", "llama3")
    assert "| owner/dates |" in text
    assert "| cc-by-4.0 |" in text
    assert "| command | lorasb fit |" in text
    assert "licence of the base model is not known" not in text


def test_the_link_to_a_licence_leads_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's repository has no LICENSE; a merged model brings the base's."""
    path = tmp_path / "README.md"
    monkeypatch.setattr(folder_card, "_card_on_the_hub", lambda *_: path)

    def link(source: str, **options: Any) -> str | None:
        return folder_card.licence(source, **options).get("license_link")

    path.write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    assert link("owner/base") == "https://huggingface.co/owner/base/blob/main/LICENSE"
    assert link("owner/rows", dataset=True) == "https://huggingface.co/datasets/owner/rows/blob/main/LICENSE"
    assert link("owner/base", revision="abc") == "https://huggingface.co/owner/base/blob/abc/LICENSE"
    assert link(str(tmp_path)) is None
    assert link("owner/base", beside=["LICENSE"]) == link(str(tmp_path), beside=["LICENSE"]) == "LICENSE"
    path.write_text("---\nlicense: other\nlicense_link: https://example.org/terms\n---\n")
    assert link("owner/base") == link(str(tmp_path)) == "https://example.org/terms"


def test_a_merged_model_says_what_it_kept() -> None:
    kept = {"cosine": 0.98, "relative_error": 0.19, "worst": {"module": "a", "cosine": 0.9, "relative_error": 0.4}}
    text = card.merged_card(MERGED | {"retained": kept, "rank": 4}, "me/merged")
    assert "| all modules | 0.98 | 0.19 |" in text
    assert "| `a`, which kept least | 0.9 | 0.4 |" in text
    assert 'AutoModel.from_pretrained("me/merged")' in text
    measured = {"evaluation": {"test": {"accuracy": {"base": 0.5, "adapter": 0.75, "rows": 8}}}}
    note = "Measured with the adapter itself, before it was written in this form."  # rounding may have changed it
    assert note in card.merged_card(MERGED | {"training": measured})
    assert note not in adapter(training=measured)


def test_a_classifier_names_its_class_and_labels() -> None:
    text = adapter(task_type="SEQ_CLS", training={"labels": ["no", 'so "so"', 2]})
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert "import AutoModelForSequenceClassification as AutoModel" in text
    arguments = 'id2label={0: "no", 1: "so \\"so\\"", 2: "2"}, ignore_mismatched_sizes=True'
    assert f'from_pretrained("owner/base", revision="abc", {arguments})' in text
    assert "lorasb serve" not in text  # which refuses classifiers
    assert "lorasb serve" in adapter()
    made = Facts(made={"training": {"labels": ["no", "yes"]}})
    text = card.peft_card({**ADAPTER, "task_type": "SEQ_CLS"}, facts=made)
    assert 'revision="abc", id2label={0: "no", 1: "yes"}, ignore_mismatched_sizes=True), ' in text
    made = Facts(made={"training": {"regression": True}})
    text = card.peft_card({**ADAPTER, "task_type": "SEQ_CLS"}, facts=made)
    arguments = 'revision="abc", num_labels=1, ignore_mismatched_sizes=True'
    assert f'from_pretrained(AutoModel.from_pretrained("owner/base", {arguments}), ' in text


def test_figures_of_a_classifier_are_those_of_its_task() -> None:
    evaluation = {"valid": {"mcc": FIGURES}, "test": {"accuracy": FIGURES, "mcc": FIGURES}}
    keys = front_matter(adapter(task_type="SEQ_CLS", training={"evaluation": evaluation}))
    assert keys["metrics"] == ["accuracy", "mcc"]
    (model,) = keys["model-index"]
    assert {result["task"]["type"] for result in model["results"]} == {"text-classification"}


def test_a_basis_names_the_class_it_was_calibrated_on() -> None:
    assert "\nmodel = AutoModelForCausalLM.from_pretrained(" in card.basis_card(BASIS)
    text = card.basis_card({**BASIS, "calibration": {"task_type": "SEQ_CLS"}})  # DistilBERT has no other
    assert "import AutoModelForSequenceClassification\n\nmodel = AutoModelForSequenceClassification.from_" in text


def test_energy_and_capture_are_summarized() -> None:
    found = {"sha256": "0" * 64, "rows": 9, "basis": 0.5, "own": 0.6, "random": 0.1}
    capture = {"basis": 0.5, "random": 0.1, "tasks": {"dates": found}, "modules": {"a": {"basis": 0.5, "random": 0.1}}}
    text = card.basis_card({**BASIS, "calibration": {**BASIS["calibration"], "capture": capture}})
    assert "| kept of the first step's energy, mean of modules | 0.5 |" in text
    assert "| dates | 9 | 0.5 | 0.6 | 0.1 |" in text
    assert "capture." not in text


def test_what_the_basis_holds_of_the_task_is_one_line() -> None:
    of_basis = {"min": 0.25, "mean": 0.5, "max": 0.75}
    found = {"basis": 0.5, "own": 0.625, "random": 0.125, "rows": 16, "by_module": {"basis": of_basis}}
    text = adapter(training={"steps": 3, "capture": found, "energy": {"min": 0.5, "mean": 0.75, "max": 1.0}})
    assert (
        "\nThe basis holds 50% of this task's gradient (by module 25% to 75%); one of the task's own would hold 62%, a "
        "random one 12%. The basis keeps 75% of the energy of the first step it was made from.\n"
    ) in text
    assert "| capture" not in text


def test_several_adapters_are_named_with_their_weights() -> None:
    two = [{"name": "a", "weight": 1.0, "sha256": "1" * 64}, {"name": "b", "weight": -0.5, "sha256": "2" * 64}]
    text = card.merged_card({"kind": "merged", "base": BASE, "adapters": two}, "me/ab")
    assert "# a + b: `owner/base` with 2 LoRA-SB adapters merged in\n" in text
    assert f"| b | -0.5 | - | {'2' * 64} |" in text

    tasks = {"a": {"sha256": "1" * 64, "scaling": 1.0}, "b": {"sha256": "2" * 64, "scaling": 1.0}}
    text = card.onnx_card({**MERGED, "kind": "onnx-adapters", "exporter": "genai", "adapters": tasks}, "me/ab")
    assert "# a, b: adapters for `owner/base`, for ONNX Runtime\n" in text
    assert 'adapters.load(folder + "/a.onnx_adapter", "a")' in text
    assert f"| b | 1 | - | {'2' * 64} |" in text


def test_of_many_adapters_a_title_names_the_first() -> None:
    many = [{"name": f"a{number}", "sha256": "1" * 64} for number in range(12)]
    text = card.merged_card({"kind": "merged", "base": BASE, "adapters": many})
    assert "+ a8 + a9 + …: `owner/base` with 12 LoRA-SB adapters merged in\n" in text


def test_an_onnx_card_loads_with_what_can_run_it() -> None:
    def lines(**said: Any) -> str:
        text = card.onnx_card({**MERGED, "kind": "onnx", "exporter": "genai", **said}, "me/x")
        return text.partition("```python\n")[2].partition("```")[0]

    assert "og.Model(folder)" in lines()
    tasks = {"a": {"sha256": "1" * 64, "id": 1}}
    assert 'OnnxDecoder(folder, "a")' in lines(adapters=tasks, routed=True)
    assert "OnnxDecoder(folder)" in lines(exporter="torch")
    assert "InferenceSession" in lines(exporter="torch", task_type="SEQ_CLS")


def test_missing_provenance_is_left_out() -> None:
    assert front_matter(card.merged_card({"kind": "merged"})) == {
        "library_name": "transformers",
        "tags": ["lora-sb", "lorasb"],
    }
