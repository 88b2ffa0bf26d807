"""Every verb that writes, killed at random moments spread over its whole run, and started again.

After a kill the target is absent, or what an undisturbed run writes. The next start, with --resume where the verb has
it, ends with the same bytes and leaves nothing else behind. Every fourth try gets SIGINT or SIGTERM instead: it must
also exit with 130 or 143 and say in its last line what is there. `n` kills for each verb.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from threading import Thread

from integration.hub_server import HubServer
from integration.torture.project import VERBS, Verb, done, entries, make, prepared, weights
from integration.torture.tally import Tally
from integration.torture.zygote import Zygote
from lorasb_export.inspection import inspect_folder

_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def run(n: int, seed: int, verbs: Mapping[str, Verb] = VERBS, *, hub: bool = True) -> Tally:
    """`n` kills of each verb, and with `hub` of a push to a loopback Hub."""
    tally, random = Tally("kill", seed), Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        zygote = Zygote()
        try:
            make(root / "start")
            for name, verb in verbs.items():
                _kill_verb(root, zygote, tally, random, name, verb, n)
        finally:
            zygote.stop()
        if hub:
            _kill_push(root, tally, random, n)
    return tally


def _kill_verb(root: Path, zygote: Zygote, tally: Tally, random: Random, name: str, verb: Verb, n: int) -> None:
    ready, place, log = prepared(root, zygote, verb), root / "place", root / "log"
    whole = root / f"whole-{name}"
    shutil.copytree(ready, whole)
    seconds = done(zygote, whole, verb.words, log)
    expected, before, ended = weights(whole / verb.target), entries(ready), entries(whole)
    for number in range(n):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(ready, place)
        sent = random.choice([signal.SIGINT, signal.SIGTERM]) if number % 4 == 3 else signal.SIGKILL
        after = random.uniform(0.0, seconds)
        log.write_text("")
        zygote.start(place, *verb.words, log=log, number=sent, after=after)
        code, _ = zygote.wait()
        where = f"{name} #{number}, {sent.name} after {after:.3f} of {seconds:.3f} s"
        tally.add(*_judge(zygote, place, verb, expected, before, ended, code, sent, log, where))


def _judge(
    zygote: Zygote,
    place: Path,
    verb: Verb,
    expected: dict[str, str],
    before: set[str],
    after: set[str],
    code: int,
    sent: signal.Signals,
    log: Path,
    where: str,
) -> tuple[str, str]:
    if code not in (0, _CODES[sent], -sent):  # the last: before the verb began
        return "wrong", f"{where}: exit code {code}: {log.read_text()[-300:]}"
    last = (log.read_text().strip().splitlines() or [""])[-1]
    if code > 0 and not last.startswith("Interrupted.") and entries(place) != before:
        return "wrong", f"{where}: the last line is {last!r}"
    target = place / verb.target
    if target.exists():
        inspect_folder(target)
        if weights(target) != expected:
            return "wrong", f"{where}: what is there is not what an undisturbed run writes"
    else:
        log.write_text("")
        zygote.start(place, *verb.words, *verb.again, log=log)
        code, _ = zygote.wait()
        if code:
            return "lost", f"{where}: the next start exits with {code}: {log.read_text()[-300:]}"
        if weights(target) != expected:
            return "wrong", f"{where}: the next start ends with other bytes"
        if entries(place) != after:
            return "wrong", f"{where}: left behind {sorted(entries(place) ^ after)}"
    return "ok", ""


def _kill_push(root: Path, tally: Tally, random: Random, n: int) -> None:
    """The Hub holds nothing or all of it, and the next push ends with all of it in one commit."""
    repo = "me/a"
    words = ("push", "adapters/a", "--repo", repo, "--with-basis")
    with HubServer(root / "server") as server:
        Thread(target=server.serve_forever, daemon=True).start()
        zygote = Zygote(**server.environment(root / "home", HF_HUB_DISABLE_XET="1"))
        try:
            place, log = prepared(root, zygote, Verb(words, "", (), ("calibrate", "fit"))), root / "log"
            seconds = done(zygote, place, words, log)
            expected = published(server, repo)
            for number in range(n):
                server.repos.clear()
                after = random.uniform(0.0, seconds)
                log.write_text("")
                zygote.start(place, *words, log=log, after=after)
                zygote.wait()
                where = f"push #{number}, SIGKILL after {after:.3f} of {seconds:.3f} s"
                found = published(server, repo)
                if found and found != expected:
                    tally.add("wrong", f"{where}: half of it is published: {sorted(found)}")
                    continue
                log.write_text("")
                zygote.start(place, *words, log=log)
                code, _ = zygote.wait()
                if code:
                    tally.add("lost", f"{where}: the next push exits with {code}: {log.read_text()[-300:]}")
                elif published(server, repo) != expected:
                    tally.add("wrong", f"{where}: the next push ends with other files")
                else:
                    tally.add("ok")
        finally:
            zygote.stop()


def published(server: HubServer, repo: str) -> dict[str, str]:
    """The files of the repository's main branch, but for the ones the Hub itself makes."""
    found = server.repos.get(repo)
    if found is None:
        return {}
    files = found.commits[found.refs["main"]]
    return {path: entry.sha256 for path, entry in files.items() if path != ".gitattributes"}
