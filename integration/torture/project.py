"""A small project, and what is true of it when each verb has run undisturbed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from integration.torture.zygote import Zygote
from lorasb_export.files.storage import sha256_file
from tests.conftest import write_splits
from tests.tiny import make_llama

_PROJECT = """\
model = "llama"
[basis]
rank = 4
samples = 16
[fit]
batch_size = 4
epochs = 1
learning_rate = 1e-2
checkpoint_every = 2
[tasks.a]
data = "sums"
"""
_WEIGHTS = (".safetensors", ".onnx", ".data", ".onnx_data", ".onnx_adapter")


@dataclass(frozen=True)
class Verb:
    """A command, the folder it writes, and the words to add when it is started again.

    Attributes:
        needs: the verbs to run before.
        in_place: it changes files of a folder that is there, and knows no --overwrite.
    """

    words: tuple[str, ...]
    target: str
    again: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    in_place: bool = False


_GRAPH = ("export", "a", "--format", "onnx-adapters")
_FITTED = ("calibrate", "fit")
VERBS = {
    "calibrate": Verb(("calibrate",), "basis"),
    "fit": Verb(("fit", "a"), "adapters/a", ("--resume",), ("calibrate",)),
    "evaluate": Verb(("evaluate", "a"), "adapters/a", (), _FITTED, in_place=True),
    "merge": Verb(("merge", "a", "--out", "model", "--max-shard-size", "60KB"), "model", (), _FITTED),
    "peft": Verb(("export", "a", "--format", "peft", "--out", "peft"), "peft", (), _FITTED),
    "onnx": Verb(("export", "a", "--format", "onnx", "--out", "onnx"), "onnx", (), _FITTED),
    "graph": Verb((*_GRAPH, "--out", "graph"), "graph", (), _FITTED),
    "into": Verb((*_GRAPH, "--into", "graph", "--overwrite"), "graph", (), (*_FITTED, "graph"), in_place=True),
}


def make(folder: Path) -> None:
    make_llama(folder / "llama", shards="80KB", width=64)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    write_splits(folder / "sums", {"train": rows[:32], "valid": rows[32:]})
    (folder / "lorasb.toml").write_text(_PROJECT)


def prepared(root: Path, zygote: Zygote, verb: Verb) -> Path:
    """A folder in which everything that `verb` needs is done."""
    place = root / "-".join(("ready", *verb.needs))
    if not place.exists():
        shutil.copytree(root / "start", place)
        for name in verb.needs:
            done(zygote, place, VERBS[name].words, root / "log")
    return place


def done(zygote: Zygote, place: Path, words: tuple[str, ...], log: Path) -> float:
    """Seconds of an undisturbed run."""
    log.write_text("")
    zygote.start(place, *words, log=log)
    code, seconds = zygote.wait()
    if code:
        raise RuntimeError(f"lorasb {' '.join(words)} exits with {code}: {log.read_text()}")
    return seconds


def last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1]


def foreign_end(code: int, said: str) -> str:
    """How a verb ended, where that is neither well nor with one clear error of ours; else empty."""
    if code == 0 and "Traceback" not in said:
        return ""
    if code == 1 and "Traceback" not in said and last_line(said).startswith("Error: "):
        return ""
    return f"exit code {code}, and it says: {said[-600:]}"


@dataclass(frozen=True)
class Undisturbed:
    """A verb that nothing disturbs: the folder it starts in, how long it takes, what is in its target and around it."""

    ready: Path
    seconds: float
    weights: dict[str, str]
    before: set[str]
    after: set[str]


def undisturbed(root: Path, zygote: Zygote, name: str) -> Undisturbed:
    """Run the verb `name` once."""
    verb, whole = VERBS[name], root / f"whole-{name}"
    ready = prepared(root, zygote, verb)
    shutil.copytree(ready, whole)
    seconds = done(zygote, whole, verb.words, root / "log")
    return Undisturbed(ready, seconds, weights(whole / verb.target), entries(ready), entries(whole))


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.name.endswith(_WEIGHTS)}


def entries(place: Path) -> set[str]:
    """Everything in the project's folder, hidden files too, down to the folders that verbs write."""
    return {path.relative_to(place).as_posix() for pattern in ("*", "adapters/*") for path in place.glob(pattern)}
