"""vLLM's own flags, as users give them after `--`: those that are read here, and those that are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import takewhile

from ..errors import SettingsError

SERVED_NAMES = "--served-model-name"
_GENERATION, _PENALTY = "--override-generation-config", "repetition_penalty"
_SHORT_FLAGS = {  # of those that are read here
    "-asc": "--api-server-count",
    "-dp": "--data-parallel-size",
    "-dpb": "--data-parallel-backend",
    "-ep": "--enable-expert-parallel",
    "-tp": "--tensor-parallel-size",
}
# Given by this package, or they would put the server where it is not looked for.
_OUR_FLAGS = {"--model", "--host", "--port", "--uds", "--lora-modules", "--ssl-keyfile", "--ssl-certfile"}
# Flag → what is wrong with it, and what to do instead.
_REFUSED_FLAGS = {
    "--api-key": (
        "an API key on the command line",
        "Use --api-key-file or VLLM_API_KEY: a command line can be read by every user of this machine",
    ),
    "--api-server-count": ("vLLM ignores it, started as it is here", "Give --data-parallel-size, or leave it out"),
    "--lora-target-modules": ("vLLM would leave out a part of each adapter in silence", "Each says where it goes"),
    "--lora-dtype": ("adapters are of the model's dtype", "Use the option --dtype of `lorasb serve`"),
    "--config": ("a file of flags, which is not read here", "Give the flags in it after --"),
    **dict.fromkeys(
        sorted(_OUR_FLAGS),
        ("not a flag to hand to vLLM here", "Use the option of `lorasb serve`, or a reverse proxy for TLS and sockets"),
    ),
}
# With these vLLM computes a step in parts, and takes the adapters of its first tokens for each.
_IN_PARTS = ("--enable-dbo", "--ubatch-size")
# External KV caches that know a block by its tokens alone. vLLM takes their names in JSON, by flags of one key each,
# and several at once (MultiConnector).
_BY_TOKENS = re.compile("lmcache|hf3fs|flexkv|exampleconnector", re.IGNORECASE)
_READ_FLAGS = {
    *_REFUSED_FLAGS,
    *_SHORT_FLAGS,
    *_SHORT_FLAGS.values(),
    *_IN_PARTS,
    "--distributed-executor-backend",
    "--dtype",
    "--enable-sleep-mode",
    "--fully-sharded-loras",
    "--kv-sharing-fast-prefill",
    "--max-cpu-loras",
    "--max-loras",
    _GENERATION,
    SERVED_NAMES,
    "--shutdown-timeout",
}


def number(extra: Sequence[str], flag: str) -> int | None:
    """The value the user gives vLLM by `flag`, or None; what is no number vLLM itself refuses."""
    value = values(extra).get(flag, "")
    return int(value) if value.isdecimal() else None


def served_names(extra: Sequence[str], own: str) -> list[str]:
    """What the base is served as, its `own` name unless told otherwise; of a flag given twice vLLM takes the last."""
    names = [own]
    for place, word in enumerate(extra):
        flag, equals, value = _parted(word)
        if flag == SERVED_NAMES:
            names = [value] if equals else list(takewhile(lambda word: not word.startswith("-"), extra[place + 1 :]))
    return names


def without_penalty(extra: Sequence[str]) -> list[str]:
    """Flags for behind `extra` that leave the base's repetition_penalty out; none where users name one, or give {}.

    vLLM takes the last object that is given, and of what is given key by key (`…-config.top_k 5`) it makes the last.
    """
    given, none = values(extra), {_PENALTY: 1.0}
    keys = [flag.replace("-", "_") for flag in given if flag.startswith(f"{_GENERATION}.")]
    if keys:
        return [] if any(key.endswith(f".{_PENALTY}") for key in keys) else [f"{_GENERATION}.{_PENALTY}", "1.0"]
    if _GENERATION not in given:
        return [_GENERATION, json.dumps(none)]
    try:
        own = json.loads(given[_GENERATION])
    except ValueError:  # which vLLM refuses
        return []
    counts = not isinstance(own, dict) or not own or _PENALTY in own
    return [] if counts else [_GENERATION, json.dumps(own | none)]


def refuse_bad(extra: Sequence[str]) -> None:
    """Raise SettingsError for a flag that is not handed on, a word that is none, and what may be short for one."""
    if extra and not extra[0].startswith("-"):
        fix = f"Name adapters with --adapters {extra[0]}"
        raise SettingsError(f"{extra[0]!r} is not a flag to hand to vLLM", fix=fix)
    given = values(extra)
    for flag in given:  # vLLM takes abbreviations, and they would pass unread
        begun = flag.partition(".")[0]  # of --flag.key=value
        if whole := next((known for known in sorted(_READ_FLAGS - {begun}) if known.startswith(begun)), None):
            raise SettingsError(f"{flag} may be short for {whole}", fix="Write vLLM's flags out in full")
    for flag, (problem, fix) in _REFUSED_FLAGS.items():
        if flag in given:
            raise SettingsError(problem, where=flag, fix=fix)


def refuse_beside_adapters(extra: Sequence[str]) -> None:
    """Raise SettingsError for what would answer a request from another's adapter.

    That is what computes a step in parts, and an external KV cache that does not tell one adapter's blocks from
    another's. (vLLM's own, --kv-offloading-size, goes by the hashes of its prefix cache, which hold an adapter's name
    and path.)
    """
    given = values(extra)
    if flag := next((flag for flag in _IN_PARTS if flag in given), None):
        what = "vLLM would answer the second half of a step's tokens with the adapters of the first"
        raise SettingsError(what, where=flag, fix="Leave it out")
    if any(_BY_TOKENS.search(word) for word in extra):
        what = "that KV cache goes by tokens, not by adapter: one would be answered from another's"
        fix = "Leave it out; --kv-offloading-size alone is safe"
        raise SettingsError(what, where="--kv-transfer-config", fix=fix)


def values(extra: Sequence[str]) -> dict[str, str]:
    """--flag → its value (or "") among `extra`, for both `--flag value` and `--flag=value`, and for short flags."""
    found = {}
    for word, following in zip(extra, [*extra[1:], ""], strict=False):
        if word.startswith("-"):
            flag, equals, value = _parted(word)
            found[_SHORT_FLAGS.get(flag, flag)] = value if equals else following
    return found


def _parted(word: str) -> tuple[str, str, str]:
    """--flag as vLLM documents it, "=" or "", and the value behind that."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-"), equals, value
