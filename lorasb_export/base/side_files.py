"""A base's files by their names: those that are fetched, and those that go wherever a model made from it goes."""

from __future__ import annotations

from pathlib import Path

from ..errors import BaseModelError
from ..hub.cache import leads_out

# What transformers, sentence-transformers and vLLM read, by name: beside a Trainer's output lie its state, rows, notes.
TEXTS = (
    *("config.json", "config.[0-9]*.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *("tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.model.v[0-9]"),
    *("bpe.codes", "emoji.json", "entity_vocab.json"),  # PhoBERT's, GPT-NeoX-Japanese's, LUKE's
    *("word_shape.json", "word_pronunciation.json"),  # RoCBert's
    *("*.jinja", "additional_chat_templates/*.jinja", "chat_template.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)
# What licences want to come along wherever the model goes: `LICENSE`, `notice.txt`, `Use_Policy.md`.
LICENCES = (
    "LICENSE-MODEL",
    *(
        f"*{spelt}{ending}"
        for word in ("license", "licence", "notice", "notices", "policy", "copying")
        for spelt in (word, word.upper(), word.title())
        for ending in ("", "*.md", "*.txt")
    ),
)
# Of what a repository publishes some JSON is read that no copy takes along: the index, and what a merge notes.
FETCHED_TEXTS = ["*.json", "*.txt", *TEXTS]
FETCHED = ["*.safetensors", *FETCHED_TEXTS, *LICENCES, "README.md"]
# The same model again in its maker's own format, and what lies in folders: to these patterns `*` is any path.
NOT_FETCHED = ["*/*.safetensors", "consolidated*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "*/*.md"]
LOOKED_AT_FIRST = ["config.json", "adapter_config.json"]  # what `supported.check_supported` asks for


def side_files(folder: Path) -> list[Path]:
    """What every model folder that is made from the one in `folder` takes along.

    Raises:
        BaseModelError: one is a link to another file elsewhere.
    """
    patterns = (*TEXTS, *LICENCES, "*.py")  # code that config.json may name; none is fetched, and none is run here
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = sorted(path for path in found if not path.name.startswith("."))
    weights = {file.resolve().parent for file in folder.glob("model*.safetensors")}
    for path in kept:  # a folder of the Hub's cache may be copied, and one of links to the files of a shared one
        target = path.resolve()
        if leads_out(path, folder) and target not in {home / path.relative_to(folder) for home in weights}:
            fix = "Replace it by the file itself, or link the weights (model.safetensors) to that folder too"
            raise BaseModelError(f"a link to another file, {target}", where=path, fix=fix)
    return kept
