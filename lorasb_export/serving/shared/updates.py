"""Adapters added, replaced and removed while requests run: an ASGI middleware, by vLLM's own flag `--middleware`.

It answers vLLM's two paths itself, so that vLLM's development switch for them stays off. The key was asked for before
(`AsksForKey`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from ...basis import Basis
from ...errors import ArtifactError, LoraSBError, OutputError, ServerError, SettingsError, first_line
from ...files.kind import ADAPTER_FILES
from ...files.output import cannot_write
from ...files.storage import parse_json, real
from ...format import read_adapter_config
from ...hub.cache import leads_out
from ...names import name_problem, served_name_problem
from ...other_base import told_of_another_template, told_of_other_weights
from . import BASE_VARIABLE, BASIS_VARIABLE, UPDATES_VARIABLE, VERSIONS_VARIABLE
from .loading import copy_adapter, load_R
from .versions import Versions

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, for its handlers, its level and its stamp

_HEADER_BYTES, _CONFIG_BYTES = 512, 1 << 20  # more than one tensor's entry, or a config, ever takes
_REQUEST_BYTES = 1 << 16
_SECONDS = 1.0  # between two looks at whether the engine lives, while it loads
_REQUEST = 'Send {"lora_name": NAME} or {"lora_name": NAME, "lora_path": FOLDER}'
_FOLDER = "Name a folder in the adapters' folder that holds a whole adapter of this basis, without links out of it"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class Updates:
    """Takes adapters from one folder, by a copy of each version: an engine that reads it again finds the same."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.source = Path(os.environ[UPDATES_VARIABLE])
        self.versions = Versions(Path(os.environ[VERSIONS_VARIABLE]))
        self.basis = Basis.open(os.environ[BASIS_VARIABLE])
        self.largest = len(self.basis.modules) * (4 * self.basis.rank**2 + _HEADER_BYTES) + _CONFIG_BYTES
        self.one_at_a_time = asyncio.Lock()
        self.base = Path(os.environ[BASE_VARIABLE])
        self._warned: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ours = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in (LOAD, UNLOAD)
        if not ours:
            await self.app(scope, receive, send)
            return
        models = scope["app"].state.openai_serving_models
        update, verb = (self._load, "load") if scope["path"] == LOAD else (self._unload, "unload")
        body: dict[str, str] = {}
        try:
            body = await _read(Request(scope, receive))
            async with self.one_at_a_time:
                status, answer = await update(models, body)
        except ServerError as error:
            status, answer = 503, {"message": str(error)}
        except OutputError as error:  # the disk is full, of which the client is innocent
            status, answer = 507, {"message": str(error)}
        except LoraSBError as error:
            status, answer = 400, {"message": str(error)}
        if status != 200:  # cut short: both may be as long as the client likes
            name = body.get("lora_name", "")
            logger.warning("did not %s %.100r, status %d: %.500s", verb, name, status, answer["message"])
        await JSONResponse(answer, status)(scope, receive, send)

    async def _load(self, models: Any, body: dict[str, str]) -> tuple[int, dict[str, str]]:
        from vllm.lora.request import LoRARequest

        name = body["lora_name"]
        if problem := served_name_problem(name):
            raise SettingsError(problem, fix="Give another lora_name")
        if models.is_base_model(name):
            raise SettingsError(f"{name!r} is the name of the base", fix="Give another lora_name")
        path, told = await asyncio.to_thread(self._keep, name, self._find(body.get("lora_path", name)))
        before = models.lora_requests.get(name)
        if before is not None and before.lora_path == str(path):  # sent again, as to replicas of which some have it
            return 200, {"message": f"loaded {name}", "version": path.name}
        # A new id each time: what runs goes on with the version it began with, which ages out of the engine.
        request = LoRARequest(name, models.lora_id_counter.inc(1), str(path))
        try:
            await _add(models.engine_client, request)
            models.lora_requests[name] = request
        finally:  # the copy of one that is refused goes too, an hour later
            await self._sweep(models)
        if before is None:
            logger.info("loaded %s: version %s", name, path.name)
        else:
            logger.info("replaced %s: version %s, before %s", name, path.name, _version(before))
        for words in told - self._warned:  # once for a name, not every night that brings a new version
            logger.warning(words)
        self._warned |= told
        return 200, {"message": f"loaded {name}", "version": path.name}

    async def _unload(self, models: Any, body: dict[str, str]) -> tuple[int, dict[str, str]]:
        name = body["lora_name"]
        before = models.lora_requests.pop(name, None)
        if before is None:
            return 404, {"message": f"no adapter {name!r} is loaded"}
        logger.info("unloaded %s: version %s", name, _version(before))
        await self._sweep(models)
        return 200, {"message": f"unloaded {name}", "version": _version(before)}

    async def _sweep(self, models: Any) -> None:
        await asyncio.to_thread(self.versions.sweep, {request.lora_path for request in models.lora_requests.values()})

    def _find(self, path: str) -> Path:
        if name_problem(path):
            raise SettingsError(f"{path!r:.120} is not the name of a folder in the adapters' folder", fix=_FOLDER)
        source = real(self.source)  # at each load: a release may be a link that is switched
        folder = source / path
        try:
            self._check(path, folder, source)
        except OSError as error:
            what = f"{path!r} cannot be read: {error.strerror}"
            raise ArtifactError(what, fix="Check who may read it, and that it is not being replaced") from None
        return folder

    def _check(self, path: str, folder: Path, source: Path) -> None:
        for item in (folder, *(folder / file for file in ADAPTER_FILES)):
            if leads_out(item, source):
                raise SettingsError(f"{path!r} leads out of the adapters' folder", fix=_FOLDER)
            if not (item.is_dir() if item == folder else item.is_file()):
                what = f"{path!r} has no {item.name}" if item != folder else f"no adapter {path!r}"
                raise ArtifactError(what, fix=_FOLDER)
            if item != folder and item.stat().st_size > self.largest:  # before a byte of it is copied
                raise ArtifactError(f"{item.name} of {path!r} is larger than any adapter of this basis", fix=_FOLDER)

    def _keep(self, name: str, folder: Path) -> tuple[Path, set[str]]:
        """A checked copy of `folder`, at a path that names its content; and the warnings that the start would give."""
        with (
            cannot_write(self.versions.folder.parent, "Set TMPDIR to a larger disk"),
            tempfile.TemporaryDirectory(dir=self.versions.folder.parent) as temporary,
        ):
            copy = Path(temporary, name)
            copy_adapter(folder, copy)
            load_R(copy, self.basis)
            said = [(name, read_adapter_config(copy)["training"])]
            told = {told_of_other_weights(said), told_of_another_template(said, self.base)}
            return self.versions.keep(name, copy), {words for words in told if words}


