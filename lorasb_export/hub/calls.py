"""Calls of the Hub: tried again while it fails, their errors in our words, never with a token."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ..errors import LoraSBError, ServerError
from ..files.output import disk_error_in

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"hf_\w+|Bearer\s+\S+")
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")  # in hf_xet's words, after two minutes of trying
_WAITS = (1, 2, 4, 8)  # seconds before each new try, where the Hub does not say how long
_SAID = 5  # seconds: a wait of so long that the Hub asks for is logged
_MAX_WAIT = 300  # seconds: for a longer one we give up
_ANSWERS = {
    401: ("the Hub asks for a valid token", "Run `hf auth login`, or set HF_TOKEN"),
    402: ("the Hub asks for a payment: a quota is used up", "See the settings of the account there"),
    403: ("this token may not do that", "Use a token that may, with write access for a push"),
    404: ("the Hub has no such repository or revision, or hides it", "Check the name; if it is private, log in"),
    412: ("the repository changed meanwhile; nothing was committed", "Push again: no file is sent twice"),
    413: ("that is more than the Hub takes at once", "Push fewer adapters at a time"),
    429: ("the Hub's rate limit is reached", "Wait a few minutes, then try again"),
}
_NO_SOCKS = "Using SOCKS proxy"  # an ImportError of httpx2
_MISDIRECTED = (_NO_SOCKS, "Unknown scheme for proxy URL")
_OF_THE_TOKEN = (401, 402, 403, 429)  # what it may, how much and how often

T = TypeVar("T")


def with_retries(call: Callable[[], T]) -> T:
    """The result of `call`; tried again while the Hub is failing or asks to wait, at most `len(_WAITS)` times."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            pause = retry_after(error)
            if pause is None:
                raise
            wait_for(pause or wait)
    return call()


def wait_for(seconds: float) -> None:
    """Wait, and say so where it takes long enough to wonder."""
    if seconds >= _SAID:
        logger.warning("the Hub is failing or asks to wait: the next try is in %.0f s", seconds)
    time.sleep(seconds)


def retry_after(error: BaseException) -> float | None:
    """Seconds to wait before trying again (0: the Hub does not say), or None: trying again would not help soon."""
    import httpx2

    for cause in _chain(error):
        answer = getattr(cause, "response", None)
        if answer is not None and (answer.status_code in (408, 429) or answer.status_code >= 500):
            seconds = _asked(answer.status_code, answer.headers)
            return seconds if seconds <= _MAX_WAIT else None
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


def status_of(error: BaseException) -> int:
    """The HTTP status of the answer that made this error, or that it came from; or 0."""
    return next(filter(None, map(_status, _chain(error))), 0)


def _status(error: BaseException) -> int:
    answer = getattr(error, "response", None)
    if answer is not None:
        return int(answer.status_code)
    if type(error).__name__ == "XetAuthenticationError":
        return 401
    said = _XET_STATUS.search(str(error))
    return int(said.group(1)) if said else 0


def is_misdirected(error: BaseException) -> bool:
    """Whether nothing could be asked at all: the environment names a proxy, or an endpoint, that the client refuses."""
    import httpx2

    return isinstance(error, httpx2.InvalidURL) or any(words in str(error) for words in _MISDIRECTED)


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while cause := chain[-1].__cause__:
        chain.append(cause)
    return chain


@contextmanager
def hub_errors(where: object, kind: type[LoraSBError], before: str = "") -> Iterator[None]:
    """Raise what huggingface_hub raises as `kind`: one line, what to do, and never a token."""
    import httpx2
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    unreached = httpx2.TransportError, ConnectionError
    try:
        yield
    except LoraSBError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        misdirected = is_misdirected(error)
        if isinstance(error, ImportError) and not misdirected:
            raise
        chain, status = _chain(error), status_of(error)

        def is_from(*kinds: type[BaseException]) -> bool:
            return any(isinstance(e, kinds) for e in chain)

        what, fix = _clean(str(error)), "Try again"
        if is_from(GatedRepoError):
            what, fix = "the repository is gated", "Ask for access on its page, then try again"
        elif is_from(RepositoryNotFoundError):  # by status 401 for who is not logged in
            what, fix = _ANSWERS[404]
        elif status in _ANSWERS:
            what, fix = _ANSWERS[status]
            reason = next((text for e in chain if (text := getattr(e, "server_message", None))), "")
            if status == 403 and reason:  # a missing right, a full quota, a blocked account
                what = f"{what}: {_clean(reason)}"
        elif status == 400:
            what, fix = f"the Hub does not take it: {what}", "Nothing was published; push again"
        elif status >= 500:
            what, fix = f"the Hub fails ({status})", "Try again later: nothing is sent or fetched twice"
        elif kind is ServerError and is_from(OfflineModeIsEnabled):
            what, fix = "HF_HUB_OFFLINE is set: nothing can be pushed", "Unset it"
        elif is_from(OfflineModeIsEnabled):
            what, fix = "HF_HUB_OFFLINE is set and the cache does not have it", "Fetch it once with a connection"
        elif is_from(*unreached):
            what, fix = "the Hub cannot be reached", "Check the network and HF_ENDPOINT"
        elif _NO_SOCKS in what:
            what, fix = "the proxy cannot be used: socksio is not installed", "pip install socksio, or unset ALL_PROXY"
        elif misdirected:
            what = f"the proxy or HF_ENDPOINT cannot be used: {what}"
            fix = "Correct ALL_PROXY, HTTPS_PROXY or HF_ENDPOINT"
        elif is_from(HFValidationError):
            what, fix = f"the Hub can have no such name: {what.rstrip('.')}", "Check the name"
        failure = kind(before + what, where=where, fix=fix)
        if isinstance(failure, ServerError):
            not_asked = misdirected or is_from(OfflineModeIsEnabled, *unreached)
            failure.silent = status >= 500 or (not status and not_asked)
            own = is_from(RepositoryNotFoundError, DisabledRepoError)
            failure.of_every_repository = failure.silent or (status in _OF_THE_TOKEN and not own)
        raise failure from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of hf_xet, which logs to the cache when it is first used
            raise
        reason = getattr(disk_error_in(str(error)), "strerror", None) or _clean(str(error))
        fix = "Let HF_HOME be a folder that can be written, or set HF_HUB_DISABLE_XET=1"
        failure = kind(f"{before}hf_xet cannot work: {reason}", where=where, fix=fix)
        if isinstance(failure, ServerError):
            failure.of_every_repository = True
        raise failure from None
