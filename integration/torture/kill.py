"""Every verb that writes, killed at random moments spread over its whole run, and started again.

After a kill the target is absent, or what an undisturbed run writes. The next start, with --resume where the verb has
it, ends with the same bytes and leaves nothing else behind. Every fourth try gets SIGINT or SIGTERM instead: it must
also exit with 130 or 143 and say in its last line what is there. `n` kills for each verb.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from random import Random

from integration.torture.kill_serve import kill_serve
from integration.torture.project import VERBS, Undisturbed, Verb, entries, last_line, make, undisturbed, weights
from integration.torture.push import kill_push
from integration.torture.tally import Tally
from integration.torture.zygote import Zygote, shared_zygote
from lorasb_export.inspection import inspect_folder

_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def run(n: int, seed: int, verbs: Iterable[str] = tuple(VERBS), *, hub: bool = True, serve: bool = True) -> Tally:
    """`n` kills of each verb, with `hub` of a push to a loopback Hub, with `serve` of a server that loads adapters."""
    tally, random = Tally("kill", seed), Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root / "start")
        for name in verbs:
            _kill_verb(root, shared_zygote(), tally, random, name, n)
        if hub:
            kill_push(root / "pushed", tally, random, n)
        if serve:
            kill_serve(root / "served", tally, random, n)
    return tally


def _kill_verb(root: Path, zygote: Zygote, tally: Tally, random: Random, name: str, n: int) -> None:
    verb, whole, place, log = VERBS[name], undisturbed(root, zygote, name), root / "place", root / "log"
    for number in range(n):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole.ready, place)
        sent = random.choice([signal.SIGINT, signal.SIGTERM]) if tally.tried % 4 == 3 else signal.SIGKILL
        after = random.uniform(0.0, whole.seconds)
        log.write_text("")
        zygote.start(place, *verb.words, log=log, number=sent, after=after)
        code, _ = zygote.wait()
        tally.disturbed += code != 0
        where = f"{name} #{number}, {sent.name} after {after:.3f} of {whole.seconds:.3f} s"
        end, problem = _judge(zygote, place, verb, whole, code, sent, log)
        tally.add(end, f"{where}: {problem}")


def _judge(
    zygote: Zygote, place: Path, verb: Verb, whole: Undisturbed, code: int, sent: signal.Signals, log: Path
) -> tuple[str, str]:
    if code not in (0, _CODES[sent], -sent):  # the last: before the verb began
        return "wrong", f"exit code {code}: {log.read_text()[-300:]}"
    last = last_line(log.read_text())
    if code > 0 and not last.startswith("Interrupted.") and entries(place) != whole.before:
        return "wrong", f"the last line is {last!r}"
    target = place / verb.target
    if target.exists():
        inspect_folder(target)
        if weights(target) != whole.weights:
            return "wrong", "what is there is not what an undisturbed run writes"
    else:
        log.write_text("")
        zygote.start(place, *verb.words, *verb.again, log=log)
        code, _ = zygote.wait()
        if code:
            return "lost", f"the next start exits with {code}: {log.read_text()[-300:]}"
        if weights(target) != whole.weights:
            return "wrong", "the next start ends with other bytes"
        if entries(place) != whole.after:
            return "wrong", f"left behind {sorted(entries(place) ^ whole.after)}"
    return "ok", ""
