"""`serve`: check, fold, start vLLM, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import environment
from ..errors import OutputError, SettingsError, Terminated
from ..files.storage import cache_folder, expanded
from ..names import resolve_adapters
from .api_keys import api_key, as_variables
from .listening import is_loopback
from .plan import make_plan
from .server import RunningServer
from .stopping import FILE, STOPPING_VARIABLE
from .temporary import temporary_folder

_ASKS_FOR_LOOPBACK = f"{__package__}.key.AsksForLoopback"
_STOPPING = f"{__package__}.stopping.Stopping"
# For how many seconds an idle connection is kept. vLLM's own 5 are less than a balancer's 60 to 600, which then sends a
# request over one that is just being closed, and answers 502.
_KEEP_ALIVE, _KEPT_OPEN = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "620"
Adapters = Mapping[str, str | Path] | Sequence[str | Path]  # served name → folder or Hub id; or words


def serve(
    adapters: Adapters = (),
    *,
    model: str | None = None,
    mode: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    extra: Sequence[str] = (),
    updates_from: str | Path | None = None,
    api_key_file: str | Path | None = None,
    pass_over: bool = False,
    echo: bool = True,
    on_start: Callable[[], None] | None = None,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Serve a base model with `adapters`, or the merged model `model` alone, until interrupted.

    Call it from the main thread (in another, `running_server`): it stops at SIGINT and SIGTERM. The server's log goes
    to stderr.

    Args:
        adapters: served name → adapter folder or Hub id; or a list of words as `--adapters` takes them (a name in
            `adapters/`, a folder's path, a Hub id), optionally as `name=word`, to serve it under another name.
        model: the base, where the adapters do not find it themselves; without adapters, any model folder or Hub id.
        mode: `shared`: B and A once, one R per adapter, with a vLLM this was tested with; `folded`: each adapter as an
            ordinary LoRA; `auto`: shared where it can be, or folded, with a warning that says why.
        port: 0 takes any free one.
        dtype: as vLLM's `--dtype`.
        extra: further vLLM flags, as `["--max-model-len", "4096"]`; they win over the ones chosen here.
        updates_from: a folder whose adapters clients with the key may load, replace and unload meanwhile.
        api_key_file: holds the key clients have to give, or several, one a line; without it, VLLM_API_KEY holds one,
            if set.
        pass_over: skip, with a warning, adapters that are damaged or cannot be served, as long as one remains.
            Unreadable bases and other base models may affect at most a tenth of the adapters. In shared mode or with
            updates, also skip the few of another basis.
        echo: copy the server's log to stderr.
        on_start: called once when nothing was refused, before the server is started.
        on_ready: called once with `url`, `models` and `pid` when the server answers.

    Returns:
        the exit code: 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        SettingsError, ArtifactError, BaseModelError: an adapter cannot be served, or not with this base.
        OutputError: the port is taken, by another start too, or the disk is full.
        MissingPackageError: vLLM is not installed.
        ServerError: the server ended by itself; why, if its log says so, and its last lines are in the message.
    """
    options: dict[str, Any] = {"model": model, "mode": mode, "host": host, "port": port, "dtype": dtype, "extra": extra}
    options |= {"updates_from": updates_from, "api_key_file": api_key_file, "pass_over": pass_over}
    try:
        with _sigterm_interrupts(), running_server(adapters, **options, echo=echo, on_start=on_start) as server:
            if on_ready is not None:
                on_ready({"url": server.url, "models": server.models, "pid": server.pid})
            server.wait()
    except KeyboardInterrupt as stop:
        return 143 if isinstance(stop, Terminated) else 130


@contextmanager
def running_server(
    adapters: Adapters = (),
    *,
    model: str | None = None,
    mode: str = "auto",
    host: str = "127.0.0.1",
    port: int = 0,
    dtype: str = "auto",
    extra: Sequence[str] = (),
    updates_from: str | Path | None = None,
    api_key_file: str | Path | None = None,
    pass_over: bool = False,
    echo: bool = False,
    on_start: Callable[[], None] | None = None,
) -> Iterator[RunningServer]:
    """A server in the background, ready when the block starts and gone when it ends; in any thread.

    Args and errors: as for `serve`.

    Args:
        echo: copy the server's log to stderr.
        on_start: called once when nothing was refused, before the server is started.

    Yields:
        a RunningServer: ask at its `url` + "/v1".
    """
    port = _claim_port(host, port)
    environment.require_packages("vllm")
    key = api_key(api_key_file)
    options: dict[str, Any] = {"model": model, "mode": mode, "host": host, "port": port, "dtype": dtype, "extra": extra}
    updates = None if updates_from is None else expanded(updates_from)
    options |= {"updates_from": updates, "has_key": bool(key), "pass_over": pass_over}
    plan = make_plan(_named(adapters), **options)
    with temporary_folder() as folder:
        plan.mode.write(Path(folder))
        changes = plan.environment(folder) | _keep_inside(folder) | as_variables(key)
        changes |= {_KEEP_ALIVE: os.environ.get(_KEEP_ALIVE, _KEPT_OPEN)}
        changes |= {STOPPING_VARIABLE: os.path.join(folder, FILE)}
        command, variables = plan.command(folder), environment.child_environment(**changes)
        if not key and is_loopback(host):
            command += ["--middleware", _ASKS_FOR_LOOPBACK]
        command += ["--middleware", _STOPPING]  # the last one, and so asked before the user's too
        options = {"echo": echo, "advice": plan.mode.advice, "drain": plan.drain}
        server = RunningServer(command, variables, _url(host, port), **options)
        del plan  # its tensors are on disk now
        try:
            if on_start is not None:
                on_start()
            server.start()
            yield server
        finally:
            server.stop()


def _named(adapters: Adapters) -> Mapping[str, str | Path]:
    if isinstance(adapters, Mapping):
        return adapters
    if isinstance(adapters, str | Path):
        raise SettingsError(f"adapters is {str(adapters)!r}", fix="Give a list of them, or name → folder")
    words = [os.path.join(".", expanded(word)) if isinstance(word, Path) else word for word in adapters]
    return resolve_adapters(words, Path("adapters"))


def _keep_inside(folder: str) -> dict[str, str]:
    """Variables that make vLLM put what it never removes (sockets, a rendezvous file) into `folder`, to go with it."""
    if len(folder) > 64:  # a socket's path has room for about 100 characters, and vLLM appends 37
        return {}
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _compiler_cache(folder)
    return {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": cache}


def _compiler_cache(folder: str) -> str:
    """Where it outlasts the server, being worth a minute at the next start: at home, since what lies in it is run."""
    cache = (cache_folder() or Path(folder)) / "torchinductor"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        return os.path.join(folder, "torchinductor")
    return str(cache)


def _claim_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises OutputError when the address cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = "Give --host an address of this machine: 127.0.0.1, or 0.0.0.0 for all"
            if error.errno == errno.EADDRINUSE:
                fix = "Stop what listens there, or give another --port"
            elif error.errno == errno.EACCES:
                fix = "Give a --port above 1023"
            raise OutputError(f"cannot listen: {error.strerror}", where=f"{host}:{port}", fix=fix) from None
        return int(probe.getsockname()[1])


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    # By name it might be reached over IPv6, where another server may listen on that port.
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that every `finally` runs."""

    def interrupt(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
