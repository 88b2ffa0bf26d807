"""Find a folder: on this disk, or on the Hub. Tokens are left to huggingface_hub and never shown."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from .errors import ArtifactError, LoraSBError, ServerError
from .output import disk_error_in
from .storage import sha256_file

logger = logging.getLogger(__name__)

# What each kind of folder is read from. Nothing else is fetched: no picture, and never a pickle or a script.
ADAPTER_FILES = ("adapter_config.json", "adapter.safetensors")
BASIS_FILES = ("basis_config.json", "basis.safetensors")
MARK_FILES = ("adapter_config.json", "basis_config.json", "lorasb.json", "config.json")  # they say what a folder is

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (".jsonl", ".json", ".csv")
_SECRET = re.compile(r"hf_\w+|Bearer\s+\S+")
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")  # in hf_xet's words, after two minutes of trying
_WAITS = (1, 2, 4, 8)  # seconds before each new try, where the Hub does not say how long
_SAID, _LONGEST = 5, 300  # seconds the Hub may ask to wait: from these on it is said, after those the try ends
_ANSWERS = {
    401: ("the Hub asks for a valid token", "Run `hf auth login`, or set HF_TOKEN"),
    403: ("this token may not do that", "Use a token that may, with write access for a push"),
    404: ("the Hub has no such repository or revision, or hides it", "Check the name; if it is private, log in"),
    412: ("the repository changed meanwhile; nothing was committed", "Push again: no file is sent twice"),
    429: ("the Hub's rate limit is reached", "Wait a few minutes, then try again"),
}

T = TypeVar("T")


def parse_hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """(`owner/name`, revision) of what reads like `owner/name` or `owner/name@revision`; else None."""
    match = _HUB_ID.fullmatch(str(source))
    return None if match is None or ".." in str(source) else (match.group(1), match.group(2))


def may_be_dataset(source: str, folder: Path) -> bool:
    """Whether `source`, of which there is no file, may be a dataset's id, `owner/name` or `name`, rather than a
    mistyped path: one with a file's ending, or into a folder that `folder` has."""
    is_id = _DATASET_ID.fullmatch(source) is not None and not source.endswith(_FILE_ENDINGS)
    return is_id and not ("/" in source and (folder / source.partition("/")[0]).is_dir())


def resolve_folder(source: str | Path, files: Sequence[str]) -> tuple[Path, str]:
    """The folder behind `source`, and the name to remember it by.

    Args:
        source: a local folder, or a Hub id `owner/name` or `owner/name@revision`.
        files: what is wanted of it. Of a Hub repository only these are fetched, and checked against the hashes that
            the Hub names.

    Returns:
        (absolute folder, the same as text), or (its snapshot, `owner/name@commit`).

    Raises:
        ArtifactError: neither; or the Hub does not have it, will not give it, or cannot be reached.
    """
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.is_dir():
        return path, str(path)
    name, commit, folder = snapshot(str(source), files, ArtifactError)
    found = [file for file in files if (folder / file).is_file()]
    if not found:
        fix = "See what it is: lorasb inspect"
        raise ArtifactError(f"that repository has no {' or '.join(files)}", where=f"{name}@{commit}", fix=fix)
    for damaged in (file for file in found if not _is_intact(folder / file)):
        _fetch_again(name, commit, folder, damaged)
    return folder, f"{name}@{commit}"


def snapshot(
    source: str,
    patterns: Sequence[str],
    kind: type[LoraSBError],
    before: str = "",
    revision: str | None = None,
    but: Sequence[str] = (),
) -> tuple[str, str, Path]:
    """Fetch what `patterns` admit, `but` some, of a Hub repository: its name, the commit it is at, its folder.

    With HF_HUB_OFFLINE, or where the Hub does not answer, what was fetched before is taken from the cache.

    Args:
        source: `owner/name` or `owner/name@revision`; `revision` wins.
        kind: of the error raised; `before` begins its message.
    """
    from huggingface_hub import snapshot_download

    parsed = parse_hub_id(source)
    if parsed is None or Path(os.path.expanduser(source)).exists():
        fix = "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
        raise kind(f"{before}neither a folder nor a Hub id", where=source, fix=fix)
    name, tagged = parsed
    with hub_errors(source, kind, f"{before}no such folder, and "):
        folder = patiently(
            lambda: snapshot_download(
                name, revision=revision or tagged, allow_patterns=list(patterns), ignore_patterns=list(but)
            )
        )
    return name, Path(folder).name, Path(folder)


def _is_intact(path: Path) -> bool:
    """Whether a file of the cache has the hash it is called by there: sha256 of a large file, git's of a small one."""
    if not path.is_symlink():
        return True  # a cache without links keeps no hash
    expected = path.readlink().name
    if re.fullmatch("[0-9a-f]{64}", expected):
        return sha256_file(path) == expected
    return git_hash(path.read_bytes()) == expected


