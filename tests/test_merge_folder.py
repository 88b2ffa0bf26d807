"""What lies in a merged folder beside the weights: files of the base byte for byte, ties, the config's changes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from lorasb_export import merge, push
from lorasb_export.base.model import BaseModel
from lorasb_export.base.side_files import TEXTS
from lorasb_export.errors import BaseModelError
from lorasb_export.files.storage import read_json, write_json
from tests.merging import adapter_for


def test_side_files_are_byte_equal_and_ties_stay_tied(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    for name in ("chat_template.jinja", "vocab.json", "merges.txt", "bpe.codes", "tokenizer.model.v3", "modeling_x.py"):
        (base / name).write_text(f"{name} of the base")
    for name in ("LICENSE", "LICENSE.md", "MODEL_LICENSE", "NOTICE", "USE_POLICY.md", "preprocessor_config.json"):
        (base / name).write_text(f"{name} of the base")
    for name in ("NOTICE.txt", "ACCEPTABLE_USE_POLICY.txt", "license.txt", "THIRD_PARTY_NOTICES.txt", "COPYING"):
        (base / name).write_text(f"{name} of the base")
    left = {"model.safetensors", "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "SHA256SUMS"}
    left |= {".x.json", "events.out.tfevents.17.host", "train.jsonl"}
    for name in left - {"model.safetensors"}:
        (base / name).write_text(f"{name} of the base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("a template of a name")
    merge(adapter_for(base, tmp_path / "a"), tmp_path / "model")
    for path in filter(Path.is_file, base.rglob("*")):
        copied = tmp_path / "model" / path.relative_to(base)
        same = copied.is_file() and copied.read_bytes() == path.read_bytes()
        assert same == (path.name not in left), path.name
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    network = BaseModel.resolve(tmp_path / "model").load()
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert "library_name: transformers" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.usefixtures("no_network")
def test_of_a_trainers_output_only_what_a_model_is_read_from_comes_along(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    left = {"credentials.json", "train.json", "notes.txt", "trainer_state.json", "requirements.txt"}
    for name in left:
        (base / name).write_text("{}")
    merge(adapter_for(base, tmp_path / "a"), tmp_path / "model")
    assert not {path.name for path in (tmp_path / "model").iterdir()} & left
    for name in left:  # as an earlier merge carried them
        (tmp_path / "model" / name).write_text("{}")
    plan = push(tmp_path / "model", "me/model", dry_run=True)
    assert set(plan["skipped"]) == left
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file["path"] for file in plan["files"]}


def test_every_text_that_a_tokenizer_of_transformers_reads_comes_along() -> None:
    """But those of families that no base is of: encoder-decoders, and Whisper."""
    others = {"byte_maps.json", "dict.txt", "normalizer.json", "target_vocab.json", "vocab-src.json", "vocab-tgt.json"}
    table = re.compile(r"^VOCAB_FILES_NAMES = \{(.*?)\}", re.MULTILINE | re.DOTALL)
    sources = [path.read_text() for path in Path(transformers.__path__[0], "models").glob("*/tokenization_*.py")]
    tables = "".join(found for source in sources for found in table.findall(source))
    named = set(re.findall(r'"([^"]+\.(?:json|txt|model|codes))"', tables))
    assert "vocab.json" in named
    assert {name for name in named if not any(fnmatch(name, pattern) for pattern in TEXTS)} <= others


@pytest.mark.parametrize("named", [97, [97, 96], None])
def test_answers_of_transformers_end_where_trained_answers_end(llama: Path, tmp_path: Path, named: object) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "generation_config.json").unlink()
    if named is None:
        write_json(base / "config.json", read_json(base / "config.json") | {"eos_token_id": 97})
    else:
        write_json(base / "generation_config.json", {"eos_token_id": named, "repetition_penalty": 1.3})
    merge(adapter_for(base, tmp_path / "a"), tmp_path / "model")
    config = BaseModel.resolve(tmp_path / "model").load().generation_config
    assert config.eos_token_id == ([97, 96, 2] if named == [97, 96] else [97, 2])
    assert config.repetition_penalty == (1.3 if named else None)  # of a chat, as the base has it
    assert config.pad_token_id == (None if named else 2)


def test_no_link_of_the_base_brings_another_file_along(llama: Path, tmp_path: Path) -> None:
    base, secret, blobs = tmp_path / "base", tmp_path / "secret", tmp_path / "models--me--x" / "blobs"
    shutil.copytree(llama, base)
    adapter = adapter_for(base, tmp_path / "a")
    blobs.mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    links = {
        blobs / "0a1b": "vocab.txt",
        tmp_path / "shared" / "merges.txt": "merges.txt",
        secret: "special_tokens_map.json",
    }
    for target, link in links.items():
        target.write_text(link)
        (base / link).symlink_to(target)
    with pytest.raises(BaseModelError, match=r"a link to another file, .*shared/merges.txt"):  # of no shared model yet
        merge(adapter, tmp_path / "model")
    shutil.move(base / "model.safetensors", tmp_path / "shared" / "model.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "shared" / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"a link to another file, .*secret \(.*special_tokens_map.json\)"):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (base / "special_tokens_map.json").unlink()
    merge(adapter, tmp_path / "model")  # as the Hub's cache holds every file, or a folder of links to a shared one
    for name in ("vocab.txt", "merges.txt"):
        assert (tmp_path / "model" / name).read_text() == name


def test_a_large_file_that_repositories_share_in_the_hubs_cache_comes_along(llama: Path, tmp_path: Path) -> None:
    """As huggingface_hub 2.4 keeps it: a link to the repository's blob, which is a link to one for all."""
    snapshot, blobs, shared = (
        tmp_path / "hub" / part for part in ("models--me--x/snapshots/1", "models--me--x/blobs", "blobs/0a")
    )
    shutil.copytree(llama, snapshot)
    for folder in (blobs, shared):
        folder.mkdir(parents=True)
    (shared / "0a1b").write_text("words")
    (blobs / "77").symlink_to("../../blobs/0a/0a1b")
    (snapshot / "vocab.txt").symlink_to("../../blobs/77")
    merge(adapter_for(snapshot, tmp_path / "a"), tmp_path / "model")
    assert (tmp_path / "model" / "vocab.txt").read_text() == "words"


