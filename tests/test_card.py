"""Cards: generated metadata is right, and nothing a user wrote is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasb_export import card
from lorasb_export.errors import ArtifactError

ADAPTER: dict[str, Any] = {
    "base_model_name_or_path": "owner/base",
    "revision": "abc",
    "base_fingerprint": "f" * 64,
    "task_type": "CAUSAL_LM",
    "r": 4,
    "scaling": 1.0,
    "target_modules": ["a", "b"],
    "basis": {"sha256": "0" * 64, "source": "embedded"},
    "training": {"train_loss": 0.125, "steps": 30, "settings": {"epochs": 3}, "labels": [], "plot": "training.png"},
}
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


def adapter(**changes: Any) -> str:
    return card.adapter_card({**ADAPTER, **changes})


@pytest.mark.parametrize(
    ("text", "library", "relation", "tags"),
    [
        (card.basis_card(BASIS), "lorasb", "adapter", {"basis"}),
        (adapter(), "lorasb", "adapter", set()),
        (card.peft_card(ADAPTER), "peft", "adapter", {"lora"}),
        (card.merged_card(MERGED), "transformers", "finetune", set()),
        (card.onnx_card({**MERGED, "kind": "onnx"}), "lorasb", "finetune", {"onnx"}),
        (card.onnx_card({**MERGED, "kind": "onnx-adapters"}), "lorasb", "finetune", {"onnx"}),
    ],
)
def test_front_matter(text: str, library: str, relation: str, tags: set[str]) -> None:
    keys = card.front_matter(text)
    assert (keys["library_name"], keys["base_model_relation"]) == (library, relation)
    assert keys["base_model"] == "owner/base"
    assert set(keys["tags"]) == {"lora-sb", "lorasb"} | tags
    assert keys.get("pipeline_tag", "text-generation") == "text-generation"


def test_a_local_base_is_named_nowhere() -> None:
    text = adapter(base_model_name_or_path="/home/somebody/models/base")
    assert "base_model" not in card.front_matter(text)
    assert "base_model_relation" not in card.front_matter(text)
    assert "not on the Hub (a local folder)" in text
    assert "somebody" not in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("gpt2", True), ("/a/b", False), ("./a", False), ("a/b/c", False), (None, False)],
)
def test_hub_ids(name: object, expected: bool) -> None:
    assert card.is_hub_id(name) is expected


def test_training_is_shown_and_paths_are_cut() -> None:
    training = {
        **ADAPTER["training"],
        "data": "/home/somebody/data/mine",
        "evaluation": {"test": {"accuracy": {"base": 0.5, "adapter": 0.9375, "rows": 64}}},
    }
    text = adapter(training=training)
    assert "| train_loss | 0.125 |" in text
    assert "| settings.epochs | 3 |" in text
    assert "| data | mine |" in text
    assert "somebody" not in text
    assert "\n\n![Loss while training](training.png)\n" in text
    assert "| test | accuracy | 0.5 | 0.9375 | 64 |" in text
    assert "evaluation.test" not in text


def test_a_classifier_names_its_class_and_labels() -> None:
    text = adapter(task_type="SEQ_CLS", training={"labels": ["no", "yes"]})
    assert card.front_matter(text)["pipeline_tag"] == "text-classification"
    assert "import AutoModelForSequenceClassification as AutoModel" in text
    assert 'from_pretrained("owner/base", revision="abc", num_labels=2)' in text


def test_energy_and_capture_are_summarized() -> None:
    found = {"sha256": "0" * 64, "rows": 9, "basis": 0.5, "own": 0.6, "random": 0.1}
    capture = {"basis": 0.5, "random": 0.1, "tasks": {"dates": found}, "modules": {"a": {"basis": 0.5, "random": 0.1}}}
    text = card.basis_card({**BASIS, "calibration": {**BASIS["calibration"], "capture": capture}})
    assert "| energy captured, mean of modules | 0.5 |" in text
    assert "| dates | 9 | 0.5 | 0.6 | 0.1 |" in text
    assert "capture." not in text


def test_missing_provenance_is_left_out() -> None:
    assert card.front_matter(card.merged_card({"kind": "merged"})) == {
        "library_name": "transformers",
        "tags": ["lora-sb", "lorasb"],
    }


def test_an_update_replaces_the_block_and_keeps_the_rest(tmp_path: Path) -> None:
    keys = "license: mit # ours\nlanguage: no\ntags:\n- mine\n- lorasb\nlibrary_name: old\n"
    user = f"---\n{keys}---\n# My title\n\nBefore.\n"
    (tmp_path / "README.md").write_text(user)
    card.write(tmp_path, adapter(scaling=1.0))
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nAfter: \\1 stays.\n")
    card.write(tmp_path, adapter(scaling=7.5))
    text = path.read_text()
    assert text.count(card.BEGIN) == text.count(card.END) == 1
    assert "| scaling | 7.5 |" in text
    assert "| scaling | 1 |" not in text
    assert text.index("# My title\n\nBefore.") < text.index(card.BEGIN)
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
    text = card.update(f"{card.BEGIN}\nMine.\n", adapter())
    text = card.update(text, adapter(scaling=7.5))
    assert "\nMine.\n" in text
    assert text.count("| scaling |") == 1


def test_broken_front_matter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\ntext\n")
    with pytest.raises(ArtifactError, match="front matter is not valid YAML") as caught:
        card.write(tmp_path, adapter())
    assert str(tmp_path / "README.md") in str(caught.value)
    assert (tmp_path / "README.md").read_text().endswith("text\n")
