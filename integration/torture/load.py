"""A server under load: 32 clients over many adapters that come, change and go meanwhile, and clients that misbehave.

`n` requests with n / 10 loads and unloads among them, after as many to warm up; then n / 5 more, first alone and then
among bad clients. Every answer is compared with the one its adapter is known for.
"""

from __future__ import annotations

import asyncio
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil

from .bad_clients import BAD_CLIENTS
from .tally import Tally
from .tiny_server import Target, Tokens, tiny_server

CLIENTS = 32
MEMORY_GROWTH, LATENCY_GROWTH = 1.02, 2.0
JUDGED = 5000  # from so many requests on: with fewer, kernels are still compiled for batch sizes not met before
_TIMEOUT = aiohttp.ClientTimeout(total=120)


def run(n: int, seed: int, adapters: int = 0) -> Tally:
    """`adapters`: how many exist, half of them served at the start; by default one for ten requests, 20 to 1000."""
    adapters = adapters or min(1000, max(20, n // 10))
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder), adapters) as target:
        return load(target, n, seed)


def load(target: Target, n: int, seed: int) -> Tally:
    """Put load on `target`. From `JUDGED` requests on, memory or latency over its limit counts as one lost."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, _hard_limit()), _hard_limit()))
    return asyncio.run(Load(target, seed).run(n))


def _hard_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


class Names:
    """Which version a name stood for, and when.

    A change happens somewhere between its request and the answer, so for that time both versions are right.
    """

    def __init__(self, served: dict[str, str]) -> None:
        self.history: dict[str, list[tuple[float, float, str | None]]] = {
            name: [(0.0, float("inf"), version)] for name, version in served.items()
        }

    def begin(self, name: str, version: str | None) -> None:
        self.history.setdefault(name, [(0.0, float("inf"), None)]).append((time.monotonic(), float("inf"), version))

    def end(self, name: str) -> None:
        start, _, version = self.history[name][-2]
        self.history[name][-2] = start, time.monotonic(), version

    def between(self, name: str, start: float, stop: float) -> set[str | None]:
        """What it may have stood for in that time, None: nothing."""
        return {version for begin, end, version in self.history[name] if begin <= stop and start <= end}

    def now(self, name: str) -> str | None:
        return self.history[name][-1][2]


class Load:
    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.random = target, random.Random(seed)
        self.tally = Tally("load", seed)
        self.names = Names(target.served | {target.base: target.base})
        self.all_names = [*target.served, *(f"late-{n}" for n in range(len(target.served) // 10 + 1))]
        self.changing: set[str] = set()
        self.loaded = self.removed = self.not_found = 0

    async def run(self, n: int) -> Tally:
        headers = {"Authorization": f"Bearer {self.target.key}"}
        # A connection for each request: one that is kept may be closed, after 5 s, in the moment it is used again.
        connections = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(headers=headers, connector=connections, timeout=_TIMEOUT) as self.session:
            await self._clients(n, changes=n // 10)
            before = self._memory()
            await self._clients(n, changes=n // 10)
            after = self._memory()
            alone = await self._clients(max(n // 10, 2 * CLIENTS))
            among = await self._among_bad_clients(max(n // 10, 2 * CLIENTS))
        print(f"loaded or replaced {self.loaded}, removed {self.removed}, answered 404 for it {self.not_found}")
        over = self._is_over("memory", "MB", before / 1e6, after / 1e6, MEMORY_GROWTH)
        over += self._is_over("p95 latency", "s", _p95(alone), _p95(among), LATENCY_GROWTH)
        if over and n >= JUDGED:
            self.tally.add("lost", "memory or latency over its limit")
        return self.tally

    async def _clients(self, requests: int, changes: int = 0) -> list[float]:
        """Seconds of each of `requests` by all clients at once, with so many loads and unloads spread among them."""
        times: list[float] = []
        todo = iter(range(requests))
        due = [(change + 1) * requests // (changes + 1) for change in range(changes)]

        async def client() -> None:
            for number in todo:
                times.append(await self._ask())
                if due and number >= due[0]:
                    due.pop(0)
                    await self._change()

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        while due:
            due.pop()
            await self._change()
        return times

    async def _ask(self) -> float:
        name = self.random.choice(list(self.names.history))
        prompt = self.random.choice(self._prompts())
        body = {"model": name, "prompt": prompt, "max_tokens": len(self._answer(self.target.base, prompt))}
        options = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        started = time.monotonic()
        try:
            async with self.session.post(f"{self.target.url}/v1/completions", json=body | options) as response:
                status, answer = response.status, await response.json()
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            status, answer = 0, {"error": repr(error)}
        stopped = time.monotonic()
        versions = self.names.between(name, started, stopped)
        if status == 200:
            tokens = tuple(answer["choices"][0]["token_ids"])
            right = any(version and tokens == self._answer(version, prompt) for version in versions)
            end = "ok" if right else "accepted_bad" if versions == {None} else "wrong"
            self.tally.add(end, f"{name}, {versions}: {tokens}")
        elif status == 404 and None in versions:
            self.not_found += 1
            self.tally.add("ok")
        else:
            self.tally.add("lost", f"{name}, {versions}: {status} {answer}")
        return stopped - started

    async def _change(self) -> None:
        """Load, replace or remove one name. No two changes of one name at a time: then none could tell which won."""
        free = [name for name in self.all_names if name not in self.changing]
        if not free:
            return
        name = self.random.choice(free)
        self.changing.add(name)
        remove = name in self.names.history and self.names.now(name) and self.random.random() < 0.4
        version = None if remove else self.random.choice(self.target.versions)
        self.names.begin(name, version)
        body = {"lora_name": name} if remove else {"lora_name": name, "lora_path": version}
        what = "unload" if remove else "load"
        async with self.session.post(f"{self.target.url}/v1/{what}_lora_adapter", json=body) as response:
            problem = f"{what} {name}: {response.status} {await response.text()}"
            self.tally.add("ok" if response.status == 200 else "lost", problem)
        self.names.end(name)
        self.changing.discard(name)
        self.removed, self.loaded = self.removed + bool(remove), self.loaded + (not remove)

    async def _among_bad_clients(self, requests: int) -> list[float]:
        stop = asyncio.Event()
        bad = [asyncio.create_task(client(self.target, self.session, stop, self.tally)) for client in BAD_CLIENTS]
        await asyncio.sleep(1)  # until they are at it
        times = await self._clients(requests)
        stop.set()
        for client, counts in zip(BAD_CLIENTS, await asyncio.gather(*bad), strict=True):
            print(f"{client.__name__}: {counts}")
        return times

    def _prompts(self) -> list[Tokens]:
        return [prompt for version, prompt in self.target.answers if version == self.target.base]

    def _answer(self, version: str, prompt: Tokens) -> Tokens:
        return self.target.answers[version, prompt]

    def _memory(self) -> float:
        server = psutil.Process(self.target.pid)
        return float(sum(one.memory_full_info().uss for one in (server, *server.children(recursive=True))))

    def _is_over(self, what: str, unit: str, before: float, after: float, growth: float) -> bool:
        print(f"{what}: {before:.3g} {unit} before, {after:.3g} {unit} after ({after / before:.3f}, limit {growth})")
        return after > growth * before


def _p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]
