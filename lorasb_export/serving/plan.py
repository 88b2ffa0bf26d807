"""What one server will serve, verified before anything is started, and the vLLM command line for it."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.device import cpu_multiplies
from ..base.model import BaseModel
from ..base.tensors import WEIGHT_INDEX, weight_map
from ..belonging import of_one_basis
from ..choices import ServingMode, require_choice
from ..errors import BaseModelError, OutputError, SettingsError
from ..files.storage import read_json
from ..other_base import warn_of_another_template, warn_of_other_weights
from . import flags
from .choosing import choose_mode
from .listening import is_loopback
from .memory import memory_of
from .modes import Mode
from .servable import load_servable
from .shared import runs_on_cpu, vllm_version
from .temporary import PREFIX

logger = logging.getLogger(__name__)

_ASKS_FOR_KEY = f"{__package__}.key.AsksForKey"
_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
# Switches of vLLM's that stay off, whatever is exported → what to do instead.
_SWITCHES = {
    _UPDATING: "give --allow-updates",  # with it vLLM loads any path for clients
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "a server whose engine has died ends",
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "a name that is not served is not answered by the base",
}
_IMITATED = (
    "this CPU cannot multiply numbers of 16 bits, and vLLM imitates it: with --dtype float32 it reads prompts several "
    "times as fast, for twice the memory of the weights"
)
_MISTRALS_OWN = "consolidated*.safetensors"  # the same weights in the format of their maker
DRAIN_SECONDS = 20  # vLLM's own default is 0, and drops every running request when it is asked to end


@dataclass(frozen=True)
class ServePlan:
    """A base model, the adapters on it (a merged model has none), and how vLLM is told."""

    base: BaseModel
    mode: Mode
    names: Sequence[str]
    host: str
    port: int
    dtype: str
    extra: Sequence[str]
    has_key: bool

    def command(self, folder: str | Path) -> list[str]:
        """vLLM's command line for the adapters written to `folder`; of a flag given twice vLLM takes the last.

        The module is started and not `vllm serve`, which does not start when vLLM is installed under another
        distribution name, as its CPU build is.
        """
        # -P: or a file of the working folder that is called as a package is would be imported in its place.
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.base.folder), flags.SERVED_NAMES, _base_name(self.base)]
        command += ["--host", self.host, "--port", str(self.port), "--dtype", self.dtype]
        command += ["--shutdown-timeout", str(DRAIN_SECONDS)]
        if any(self.base.folder.glob(_MISTRALS_OWN)):  # or vLLM would read those weights, and that config and tokenizer
            command += ["--config-format", "hf", "--tokenizer-mode", "hf", "--load-format", "hf"]
        command += self.mode.flags(folder)
        if self.has_key:
            command += ["--middleware", _ASKS_FOR_KEY]  # behind the mode's own, and so asked before it
        command += self.extra
        if _penalizes_repetition(self.base):  # as `evaluate` and ONNX leave it out: it was made for chats
            command += flags.without_penalty(self.extra)
        return command

    def environment(self, folder: str | Path) -> dict[str, str]:
        """Variables for the server: the mode's, one of vLLM's, and some where the user has not set them."""
        wanted = {"VLLM_NO_USAGE_STATS": "1"}  # a server tells nobody that it runs unless its owner says so
        if runs_on_cpu():
            # GiB. vLLM would take nine tenths of the machine, or refuse to start when they are not free; and with
            # a fixed size it skips a warm-up of the model.
            wanted["VLLM_CPU_KVCACHE_SPACE"] = "4"
            wanted["THP_MEM_ALLOC_ENABLE"] = "1"  # large pages, so that fewer addresses of weights and R are looked up
        wanted = {name: value for name, value in wanted.items() if name not in os.environ}
        off = {name: "0" for name in _SWITCHES if name == _UPDATING or name in os.environ}
        return self.mode.environment(folder) | off | wanted

    @property
    def drain(self) -> int:
        """For how many seconds vLLM lets running requests finish when it is asked to end."""
        given = flags.number(self.extra, "--shutdown-timeout")
        return DRAIN_SECONDS if given is None else given

    @property
    def is_float32(self) -> bool:
        """Whether vLLM computes in fp32; `auto` turns an fp32 checkpoint into 16 bits."""
        return flags.values(self.extra).get("--dtype", self.dtype) in ("float32", "float")

    def describe(self) -> dict[str, Any]:
        """What a dry run reports; `TEMPORARY` in the command stands for the folder the server reads them from.

        What this machine lacks for a start is a warning: it may not be the one that serves.
        """
        if vllm_version() is None:  # and by which mode it would be there, and with how much room, is not known
            logger.warning("Here it would not start: vLLM is not installed")
        else:
            try:
                self.mode.require_room(Path(tempfile.gettempdir()))
            except OutputError as error:
                logger.warning("Here it would not start: %s", error)
        return {
            "mode": self.mode.name,
            "command": self.command("TEMPORARY"),
            "environment": self.environment("TEMPORARY"),
            "models": [*flags.served_names(self.extra, _base_name(self.base)), *self.names],
            "memory": memory_of(self.mode, 4 if self.is_float32 else 2, self.base),
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
    updates_from: Path | None,
    has_key: bool,
    pass_over: bool = False,
) -> ServePlan:
    """Check the settings, then load and check every adapter, its basis, and that the base is theirs.

    Args:
        pass_over: as of `launcher.serve`.

    Raises:
        LoraSBError: SettingsError, or for adapters, all reported at once, of the kind of the first problem.
    """
    if not adapters and model is None:
        raise SettingsError("nothing to serve", fix="Name adapters with --adapters, or a merged folder with --model")
    require_choice("mode", mode, ServingMode)
    flags.refuse_bad(extra)
    if adapters:
        flags.refuse_beside_adapters(extra)
    if updates_from is not None and not has_key:
        fix = "Set VLLM_API_KEY in the environment, or --api-key-file: who has the key may load adapters"
        raise SettingsError("updates need an API key", where="--allow-updates", fix=fix)
    if not has_key and not is_loopback(host):
        fix = "set VLLM_API_KEY or --api-key-file, or keep to 127.0.0.1 behind a proxy"
        logger.warning("Listening on %s without a key: %s", host, fix)
    base, loaded = load_servable(adapters, model, pass_over=pass_over)
    if same := next((name for name in flags.served_names(extra, _base_name(base)) if name in loaded), None):
        named_twice = SettingsError(f"{same!r} is the name of the base and of an adapter", fix="Rename the adapter")
        if not pass_over or len(loaded) == 1:
            raise named_twice
        logger.warning("Passed over: %s", named_twice)
        del loaded[same]
    if pass_over and (mode == "shared" or updates_from is not None):
        loaded = of_one_basis(loaded)
    if loaded and "," in tempfile.gettempdir():
        fix = "Set TMPDIR to another folder"
        raise SettingsError("vLLM reads no path with a comma", where=tempfile.gettempdir(), fix=fix)
    warn_of_another_template(loaded.values(), base.folder)
    warn_of_other_weights(loaded.values())
    chosen = choose_mode(mode, base, loaded, extra, updates_from)
    plan = ServePlan(base, chosen, list(loaded), host, port, dtype, extra, has_key)
    _check_weights(plan)
    _check_dtype(plan)
    _check_length(plan)
    if runs_on_cpu() and not plan.is_float32 and not cpu_multiplies(torch.bfloat16):
        logger.warning(_IMITATED)
    for switch, instead in _SWITCHES.items():
        if os.environ.get(switch, "0") != "0":
            logger.warning("%s has no effect here: %s", switch, instead)
    return plan


def _check_dtype(plan: ServePlan) -> None:
    """Refuse fp32 where vLLM would end at its start: its LoRA kernel for accelerators takes 16 bits and no more."""
    if plan.names and plan.mode.name == "folded" and plan.is_float32 and not runs_on_cpu():
        fix = "Use --dtype bfloat16 or float16"
        raise SettingsError("on an accelerator vLLM applies adapters in 16 bits only", where="--dtype float32", fix=fix)


def _check_length(plan: ServePlan) -> None:
    """Refuse more names and paths than the system hands to a process: they are all on vLLM's command line."""
    folder = os.path.join(tempfile.gettempdir(), f"{PREFIX}12345678")
    variables = os.environ | plan.environment(folder)
    words = [*plan.command(folder), *(f"{name}={value}" for name, value in variables.items())]
    size = sum(len(os.fsencode(word)) + 9 for word in words)  # each with the zero at its end and a pointer to it
    # Linux takes 6 MiB at most, whatever it says it does; and some room for the few variables that are set besides.
    limit = min(os.sysconf("SC_ARG_MAX"), 6 << 20) - 4096
    if size > limit:
        what = f"vLLM's command for {len(plan.names)} adapters is {size:,} bytes, longer than this system's {limit:,}"
        raise SettingsError(what, fix="Serve fewer, under shorter names, with a shorter TMPDIR, or raise `ulimit -s`")


def _check_weights(plan: ServePlan) -> None:
    """Raise BaseModelError where vLLM would read other files than those that the fingerprint is of: those that an index
    names, or else all there are."""
    folder = plan.base.folder
    index, ours = folder / WEIGHT_INDEX, {path.name for path, _ in plan.base.tensors.values()}
    read = set(weight_map(index).values()) if index.is_file() else {path.name for path in folder.glob("*.safetensors")}
    if others := sorted(read - ours):
        what = "vLLM would read weights twice" + (f", those of {WEIGHT_INDEX} too" if index.is_file() else "")
        fix = f"Serve a folder without {others[0]}, for example a merged model, or a copy of this one"
        raise BaseModelError(what, where=folder / others[0], fix=fix)


def _penalizes_repetition(base: BaseModel) -> bool:
    """Whether vLLM would, in requests that name no penalty: the base's generation_config.json has one."""
    path = base.folder / "generation_config.json"
    return path.is_file() and read_json(path).get("repetition_penalty", 1.0) != 1.0


def _base_name(base: BaseModel) -> str:
    """Its Hub id, or the name of its folder."""
    return base.folder.name if base.name_or_path == str(base.folder) else base.name_or_path
