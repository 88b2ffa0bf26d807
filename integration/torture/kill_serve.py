"""`lorasb serve` killed while clients load adapters, and started again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from urllib.error import HTTPError

import psutil

from integration.torture.tally import Tally
from integration.torture.tiny_server import CONTEXT, Tokens, post, tiny_world, wrong_answer
from lorasb_export import environment
from lorasb_export.files.storage import sha256_file
from lorasb_export.serving.plan import DRAIN_SECONDS
from lorasb_export.serving.server import SECONDS

_ADAPTERS, _SERVED = 8, 4
_KEY = "only-for-this-run"
_GONE = DRAIN_SECONDS + SECONDS + 10.0  # seconds that a server may take to follow


def kill_serve(root: Path, tally: Tally, random: Random, n: int) -> None:
    """`n` kills at random moments of two seconds of loading.

    Nothing of the server outlives its `lorasb serve`, no adapter's folder changes, and the next start gives every
    adapter's right answers and leaves no folder of a killed server behind.
    """
    versions, answers = tiny_world(root, _ADAPTERS)
    temporary = root / "tmp"
    temporary.mkdir()
    before = _hashes(root / "adapters")
    for number in range(n + 1):  # the last start only shows that the last kill cost nothing
        server = _Server(root, versions[:_SERVED], temporary)
        try:
            problem = server.wrong_answers(versions[:_SERVED], answers)
            if _hashes(root / "adapters") != before:
                problem = "an adapter's folder has changed"
            if len(list(temporary.glob("lorasb-*"))) > 1:
                problem = f"left behind: {sorted(path.name for path in temporary.glob('lorasb-*'))}"
            if number == n:
                break
            loads = threading.Thread(target=server.load, args=(versions[_SERVED:],))
            loads.start()
            after = random.uniform(0.0, 2.0)
            time.sleep(after)
            outlived = server.kill()
            loads.join()
            problem = problem or server.refused or (f"{outlived} outlives it" if outlived else "")
        finally:
            server.stop()
        tally.add("wrong" if problem else "ok", f"serve #{number}, killed after {after:.3f} s of loading: {problem}")
        print(f"serve #{number}: {server.loaded} loads before the kill")
    if problem:
        tally.add("lost", f"serve, the last start: {problem}")


class _Server:
    def __init__(self, root: Path, served: list[str], temporary: Path) -> None:
        words = ["serve", "--model", "tiny", "--adapters", ",".join(served), "--adapters-dir", "adapters"]
        words += ["--allow-updates", "--dtype", "float32", "--port", "0", "--json"]
        words += ["--", "--max-model-len", str(CONTEXT), "--max-loras", "4", "--num-gpu-blocks-override", "64"]
        variables = environment.child_environment(VLLM_API_KEY=_KEY, TMPDIR=str(temporary))
        self._log = (root / "serve.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorasb_cli", *words],
            cwd=root,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server does not start: {(root / 'serve.log').read_text()[-2000:]}")
        ready = json.loads(line)
        self._url = ready["url"]
        self._all = [psutil.Process(ready["pid"]), *psutil.Process(ready["pid"]).children(recursive=True)]
        self.loaded, self.refused, self._killed = 0, "", False

    def wrong_answers(self, names: list[str], answers: dict[tuple[str, Tokens], Tokens]) -> str:
        return wrong_answer(self._url, _KEY, {name: name for name in (*names, "tiny")}, answers)

    def load(self, versions: list[str]) -> None:
        """Load the versions under ever new names until the server is gone."""
        while True:
            version = versions[self.loaded % len(versions)]
            try:
                body = {"lora_name": f"late-{self.loaded}", "lora_path": version}
                post(f"{self._url}/v1/load_lora_adapter", _KEY, body)
            except HTTPError as error:  # while it dies, that too is an answer
                self.refused = "" if self._killed else f"a load is answered with {error.code}"
                return
            except OSError:
                return
            self.loaded += 1

    def kill(self) -> str:
        """Kill `lorasb serve`; returns what of its server is still there after a while."""
        self._killed = True
        self._process.kill()
        self._process.wait()
        _, alive = psutil.wait_procs(self._all, timeout=_GONE)
        return ", ".join(f"{one.pid} {one.name()}" for one in alive)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for one in self._all:
            if one.is_running():
                one.kill()
        self._log.close()


def _hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
