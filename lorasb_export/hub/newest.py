"""The newest commit of a repository on the Hub, or the one in the cache where the Hub does not say: never silently.

huggingface_hub takes what it has without a word where the Hub refuses or fails: a server would start with yesterday's
adapter. So the commit is asked for first, and fetched by its hash.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeGuard

from ..errors import LoraSBError
from ..files.atomic import atomic_file
from .calls import hub_errors, is_misdirected, retry_after, with_retries

logger = logging.getLogger(__name__)

_ONLY_READ = {errno.EACCES, errno.EPERM, errno.EROFS}
_failing = set[str]()  # repositories that were waited for in vain: asked once when they are asked for again
# (repository, branch or tag) → commit, inside of `asked_once`, for all threads: a process runs one command
_asked: dict[tuple[str, str | None], str] | None = None


@contextmanager
def asked_once() -> Iterator[None]:
    """Inside, the Hub is asked once for the newest commit of a repository: of what many adapters lie in all are taken
    at one commit. Outside, at each call: a program that runs for days would keep to the commit of its start."""
    global _asked
    _asked = {}
    try:
        yield
    finally:
        _asked = None


def ask_again(name: str) -> None:
    """What was asked of the repository `name` is no longer so: it has been pushed to."""
    known = _asked or {}
    for key in [key for key in known if key[0] == name]:
        del known[key]


def at_newest(name: str, revision: str | None, fetch: Callable[..., str]) -> str:
    """The folder of the repository `name` at the commit that `revision` (main where None) is now.

    Where the Hub cannot be reached, fails, or refuses the token, where its client refuses a proxy, or the cache is only
    read, it is the one that `revision` was when it was last fetched, with a warning. An error would end work on a
    laptop whose token has expired, and keep a server down whose files are all there; a branch that is gone is one all
    the same. With HF_HUB_OFFLINE nothing is asked.

    Args:
        fetch: `snapshot_download` of what is wanted; it is given `revision`, and `local_files_only`.

    Raises:
        Exception: of huggingface_hub or its client: not there, or neither reached nor in the cache.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE or re.fullmatch("[0-9a-f]{40}", revision or ""):
        return with_retries(lambda: fetch(revision=revision))

    known = {} if _asked is None else _asked

    def ask() -> str | None:
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        return HfApi().model_info(name, revision=revision, expand=["sha"], timeout=seconds).sha

    try:
        commit = known.get((name, revision)) or (ask() if name in _failing else with_retries(ask))
        folder = with_retries(lambda: fetch(revision=commit or revision))  # a mirror may not say
    except RevisionNotFoundError:
        raise
    except Exception as error:
        of_the_hub = isinstance(error, (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError))
        if not of_the_hub and not is_misdirected(error) and not is_only_read(error):
            raise
        if retry_after(error) is not None:
            _failing.add(name)
        try:
            folder = fetch(revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
        _warn(name, revision, Path(folder), _reason(error))
        known[name, revision] = Path(folder).name
        return folder
    _failing.discard(name)
    if commit is None:
        return folder
    known[name, revision] = commit
    with suppress(OSError):  # a cache that is only read
        _remember(Path(folder), revision or constants.DEFAULT_REVISION, commit)
    return folder


@cache
def _warn(name: str, revision: str | None, folder: Path, reason: str) -> None:
    """Once, however many adapters of the repository are asked for."""
    what = f"{name}@{revision}" if revision else name
    fetched = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
    text = "%s: %s. Commit %s, fetched %s, is taken from the cache: it may not be the newest"
    logger.warning(text, what, reason, folder.name, fetched)


def is_only_read(error: Exception) -> TypeGuard[OSError]:
    """Whether the cache may not be written: many share one, that an administrator fills."""
    return isinstance(error, OSError) and error.errno in _ONLY_READ


def _reason(error: Exception) -> str:
    """Why the Hub did not say, in our words, or what it has cannot be fetched."""
    if is_only_read(error):
        return f"what is newer cannot be written into the cache ({error.strerror})"
    try:
        with hub_errors(None, LoraSBError):
            raise error
    except LoraSBError as told:
        return told.what


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Note in the cache, as huggingface_hub does where it is asked for a branch, what it is: for HF_HUB_OFFLINE."""
    ref = folder.parents[1] / "refs" / revision
    if not ref.is_file() or ref.read_text() != commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(ref) as written:
            written.write_text(commit)