def _version(request: Any) -> str:
    return Path(request.lora_path).name


async def _add(engine: Any, request: Any) -> None:
    """Load an adapter.

    Raises:
        ServerError: the engine has died, or dies meanwhile, of which vLLM tells no caller.
        ArtifactError: the engine refuses it.
    """
    dead = ServerError("the engine has died", fix="Start the server again; its log says why")
    adding = asyncio.ensure_future(engine.add_lora(request))
    while not (await asyncio.wait({adding}, timeout=_SECONDS))[0]:
        if engine.errored:
            adding.cancel()
            raise dead
    try:
        adding.result()
    except Exception as error:
        if engine.errored:
            raise dead from None
        raise ArtifactError(f"the engine refuses it: {first_line(error)}", fix=_FOLDER) from None


async def _read(request: Request) -> dict[str, str]:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > _REQUEST_BYTES:
            raise SettingsError(f"the request has more than {_REQUEST_BYTES} bytes", fix=_REQUEST)
    try:
        body = parse_json(bytes(content))
    except ValueError as error:
        raise SettingsError(f"the request is not a JSON object: {error}", fix=_REQUEST) from None
    if "lora_name" not in body or not all(isinstance(v, str) for v in body.values()):
        raise SettingsError("lora_name is missing, or a value is not a string", fix=_REQUEST)
    return body
