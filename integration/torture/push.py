"""A push to a loopback Hub, killed or on a faulty disk.

Whatever happens the Hub holds nothing or all of it, and the next push ends with all of it in one commit.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from integration.hub_server import HubServer
from integration.torture.faulty_disk import FAULTS, FaultyDisk, spread
from integration.torture.project import Verb, done, foreign_end, make, prepared
from integration.torture.tally import Tally
from integration.torture.zygote import Zygote

_REPO = "me/a"
_PUSH = Verb(("push", "adapters/a", "--repo", _REPO, "--with-basis"), "", (), ("calibrate", "fit"))


def kill_push(root: Path, tally: Tally, random: Random, n: int) -> None:
    """`n` kills at random moments. `root` is a folder of its own, here and below."""
    with _hub(root, root / "home", HF_HUB_DISABLE_XET="1") as hub:
        for number in range(n):
            after = random.uniform(0.0, hub.seconds)
            hub.push(after)
            end, problem = hub.judge()
            tally.add(end, f"push #{number}, SIGKILL after {after:.3f} of {hub.seconds:.3f} s: {problem}")


def disk_push(root: Path, tally: Tally, n: int) -> None:
    """At most `n` calls under each fault of the disk that the project and the Hub's cache lie on."""
    mount = root / "disk"
    (mount / "tmp").mkdir(parents=True)
    disk = FaultyDisk(mount, root)
    with _hub(root, mount / "home", **disk.variables, TMPDIR=str(mount / "tmp")) as hub:
        hub.place = shutil.copytree(hub.place, mount / "place")
        for title, fault in FAULTS.items():
            disk.arm(fault)
            hub.push()
            calls = disk.heal()
            for call in spread(calls, n):
                disk.arm(fault, call)
                code = hub.push()
                disk.heal()
                foreign = foreign_end(code, hub.log.read_text())
                end, problem = ("wrong", foreign) if foreign else hub.judge()
                tally.add(end, f"push, {title} at call {call} of {calls}, {disk.hit}: {problem}")


class _Hub:
    """A Hub, and a project to push to it.

    Attributes:
        place: the project's folder.
        log: what the last push said.
        seconds: of a push that nothing disturbs.
    """

    def __init__(self, server: HubServer, zygote: Zygote, root: Path) -> None:
        self.place, self.log = prepared(root, zygote, _PUSH), root / "log"
        self._server, self._zygote = server, zygote
        self.seconds = done(zygote, self.place, _PUSH.words, self.log)
        self._whole = published(self._server, _REPO)

    def push(self, after: float = 600) -> int:
        """Exit code of a push to a Hub that has nothing yet, killed after so many seconds."""
        self._server.repos.clear()
        return self._again(after)

    def judge(self) -> tuple[str, str]:
        """What the Hub holds, and what it holds after another push."""
        found = published(self._server, _REPO)
        if found and found != self._whole:
            return "wrong", f"half of it is published: {sorted(found)}"
        if code := self._again():
            return "lost", f"the next push exits with {code}: {self.log.read_text()[-300:]}"
        if published(self._server, _REPO) != self._whole:
            return "wrong", "the next push ends with other files"
        return "ok", ""

    def _again(self, after: float = 600) -> int:
        self.log.write_text("")
        self._zygote.start(self.place, *_PUSH.words, log=self.log, number=signal.SIGKILL, after=after)
        return self._zygote.wait()[0]


def published(server: HubServer, repo: str) -> dict[str, str]:
    """The files of the repository's main branch, but for the ones the Hub itself makes."""
    found = server.repos.get(repo)
    if found is None:
        return {}
    files = found.commits[found.refs["main"]]
    return {path: entry.sha256 for path, entry in files.items() if path != ".gitattributes"}


@contextmanager
def _hub(root: Path, home: Path, **variables: str) -> Iterator[_Hub]:
    with HubServer(root / "server").running() as server:
        zygote = Zygote(**server.environment(home, **variables))
        try:
            make(root / "start")
            yield _Hub(server, zygote, root)
        finally:
            zygote.stop()
