"""What one server will serve, verified before anything is started, and the vLLM command line for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import Adapter, Basis
from ..base import SEQ_CLS, BaseModel, default_device
from ..errors import LoraSBError, OutputError, SettingsError
from ..export.peft import write_folded
from ..names import check_name

_MODES = ("folded", "shared")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Given by this package, or they would put the server where it is not looked for.
_OUR_FLAGS = {"--model", "--host", "--port", "--uds", "--lora-modules", "--ssl-keyfile", "--ssl-certfile"}


@dataclass(frozen=True)
class ServePlan:
    """A base model, the adapters that will be folded onto it (a merged model has none), and how vLLM is told."""

    base: BaseModel
    adapters: Mapping[str, Adapter]
    host: str
    port: int
    dtype: str
    extra: Sequence[str]

    @property
    def base_name(self) -> str:
        """The base's Hub id, or the name of its folder."""
        is_folder = self.base.name_or_path == str(self.base.folder)
        return self.base.folder.name if is_folder else self.base.name_or_path

    @property
    def max_rank(self) -> int:
        """The smallest rank vLLM knows that holds every adapter's."""
        rank = max(adapter.rank for adapter in self.adapters.values())
        return next(allowed for allowed in _VLLM_RANKS if allowed >= rank)

    @property
    def slots(self) -> int:
        # vLLM's CPU kernel reads "no adapter" (-1) as the last slot, so requests for the base would get whatever
        # adapter lies there. One slot that is never filled holds zeros and makes them right.
        return len(self.adapters) + (default_device().type == "cpu")

    def fold(self, folder: Path) -> None:
        """Write each adapter as an ordinary LoRA to `folder`/NAME. Raises OutputError when the disk is full."""
        for name, adapter in self.adapters.items():
            try:
                (folder / name).mkdir()
                write_folded(adapter, folder / name)
            except OSError as error:
                raise OutputError(
                    f"cannot write the folded adapter {name}: {error}", where=folder, fix="Set TMPDIR to a larger disk"
                ) from None

    def command(self, folder: str | Path) -> list[str]:
        """vLLM's command line for the adapters folded in `folder`; of a flag given twice vLLM takes the last.

        The module is started and not `vllm serve`, which does not start when vLLM is installed under another
        distribution name, as its CPU build is.
        """
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.base.folder), "--served-model-name", self.base_name]
        command += ["--host", self.host, "--port", str(self.port), "--dtype", self.dtype]
        if self.adapters:
            # Without the list of modules vLLM also sets aside room for an adapter of the embedding, per slot.
            suffixes = {name.rpartition(".")[2] for adapter in self.adapters.values() for name in adapter.R}
            command += ["--enable-lora", "--max-loras", str(self.slots), "--max-lora-rank", str(self.max_rank)]
            command += ["--lora-target-modules", *sorted(suffixes)]
            command += ["--lora-modules", *(f"{name}={Path(folder) / name}" for name in self.adapters)]
        return [*command, *self.extra]

    def environment(self) -> dict[str, str]:
        """Variables for the server, where the user has not set them."""
        wanted = {"VLLM_NO_USAGE_STATS": "1"}  # a server tells nobody that it runs unless its owner says so
        if default_device().type == "cpu":
            # GiB. vLLM would take nine tenths of the machine, or refuse to start when they are not free; and with
            # a fixed size it skips a warm-up of the model.
            wanted["VLLM_CPU_KVCACHE_SPACE"] = "4"
        return {name: value for name, value in wanted.items() if name not in os.environ}

    def memory(self) -> dict[str, int]:
        """Bytes the adapters take: in vLLM's `slots`, in its copies in host memory, and folded on disk."""
        if not self.adapters:
            return {"slots": 0, "slots_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
        widths: dict[str, int] = {}  # module → in + out
        numbers = 0
        for adapter in self.adapters.values():
            for name, module in adapter.load_basis().modules.items():
                widths[name] = module.B.shape[0] + module.A.shape[1]
                numbers += adapter.rank * widths[name]
        dtype = _flags(self.extra).get("--dtype", self.dtype)
        size = 4 if dtype in ("float32", "float") else 2  # `auto` turns an fp32 checkpoint into 16 bits
        slot = size * self.max_rank * sum(widths.values())
        return {
            "slots": self.slots,
            "slots_bytes": self.slots * slot,
            "host_bytes": size * numbers,
            "disk_bytes": 4 * numbers,
        }

    def describe(self) -> dict[str, Any]:
        """What a dry run reports; `TEMPORARY` in the command stands for the folder of the folded adapters."""
        return {
            "command": self.command("TEMPORARY"),
            "environment": self.environment(),
            "models": [self.base_name, *self.adapters],
            "memory": self.memory(),
        }


def make_plan(
    adapters: Mapping[str, str | Path],
    *,
    model: str | None,
    mode: str,
    host: str,
    port: int,
    dtype: str,
    extra: Sequence[str],
) -> ServePlan:
    """Check the settings, then load and check every adapter, its basis, and that the base is theirs.

    Raises:
        LoraSBError: SettingsError, or for adapters, all reported at once, of the kind of the first problem.
    """
    _check_settings(adapters, model, mode, extra)
    loaded: dict[str, Adapter] = {}
    bases: dict[str, Basis] = {}  # adapters of one basis share it
    base = None if model is None else BaseModel.resolve(model)
    problems: list[tuple[str, LoraSBError]] = []
    for name, source in adapters.items():
        try:
            adapter = Adapter.load(source)
            _check_servable(adapter)
            adapter.basis = bases.get(adapter.basis_sha256)
            bases[adapter.basis_sha256] = adapter.load_basis()
            base = base or adapter.base.resolve()
            base.verify(adapter.base, adapter.R)
        except LoraSBError as error:
            problems.append((name, error))
        else:
            loaded[name] = adapter
    if problems:
        lines = "\n".join(f"  {name}: {error}" for name, error in problems)
        raise type(problems[0][1])(f"{len(problems)} of {len(adapters)} adapters cannot be served:\n{lines}")
    assert base is not None  # given, or found by the first adapter
    plan = ServePlan(base, loaded, host, port, dtype, extra)
    if plan.base_name in loaded:
        raise SettingsError(f"{plan.base_name!r} is the name of the base and of an adapter", fix="Rename the adapter")
    return plan


def _check_settings(adapters: Mapping[str, Any], model: str | None, mode: str, extra: Sequence[str]) -> None:
    if not adapters and model is None:
        raise SettingsError("nothing to serve", fix="Name adapters with --adapters, or a merged folder with --model")
    if problem := next(filter(None, map(check_name, adapters)), None):
        raise SettingsError(problem)
    if mode not in _MODES:
        raise SettingsError(f"unknown mode {mode!r}", where="--mode", fix=f"Use one of: {', '.join(_MODES)}")
    if mode == "shared":
        fix = "Use --mode folded: the same answers from stock vLLM, with a full LoRA in memory for each adapter"
        raise SettingsError("the shared-basis engine is not in this release", where="--mode shared", fix=fix)
    given = _flags(extra)
    if "--api-key" in given:
        fix = "Set VLLM_API_KEY in the environment: a command line can be read by every user of this machine"
        raise SettingsError("an API key on the command line", where="--api-key", fix=fix)
    if taken := sorted(_OUR_FLAGS & set(given)):
        fix = "Use the option of `lorasb serve`, or a reverse proxy for TLS and sockets"
        raise SettingsError("not a flag to hand to vLLM here", where=", ".join(taken), fix=fix)
    loras = given.get("--max-loras", "")
    if loras.isdigit() and int(loras) <= len(adapters) and default_device().type == "cpu":
        fix = f"Give at least {len(adapters) + 1}: vLLM's CPU kernel would apply an adapter to the base's answers"
        raise SettingsError(f"--max-loras {loras} for {len(adapters)} adapters on a CPU", fix=fix)


def _check_servable(adapter: Adapter) -> None:
    if adapter.task_type == SEQ_CLS:
        fix = "Use `lorasb merge` or `lorasb export --format onnx`"
        raise SettingsError("a classifier, and this server generates text", where=adapter.folder, fix=fix)
    if adapter.rank > _VLLM_RANKS[-1]:
        fix = "Use `lorasb merge` and serve the merged folder with --model"
        raise SettingsError(f"rank {adapter.rank}, vLLM takes at most {_VLLM_RANKS[-1]}", where=adapter.folder, fix=fix)


def _flags(extra: Sequence[str]) -> dict[str, str]:
    """--flag → its value (or "") among `extra`, for both `--flag value` and `--flag=value`."""
    found = {}
    for word, following in zip(extra, [*extra[1:], ""], strict=False):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag.replace("_", "-")] = value if equals else following
    return found