def test_code_that_stays_on_the_hub_is_named_there(llama: Path, tmp_path: Path) -> None:
    """A base of the Hub is fetched without it, and whoever trusts remote code would look for it in the folder."""
    base = shutil.copytree(llama, tmp_path / "base")
    named = {"AutoConfig": "odd.OddConfig", "AutoModel": "other/repo--odd.Odd"}
    write_json(base / "config.json", read_json(base / "config.json") | {"auto_map": named})
    of_tokenizer = {"AutoTokenizer": ["odd.OddTokenizer", None]}
    write_json(base / "tokenizer_config.json", read_json(base / "tokenizer_config.json") | {"auto_map": of_tokenizer})
    adapter = adapter_for(base, tmp_path / "a")
    merge(adapter, tmp_path / "here")
    assert read_json(tmp_path / "here" / "config.json")["auto_map"] == named
    assert read_json(tmp_path / "here" / "tokenizer_config.json")["auto_map"] == of_tokenizer
    of_hub = replace(BaseModel.resolve(base), name_or_path="owner/odd")
    merge(adapter, tmp_path / "there", base=of_hub)
    wanted = {**named, "AutoConfig": "owner/odd--odd.OddConfig"}
    assert read_json(tmp_path / "there" / "config.json")["auto_map"] == wanted
    wanted_of_tokenizer = {"AutoTokenizer": ["owner/odd--odd.OddTokenizer", None]}
    assert read_json(tmp_path / "there" / "tokenizer_config.json")["auto_map"] == wanted_of_tokenizer