def git_hash(data: bytes) -> str:
    """What git calls these bytes, and the Hub a file that is not large."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _fetch_again(name: str, commit: str, folder: Path, file: str) -> None:
    from huggingface_hub import hf_hub_download

    where = f"{name}@{commit}"
    with hub_errors(where, ArtifactError):
        patiently(lambda: hf_hub_download(name, file, revision=commit, force_download=True))
    if not _is_intact(folder / file):
        fix = "Try again later; if it stays so, ask the owner to upload it again"
        raise ArtifactError(f"{file} does not arrive as the Hub names it (its hash differs)", where=where, fix=fix)


def is_blob(path: Path) -> bool:
    """Whether a file that a link led to is one of the Hub's cache, whose folders are made of links to blobs."""
    return path.parent.name == "blobs"


def patiently(call: Callable[[], T]) -> T:
    """The result of `call`; tried again while the Hub is failing or asks to wait, at most `len(_WAITS)` times."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            pause = will_pass(error)
            if pause is None:
                raise
            rest(pause or wait)
    return call()


def rest(seconds: float) -> None:
    """Wait, and say so where it takes long enough to wonder."""
    if seconds >= _SAID:
        logger.warning("the Hub asks to wait %.0f s", seconds)
    time.sleep(seconds)


def will_pass(error: BaseException) -> float | None:
    """Seconds to wait before trying again (0: the Hub does not say), or None: trying again would not help soon."""
    import httpx2

    for cause in _chain(error):
        answer = getattr(cause, "response", None)
        if answer is not None and (answer.status_code in (408, 429) or answer.status_code >= 500):
            seconds = _asked(answer.status_code, answer.headers)
            return seconds if seconds <= _LONGEST else None
        if isinstance(cause, (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError, httpx2.ReadTimeout)):
            return 0.0
    return None


def _asked(status: int, headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait; 0 where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    said = headers.get("Retry-After", "")
    if said.isascii() and said.isdigit():
        return float(said)
    limit = parse_ratelimit_headers(headers) if status == 429 else None  # other answers say it too, with some left
    return float(limit.reset_in_seconds) if limit else 0.0


def _clean(text: str) -> str:
    """One line without a token."""
    return " ".join(_SECRET.sub("***", text).split())


def _status(error: BaseException) -> int:
    """The HTTP status of the answer that made this error, or 0."""
    answer = getattr(error, "response", None)
    if answer is not None:
        return int(answer.status_code)
    if type(error).__name__ == "XetAuthenticationError":
        return 401
    said = _XET_STATUS.search(str(error))
    return int(said.group(1)) if said else 0


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while cause := chain[-1].__cause__:
        chain.append(cause)
    return chain


@contextmanager
def hub_errors(where: object, kind: type[LoraSBError], before: str = "") -> Iterator[None]:
    """Raise what huggingface_hub raises as `kind`: one line, what to do, and never a token."""
    import httpx2
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    try:
        yield
    except LoraSBError:
        raise
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        chain = _chain(error)
        status = next(filter(None, map(_status, chain)), 0)
        what, fix = _clean(str(error)), "Try again"
        if any(isinstance(e, GatedRepoError) for e in chain):
            what, fix = "the repository is gated", "Ask for access on its page, then try again"
        elif status in _ANSWERS:
            what, fix = _ANSWERS[status]
            reason = next((text for e in chain if (text := getattr(e, "server_message", None))), "")
            if status == 403 and reason:  # a missing right, a full quota, a blocked account
                what = f"{what}: {_clean(reason)}"
        elif status == 400:
            what, fix = f"the Hub does not take it: {what}", "Nothing was published; push again"
        elif status >= 500:
            what, fix = f"the Hub fails ({status})", "Try again later: nothing is sent or fetched twice"
        elif kind is ServerError and any(isinstance(e, OfflineModeIsEnabled) for e in chain):
            what, fix = "HF_HUB_OFFLINE is set: nothing can be pushed", "Unset it"
        elif any(isinstance(e, OfflineModeIsEnabled) for e in chain):
            what, fix = "HF_HUB_OFFLINE is set and the cache does not have it", "Fetch it once with a connection"
        elif any(isinstance(e, (httpx2.TransportError, ConnectionError)) for e in chain):
            what, fix = "the Hub cannot be reached", "Check the network and HF_ENDPOINT"
        failure = kind(before + what, where=where, fix=fix)
        if isinstance(failure, ServerError):
            unreached = (OfflineModeIsEnabled, httpx2.TransportError, ConnectionError)
            failure.silent = status >= 500 or (not status and any(isinstance(e, unreached) for e in chain))
        raise failure from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of hf_xet, which logs to the cache when it is first used
            raise
        reason = getattr(disk_error_in(str(error)), "strerror", None) or _clean(str(error))
        fix = "Let HF_HOME be a folder that can be written, or set HF_HUB_DISABLE_XET=1"
        raise kind(f"{before}hf_xet cannot work: {reason}", where=where, fix=fix) from None
