"""Where a server listens: on loopback alone? And is it ours that listens on a port, as Linux tells it?"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LISTENS = "0A"  # a socket's state, in /proc/net/tcp


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without brackets, is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listens(session: int, port: int) -> bool | None:
    """Whether a process of `session`, by its leader's pid, listens on `port`; None where the system does not tell."""
    with suppress(OSError):
        sockets = set(_listening(session, port))
        if sockets and "socket:[0]" not in sockets:  # some sandboxes know no numbers
            return any(sockets & set(_open_files(pid)) for pid in _members(session))
    return None


def _listening(session: int, port: int) -> Iterator[str]:
    """The sockets that listen on `port` in the network of `session`, as the links in /proc/PID/fd name them."""
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{session}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()  # number, address:port, peer, state, …, inode
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                yield f"socket:[{fields[9]}]"


def _members(session: int) -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended
                if os.getsid(int(entry.name)) == session:
                    yield int(entry.name)


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                yield os.readlink(entry.path)
