"""Two commands at the same time on the same folders: one wins or is refused, and nothing is mixed.

Two fits, two calibrations, two merges and two exports into one folder; a merge and a push while a fit replaces the
adapter they read. `n` times each, the second started at a random moment of the first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from random import Random

from integration.hub_server import HubServer
from integration.torture.project import VERBS, done, entries, make, prepared, undisturbed, weights
from integration.torture.push import published
from integration.torture.tally import Tally
from integration.torture.zygote import Zygote, shared_zygote
from lorasb_export.inspection import inspect_folder

_REFUSALS = ("another process is writing this target", "the target exists", "an interrupted run is there")
_REFIT = ("fit", "a", "--overwrite", "--learning-rate", "0.003")
_REPO = "me/a"


def run(n: int, seed: int) -> Tally:
    """`n` pairs of each kind."""
    tally, random = Tally("concurrency", seed), Random(seed)
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder, "server")).running() as server:
        root = Path(folder)
        pushing = Zygote(**server.environment(root / "home", HF_HUB_DISABLE_XET="1"))
        both = shared_zygote(), pushing
        try:
            make(root / "start")
            for name in VERBS:
                _same_target(root, both, tally, random, name, n)
            _merge_and_fit(root, both, tally, random, n)
            _push_and_fit(root, both, tally, random, n, server)
        finally:
            pushing.stop()
    return tally


def _at_once(
    both: tuple[Zygote, Zygote], place: Path, words: list[tuple[str, ...]], delay: float
) -> list[tuple[int, str]]:
    """Exit code and words of each of the two commands, of which only the second knows the Hub."""
    logs = [place / ".log-0", place / ".log-1"]
    for zygote, command, log, wait in zip(both, words, logs, (0.0, delay), strict=True):
        time.sleep(wait)
        zygote.start(place, *command, log=log)
    codes = [zygote.wait()[0] for zygote in both]
    said = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    return list(zip(codes, said, strict=True))


def _copy(ready: Path, root: Path) -> Path:
    place = root / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(ready, place)
    return place


def _same_target(root: Path, both: tuple[Zygote, Zygote], tally: Tally, random: Random, name: str, n: int) -> None:
    verb = VERBS[name]
    whole = undisturbed(root, both[0], name)
    for number in range(n):
        place, delay = _copy(whole.ready, root), random.uniform(0.0, whole.seconds)
        words = [verb.words, (*verb.words, *random.choice([(), verb.again]))]
        ended = _at_once(both, place, words, delay)
        where = f"two of {name} #{number}, {delay:.3f} s apart"
        problems = [said for code, said in ended if code and not _refused(code, said)]
        if problems:
            tally.add("wrong", f"{where}: {problems[0][-300:]}")
        elif all(code for code, _ in ended):
            tally.add("lost", f"{where}: neither finished")
        elif weights(place / verb.target) != whole.weights or entries(place) != whole.after:
            tally.add("wrong", f"{where}: what is there is not what one alone writes")
        else:
            inspect_folder(place / verb.target)
            tally.add("ok")


def _refused(code: int, said: str) -> bool:
    last = said.strip().splitlines()[-1]
    return code == 1 and last.startswith("Error: ") and any(words in last for words in _REFUSALS)


def _merge_and_fit(root: Path, both: tuple[Zygote, Zygote], tally: Tally, random: Random, n: int) -> None:
    """The merged folder is that of the old adapter or of the new one; a merge that saw neither whole is refused."""
    merge = VERBS["merge"]
    ready = prepared(root, both[0], merge)
    old, new = root / "merged-old", root / "merged-new"
    for place, before in ((old, ()), (new, _REFIT)):
        shutil.copytree(ready, place)
        for words in filter(None, (before, merge.words)):
            seconds = done(both[0], place, words, root / "log")
    whole = [weights(place / "model") for place in (old, new)]
    assert whole[0] != whole[1]
    for number in range(n):
        place, delay = _copy(ready, root), random.uniform(0.0, 2 * seconds)
        (code, said), (merged, also) = _at_once(both, place, [_REFIT, merge.words], delay)
        where = f"merge during fit #{number}, after {delay:.3f} s"
        if code or (merged and not also.strip().splitlines()[-1].startswith("Error: ")):
            tally.add("wrong", f"{where}: {(said if code else also)[-300:]}")
        elif not merged and weights(place / "model") not in whole:
            tally.add("wrong", f"{where}: the merged folder is of neither adapter")
        else:
            tally.add("ok")


def _push_and_fit(
    root: Path, both: tuple[Zygote, Zygote], tally: Tally, random: Random, n: int, server: HubServer
) -> None:
    """What is published is the old adapter or the new one; otherwise nothing is."""
    words = ("push", "adapters/a", "--repo", _REPO, "--with-basis")
    ready = prepared(root, both[0], VERBS["merge"])
    whole = []
    for before in ((), _REFIT):
        place = _copy(ready, root)
        for command in filter(None, (before, words)):
            seconds = done(both[1], place, command, root / "log")
        whole.append(_core(published(server, _REPO)))
        server.repos.clear()
    for number in range(n):
        place, delay = _copy(ready, root), random.uniform(0.0, 2 * seconds)
        (code, said), (pushed, also) = _at_once(both, place, [_REFIT, words], delay)
        files = published(server, _REPO)
        found = _core(files)
        named = ""
        if found:
            named = json.loads(server.store.path(files["adapter_config.json"]).read_text())["sha256"]
        server.repos.clear()
        where = f"push during fit #{number}, after {delay:.3f} s"
        if code or (pushed and not also.strip().splitlines()[-1].startswith("Error: ")):
            tally.add("wrong", f"{where}: {(said if code else also)[-300:]}")
        elif (found or not pushed) and found not in whole:
            tally.add("wrong", f"{where}: published is neither adapter")
        elif found and named != found["adapter.safetensors"]:
            tally.add("wrong", f"{where}: weights of one adapter are published with the config of the other")
        else:
            tally.add("ok")


def _core(files: dict[str, str]) -> dict[str, str]:
    """The files whose bytes do not depend on when they were made."""
    return {path: digest for path, digest in files.items() if path.endswith(".safetensors")}
