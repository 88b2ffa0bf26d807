"""What lies beside a base's weights, and goes wherever a model made from it goes."""

from __future__ import annotations

from pathlib import Path

from ..errors import BaseModelError
from ..hub.cache import leads_out

# Settings, tokenizer (`bpe.codes` is PhoBERT's, `tokenizer.model.v3` for vLLM) and chat templates.
TEXTS = ("*.json", "*.txt", "*.model", "*.model.v[0-9]", "bpe.codes", "*.jinja", "additional_chat_templates/*.jinja")
# What licences want to come along wherever the model goes.
LICENCES = ("*LICENSE", "LICENSE-MODEL", "LICENSE*.md", "LICENSE*.txt", "NOTICE", "NOTICE*.md", "*POLICY.md")
_MADE_ANEW = ("lorasb.json", ".index.json")


def side_files(folder: Path) -> list[Path]:
    """What every model folder that is made from the one in `folder` takes along.

    Raises:
        BaseModelError: one is a link to another file elsewhere.
    """
    patterns = (*TEXTS, *LICENCES, "*.py")  # code that config.json may name; none is fetched, and none is run here
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = sorted(path for path in found if not path.name.startswith(".") and not path.name.endswith(_MADE_ANEW))
    weights = {file.resolve().parent for file in folder.glob("model*.safetensors")}
    for path in kept:  # a folder of the Hub's cache may be copied, and one of links to the files of a shared one
        target = path.resolve()
        if leads_out(path, folder) and target not in {home / path.relative_to(folder) for home in weights}:
            fix = "Replace it by the file itself, or link the weights (model.safetensors) to that folder too"
            raise BaseModelError(f"a link to another file, {target}", where=path, fix=fix)
    return kept
