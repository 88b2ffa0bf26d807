"""Find a folder: on this disk, or on the Hub. Tokens are left to huggingface_hub and never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError, LoraSBError

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SECRET = re.compile(r"hf_\w+|Bearer\s+\S+")
# No pattern admits a pickle: it never reaches this machine.
_FETCHED = ["*.safetensors", "*.json", "*.jsonl", "*.md", "*.png", "*.model", "*.txt", "*.jinja"]
_FETCHED += ["*.onnx", "*.onnx.data", "*.onnx_data", "*.onnx_adapter"]
_ANSWERS = {
    401: ("the Hub asks for a valid token", "Run `hf auth login`, or set HF_TOKEN"),
    403: ("this token may not do that", "Use a token with write access to that repository"),
    404: ("the Hub has no such repository or revision, or hides it", "Check the name; if it is private, log in"),
    412: ("the repository changed meanwhile; nothing was committed", "Push again: no file is sent twice"),
    429: ("the Hub's rate limit is reached", "Wait a few minutes, then try again"),
}


def resolve_folder(source: str | Path) -> tuple[Path, str]:
    """The folder behind `source`, and the name to remember it by.

    Args:
        source: a local folder, or a Hub id `owner/name` or `owner/name@revision`. Of a Hub repository only
            safetensors, JSON, text, image and ONNX files are fetched: a pickle never reaches this machine.

    Returns:
        (absolute folder, the same as text), or (its snapshot, `owner/name@commit`).

    Raises:
        ArtifactError: neither; or the Hub does not have it, will not give it, or cannot be reached.
    """
    path = Path(os.path.abspath(Path(source).expanduser()))
    if path.is_dir():
        return path, str(path)
    name, commit, folder = snapshot(str(source), _FETCHED, ArtifactError)
    return folder, f"{name}@{commit}"


def snapshot(
    source: str, patterns: list[str], kind: type[LoraSBError], before: str = "", revision: str | None = None
) -> tuple[str, str, Path]:
    """Fetch what `patterns` admit of a Hub repository: its name, the commit it is at, its folder.

    Args:
        source: `owner/name` or `owner/name@revision`; `revision` wins.
        kind: of the error raised; `before` begins its message.
    """
    from huggingface_hub import snapshot_download

    name, _, tagged = source.partition("@")
    if Path(source).expanduser().exists() or not REPO.fullmatch(name):
        fix = "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
        raise kind(f"{before}neither a folder nor a Hub id", where=source, fix=fix)
    with hub_errors(source, kind, f"{before}no such folder, and "):
        folder = Path(snapshot_download(name, revision=revision or tagged or None, allow_patterns=patterns))
    return name, folder.name, folder


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
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__:
            chain.append(cause)
        answers = [answer for e in chain if (answer := getattr(e, "response", None)) is not None]
        status = answers[0].status_code if answers else 0
        what, fix = " ".join(_SECRET.sub("***", str(error)).split()), "Try again; --verbose shows more"
        if any(isinstance(e, GatedRepoError) for e in chain):
            what, fix = "the repository is gated", "Ask for access on its page, then try again"
        elif status in _ANSWERS:
            what, fix = _ANSWERS[status]
        elif any(isinstance(e, (httpx2.TransportError, OfflineModeIsEnabled)) for e in chain):
            what, fix = "the Hub cannot be reached", "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise kind(before + what, where=where, fix=fix) from None
