"""Clients no server wishes for. Each goes on until it is told to stop, and returns what it counted."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from .tally import Tally
from .tiny_server import Target

CONNECTIONS, SLOW, FLOOD = 1000, 8, 4
PAUSE = 0.01  # s: a flood of 100 requests a second from each, and less when the server takes its time


async def slow(target: Target, session: aiohttp.ClientSession, stop: asyncio.Event, tally: Tally) -> Counter[str]:
    """They send a request a few bytes at a time; it is as good as any other when it is complete."""
    prompt, tokens = next((p, a) for (version, p), a in target.answers.items() if version == target.base)
    body = {"model": target.base, "prompt": prompt, "max_tokens": len(tokens), "temperature": 0, "ignore_eos": True}

    async def one() -> str:
        reader, writer = await _connect(target)
        for piece in _pieces(_post(target, body | {"return_token_ids": True}), 40):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        right = b" 200 " in head and tuple(json.loads(content)["choices"][0]["token_ids"]) == tokens
        return "ok" if right else "wrong" if b" 200 " in head else "lost"

    return await _until(stop, tally, *[one] * SLOW)


async def vanishing(target: Target, session: aiohttp.ClientSession, stop: asyncio.Event, tally: Tally) -> Counter[str]:
    """They leave in the middle of their request, or of its answer."""
    prompt = next(iter(target.answers))[1]
    body = {"model": target.base, "prompt": prompt, "max_tokens": 64, "ignore_eos": True, "stream": True}

    async def early() -> str:
        _, writer = await _connect(target)
        writer.write(_post(target, body)[:-20])
        await writer.drain()
        await asyncio.sleep(PAUSE)
        writer.close()
        return "ok"

    async def late() -> str:
        await asyncio.sleep(PAUSE)
        reader, writer = await _connect(target)
        writer.write(_post(target, body))
        started = b"200" in await reader.read(12)
        writer.transport.abort()
        return "ok" if started else "lost"

    return await _until(stop, tally, early, late)


async def too_long(target: Target, session: aiohttp.ClientSession, stop: asyncio.Event, tally: Tally) -> Counter[str]:
    """Prompts beyond the context, as tokens and as text, are refused with 400. (A longer answer is cut to fit.)"""
    bodies: list[dict[str, Any]] = [
        {"prompt": [5] * (target.context + 1), "max_tokens": 1},
        {"prompt": "never ending " * 50_000, "max_tokens": 1},
    ]

    async def one() -> str:
        await asyncio.sleep(10 * PAUSE)
        body = random.choice(bodies) | {"model": target.base}
        return await _refused(session, target, body, status=400)

    return await _until(stop, tally, one)


async def unknown_names(
    target: Target, session: aiohttp.ClientSession, stop: asyncio.Event, tally: Tally
) -> Counter[str]:
    """A flood of requests for adapters that do not exist, each name a new one."""

    async def one() -> str:
        await asyncio.sleep(PAUSE)
        body = {"model": f"no-{random.getrandbits(64):x}", "prompt": [5], "max_tokens": 1}
        return await _refused(session, target, body, status=404)

    return await _until(stop, tally, *[one] * FLOOD)


async def connections(
    target: Target, session: aiohttp.ClientSession, stop: asyncio.Event, tally: Tally
) -> Counter[str]:
    """A thousand connections that wait in the middle of their first request, and finish it at the end."""
    held = [await _connect(target) for _ in range(CONNECTIONS)]
    for _, writer in held:
        writer.write(b"GET /health HTTP/1.1\r\nHost: here\r\nConnection: close\r\n")
    await stop.wait()

    async def finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(b"\r\n")
        answer = await reader.read()
        writer.close()
        return "ok" if b" 200 " in answer else "lost"

    return _counted(tally, await asyncio.gather(*(finish(*pair) for pair in held), return_exceptions=True))


BAD_CLIENTS = (slow, vanishing, too_long, unknown_names, connections)


async def _until(stop: asyncio.Event, tally: Tally, *clients: Any) -> Counter[str]:
    async def again(client: Any) -> list[Any]:
        found: list[Any] = []
        while not stop.is_set():
            found += await asyncio.gather(client(), return_exceptions=True)
        return found

    return _counted(tally, list(chain(*await asyncio.gather(*map(again, clients)))))


def _counted(tally: Tally, outcomes: list[Any]) -> Counter[str]:
    """Enter outcomes in the tally; an exception is a request that was lost."""
    counts = Counter(outcome if isinstance(outcome, str) else f"lost: {outcome!r}" for outcome in outcomes)
    for outcome, count in counts.items():
        for _ in range(count):
            tally.add(outcome.partition(":")[0], outcome)
    return counts


async def _refused(session: aiohttp.ClientSession, target: Target, body: dict[str, Any], status: int) -> str:
    async with session.post(f"{target.url}/v1/completions", json=body) as response:
        await response.read()
        return "ok" if response.status == status else "accepted_bad" if response.status == 200 else "lost"


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(target.url)
    return await asyncio.open_connection(address.hostname, address.port)


def _post(target: Target, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: here", "Connection: close", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {target.key}", f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


def _pieces(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]
