"""Every verb that writes, on a disk that fails at each of its calls in turn: full, read-only, slow, losing a file, …

After a fault the verb ends with one clear error, or all is well: the target is absent, as it was, or what an
undisturbed run writes. On the healed disk the same command ends with the same bytes and leaves nothing else behind.
`n` is the most calls tried for each verb and fault, evenly spread over those it makes: a large `n` tries every one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from integration.torture.faulty_disk import FAULTS, Fault, FaultyDisk, spread
from integration.torture.project import VERBS, Undisturbed, entries, foreign_end, last_line, make, undisturbed
from integration.torture.push import disk_push
from integration.torture.tally import Tally
from integration.torture.zygote import Zygote
from lorasb_export.errors import LoraSBError
from lorasb_export.files.storage import read_json, sha256_file
from lorasb_export.inspection import inspect_folder

_INPUTS = ("llama/model-00002-of-*.safetensors", "sums/train.jsonl", "basis/*.safetensors", "adapters/a/*.safetensors")
_WITH_TIMES = ("adapter_config.json", "basis_config.json", "lorasb.json")
_SLOW = Fault(fsync_ms=30)


@dataclass(frozen=True)
class _World:
    root: Path
    place: Path
    log: Path
    disk: FaultyDisk
    zygote: Zygote


def run(n: int, seed: int, verbs: Iterable[str] = tuple(VERBS), *, hub: bool = True) -> Tally:
    """At most `n` calls of each verb under each fault, with a target that is not there and with one to be replaced.

    `hub` adds a push to a loopback Hub.
    """
    tally = Tally("disk", seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mount = root / "disk"
        (mount / "tmp").mkdir(parents=True)
        disk = FaultyDisk(mount, root)
        zygote = Zygote(**disk.variables, TMPDIR=str(mount / "tmp"), HF_HOME=str(mount / "home"))
        try:
            make(root / "start")
            for name in verbs:
                whole = undisturbed(root, zygote, name)
                _try_verb(_World(root, mount / "place", root / "log", disk, zygote), name, whole, tally, n)
        finally:
            zygote.stop()
        if hub:
            disk_push(root / "pushed", tally, n)
    return tally


def _try_verb(world: _World, name: str, whole: Undisturbed, tally: Tally, n: int) -> None:
    faults = {**FAULTS, **{f"{path} vanishes": fault for path, fault in _vanishing(world, whole)}}
    for there in (False,) if VERBS[name].in_place else (False, True):
        _prepare(world, name, whole, there)
        end, problem = _judge(world, name, whole, _SLOW, there)
        tally.add(end, f"{name}, slow fsync: {problem}")
        counted: dict[bool, int] = {}
        for title, fault in faults.items():
            if fault.only_growing not in counted:
                _prepare(world, name, whole, there)
                world.disk.arm(fault)
                _lorasb(world, name, there)
                counted[fault.only_growing] = world.disk.heal()
            calls = counted[fault.only_growing]
            for call in spread(calls, n):
                _prepare(world, name, whole, there)
                end, problem = _judge(world, name, whole, fault, there, call)
                where = f"{name}{' --overwrite' if there else ''}, {title} at call {call} of {calls}, {world.disk.hit}"
                tally.add(end, f"{where}: {problem}")


def _vanishing(world: _World, whole: Undisturbed) -> list[tuple[str, Fault]]:
    found = [path.relative_to(whole.ready) for pattern in _INPUTS for path in whole.ready.glob(pattern)]
    return [(path.as_posix(), Fault(vanish=world.place / path)) for path in found]


def _prepare(world: _World, name: str, whole: Undisturbed, there: bool) -> None:
    shutil.rmtree(world.place, ignore_errors=True)
    shutil.copytree(world.root / f"whole-{name}" if there else whole.ready, world.place)


def _lorasb(world: _World, name: str, replace: bool, *words: str) -> int:
    """Exit code of the verb, which writes to an empty log."""
    world.log.write_text("")
    verb = VERBS[name]
    world.zygote.start(world.place, *verb.words, *words, *(["--overwrite"] if replace else []), log=world.log)
    return world.zygote.wait()[0]


def _judge(world: _World, name: str, whole: Undisturbed, fault: Fault, there: bool, call: int = 0) -> tuple[str, str]:
    verb, target = VERBS[name], world.place / VERBS[name].target
    right = _content(world.root / f"whole-{name}" / verb.target)
    before = _content(target) if target.exists() else {}
    world.disk.arm(fault, call)
    code = _lorasb(world, name, there)
    world.disk.heal()
    said = world.log.read_text()
    last = last_line(said)
    if foreign := foreign_end(code, said):
        return "wrong", foreign
    # Of the latter two torch and onnxruntime do not know why.
    reasons = (os.strerror(fault.error), "cannot write a checkpoint", "cannot write an ONNX adapter")
    if code and fault.error and ("[Errno" in last or not any(reason in last for reason in reasons)):
        return "wrong", f"the error does not say why, in our words: {last}"
    if code and fault.vanish and fault.vanish.name not in last:
        return "wrong", f"the error does not name the file: {last}"
    if not call and code:
        return "wrong", f"a slow disk ends it: {last}"
    if fault.vanish:
        shutil.copy2(whole.ready / fault.vanish.relative_to(world.place), fault.vanish)
    problem = _whats_wrong(target, right if code == 0 else before or right) and _whats_wrong(target, right)
    if problem or (code == 0 and not target.exists()):
        return "wrong", f"exit code {code}, but {problem or 'nothing is there'}"
    if before and code and not fault.sticky and not target.exists():
        return "lost", "the one that was to be replaced is gone"
    ended = code == 0 or "it is there and whole" in last
    replace = there or (ended and not verb.in_place)
    code = _lorasb(world, name, replace, *(() if ended else verb.again))
    if code:
        return "lost", f"the next start exits with {code}: {world.log.read_text()[-600:]}"
    if problem := _whats_wrong(target, right):
        return "wrong", f"the next start: {problem}"
    hidden = [path.name for path in target.rglob(".*")]
    if hidden or entries(world.place) != whole.after:
        return "wrong", f"left behind {sorted(entries(world.place) ^ whole.after) + hidden}"
    return "ok", ""


def _whats_wrong(target: Path, right: dict[str, str]) -> str:
    """Of what is in `target`, where it is there."""
    if not target.exists():
        return ""
    try:
        inspect_folder(target)
    except LoraSBError as error:
        return f"what is there does not load: {error}"
    found = _content(target)
    return f"not as it should be: {sorted(set(found.items()) ^ set(right.items()))}" if found != right else ""


def _content(folder: Path) -> dict[str, str]:
    """A hash of every file; of those with times and digests of times in them, that they are whole."""
    return {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def _digest(path: Path) -> str:
    if path.name == "training.png":  # of a resumed run: the loss that it logs first is a mean of fewer steps
        return "a picture" if path.read_bytes().startswith(b"\x89PNG") else "something else"
    if path.name in ("README.md", "training_log.jsonl"):
        return f"{len(path.read_text().splitlines())} lines"
    return f"{len(read_json(path))} keys" if path.name in _WITH_TIMES else sha256_file(path)
