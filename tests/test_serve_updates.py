"""Adapters that are loaded while the server runs: what it takes, answers, keeps and removes."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from lorasb_export.adapter import Adapter
from lorasb_export.data.trained_template import TEMPLATE_KEY, template_sha256
from lorasb_export.errors import SettingsError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import read_adapter_config, sealed
from lorasb_export.serving import plan, shared
from lorasb_export.serving.shared.loading import copy_adapter, version_name
from lorasb_export.serving.shared.versions import Versions
from tests import serving
from tests.serving import DEFAULTS, answer_of, answered, dry_run, middlewares_of, value_of

adapter, folder = serving.adapter, serving.folder
plugin, siblings, vllm_for_cpus = serving.plugin, serving.siblings, serving.vllm_for_cpus


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What vLLM's server knows of its models, with an engine that loads everything, and a folder for versions."""
    (tmp_path / "versions").mkdir()

    def request(name: str, number: int, path: str) -> SimpleNamespace:
        return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)

    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=request))  # type: ignore[arg-type]
    models = Mock(engine_client=Mock(add_lora=AsyncMock()), lora_requests={})
    models.is_base_model.return_value = False
    return models


def scope_of(models: Any, path: str = "/v1/load_lora_adapter") -> dict[str, Any]:
    """A request's, as vLLM's server would hand it on."""
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))
    return {"type": "http", "method": "POST", "path": path, "headers": [], "app": app}


@pytest.mark.usefixtures("plugin")
def test_updates_need_a_key_and_a_shared_basis(
    folder: Path, siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(SettingsError, match="updates need an API key"):
        dry_run(siblings, updates_from=folder)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    described = dry_run(siblings, updates_from=folder)
    assert value_of(described["command"], "--max-loras") == str(2 + 32)
    middlewares = [
        "lorasb_export.serving.shared.updates.Updates",
        "lorasb_export.serving.key.AsksForKey",
    ]  # asked first
    assert middlewares_of(described["command"]) == middlewares
    assert described["environment"]["LORASB_UPDATES_FROM"] == str(folder)
    assert described["environment"]["LORASB_BASE"] == str(folder / "base")
    monkeypatch.delenv("VLLM_API_KEY")
    (folder / "key").write_text("s3cret\n")
    described = dry_run(siblings, updates_from=folder, api_key_file=folder / "key")
    assert "s3cret" not in json.dumps(described)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with pytest.raises(SettingsError, match="only adapters on a shared basis"):
        dry_run(siblings, updates_from=folder, mode="folded")
    with pytest.raises(SettingsError, match=r"of 2 bases \(--mode shared\)\. Leave --allow-updates out"):
        dry_run({"a": folder / "a", "b": folder / "b"}, updates_from=folder)
    assert dry_run(siblings, updates_from=folder, extra=["-dp", "1"])["mode"] == "shared"
    for several in (["--data-parallel-size=2"], ["-dp", "2"], ["-dp=2"]):
        with pytest.raises(SettingsError, match="beside --data-parallel-size"):
            dry_run(siblings, updates_from=folder, extra=several)


@pytest.mark.usefixtures("plugin")
def test_what_was_served_from_the_start_is_removed_like_other_versions(
    siblings: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**DEFAULTS, "updates_from": tmp_path, "has_key": True}
    mode = plan.make_plan(siblings, **options).mode
    served = tmp_path / "served"
    served.mkdir()
    mode.write(served)
    versions = Path(mode.environment(served)["LORASB_VERSIONS"])
    flags = mode.flags(served)
    assert sorted(path.name for path in versions.iterdir()) == sorted(
        Path(word.partition("=")[2]).name for word in flags if word.startswith(("a=", "second="))
    )
    assert [path.name for path in served.iterdir()] == [versions.name]


def test_a_version_is_kept_while_it_may_be_read(adapter: Adapter, tmp_path: Path) -> None:
    """Two versions of one name: the one that no name stands for goes when its time is over, and not before."""
    assert adapter.folder is not None
    (tmp_path / "updates").mkdir()
    versions = Versions(tmp_path / "updates", seconds=0.2)
    paths = []
    for scaling in (1.0, 2.0):
        copy = tmp_path / "copy"
        copy_adapter(adapter.folder, copy)
        write_json(copy / "adapter_config.json", sealed(read_json(copy / "adapter_config.json") | {"scaling": scaling}))
        paths.append(versions.keep("a", copy))
    old, new = paths
    versions.sweep([str(new)])
    assert old.is_dir()
    time.sleep(0.3)
    versions.sweep([str(old), str(new)])  # it was loaded again
    versions.sweep([str(new)])
    assert old.is_dir()
    time.sleep(0.3)
    versions.sweep([str(new)])
    assert not old.exists()
    assert (new / "adapter.safetensors").is_file()


def test_the_disk_holds_an_adapter_once_under_however_many_names(adapter: Adapter, tmp_path: Path) -> None:
    assert adapter.folder is not None
    (tmp_path / "updates").mkdir()
    versions, copy = Versions(tmp_path / "updates", seconds=0), tmp_path / "copy"
    kept = []
    for name, scaling in (("a", 1.0), ("b", 1.0), ("b-c", 1.0), ("d", 2.0)):
        copy_adapter(adapter.folder, copy)
        write_json(copy / "adapter_config.json", sealed(read_json(copy / "adapter_config.json") | {"scaling": scaling}))
        kept.append(versions.keep(name, copy))
    a, b, c, of_another_content = (path / "adapter_config.json" for path in kept)
    assert len(set(kept)) == 4  # vLLM's prefix cache goes by the path
    assert a.samefile(b)
    assert b.samefile(c)
    assert not a.samefile(of_another_content)
    assert (a.parent / "adapter.safetensors").samefile(b.parent / "adapter.safetensors")
    b.with_name("adapter.safetensors").unlink()  # by what cleans folders of temporary files
    copy_adapter(adapter.folder, copy)
    write_json(copy / "adapter_config.json", sealed(read_json(copy / "adapter_config.json") | {"scaling": 1.0}))
    of_e = versions.keep("e", copy)
    assert {path.name for path in of_e.iterdir()} >= {"adapter.safetensors", "adapter_config.json"}
    for _ in range(2):
        versions.sweep([str(path) for path in kept[1:]])
    assert not a.exists()
    assert read_adapter_config(b.parent)["scaling"] == 1.0  # of which it was once a copy


@pytest.mark.parametrize(
    ("authorization", "body", "status"),
    [
        ("Bearer s3cret", b"[" * 100_000, 400),
        ("Bearer s3cret", b'{"lora_name": "x", "lora_name": "y"}', 400),
        ("Bearer s3cret", b"\xff", 400),
        ("Bearer s3cret", b'{"lora_name": "text"}', 400),
        ("bearer s3cret", b"{", 400),  # vLLM takes the scheme in any case
        ("Bearer S3CRET", b"{", 401),
        ("Basic s3cret", b"{", 401),
        ("", b"{", 401),
    ],
)
def test_a_bad_request_for_an_update_is_answered(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authorization: str, body: bytes, status: int
) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.key import AsksForKey
    from lorasb_export.serving.shared.updates import LOAD, Updates

    variables = {
        shared.BASIS_VARIABLE: "a",
        shared.UPDATES_VARIABLE: "",
        shared.VERSIONS_VARIABLE: "versions",
        shared.BASE_VARIABLE: "base",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": LOAD}
    scope["headers"] = [(b"authorization", authorization.encode())]
    scope["app"] = SimpleNamespace(state=SimpleNamespace(openai_serving_models=None))
    assert answered(AsksForKey(Updates(Response())), scope, body) == status


@pytest.mark.parametrize(("path", "status"), [("loop", 400), ("linked", 400), ("a", 507), ("of-the-hub", 507)])
def test_a_full_disk_is_the_servers_fault_and_a_link_to_itself_or_out_the_clients(
    adapter: Adapter,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: int,
) -> None:
    """Of a folder of the Hub's cache every file is a link into its store."""
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.shared.updates import LOAD, Updates

    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, store in (("linked", "store"), ("of-the-hub", "blobs")):
        files = shutil.copytree(tmp_path / "a", tmp_path_factory.mktemp("elsewhere") / store)
        (tmp_path / name).mkdir()
        for file in files.iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "versions").mkdir()
    variables = {
        shared.BASIS_VARIABLE: "a",
        shared.UPDATES_VARIABLE: "",
        shared.VERSIONS_VARIABLE: "versions",
        shared.BASE_VARIABLE: "base",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    models = SimpleNamespace(is_base_model=lambda name: False)
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": LOAD, "headers": []}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))
    body = json.dumps({"lora_name": "x", "lora_path": path}).encode()
    assert answered(Updates(Response()), scope, body) == status


def test_a_load_is_answered_when_the_engine_dies_meanwhile(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM leaves it waiting, and then does not end."""
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.shared import updates

    class Engine:
        errored = refuses = False

        async def add_lora(self, request: Any) -> None:
            if self.errored or self.refuses:
                raise RuntimeError("R has values beyond float16's")
            self.errored = True
            await asyncio.get_running_loop().create_future()

    variables = {
        shared.BASIS_VARIABLE: "a",
        shared.UPDATES_VARIABLE: "",
        shared.VERSIONS_VARIABLE: "versions",
        shared.BASE_VARIABLE: "base",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(updates, "_SECONDS", 0.1)
    models.engine_client = Engine()
    app = updates.Updates(Response())
    for _ in range(2):  # the next is refused by vLLM itself
        assert answered(app, scope_of(models), b'{"lora_name": "a"}') == 503
    models.engine_client.errored, models.engine_client.refuses = False, True
    status, answer = answer_of(app, scope_of(models), b'{"lora_name": "a"}')
    assert (status, "the engine refuses it: R has values beyond float16's" in json.dumps(answer)) == (400, True)
    assert not models.lora_requests


def test_the_copies_of_what_the_engine_refuses_are_removed_too(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing else changes: a client may send one after the other."""
    app, config = logged_updates(tmp_path, monkeypatch), tmp_path / "a" / "adapter_config.json"
    app.versions = Versions(tmp_path / "versions", seconds=0)
    assert answered(app, scope_of(models), b'{"lora_name": "a"}') == 200
    served = Path(models.lora_requests["a"].lora_path)
    models.engine_client.errored = False
    models.engine_client.add_lora.side_effect = RuntimeError("R has values beyond float16's")
    for scaling in (0.25, 0.5, 0.75):
        write_json(config, sealed(read_json(config) | {"scaling": scaling}))
        assert answered(app, scope_of(models), b'{"lora_name": "a"}') == 400
        refused = tmp_path / "versions" / version_name("a", tmp_path / "a")
        assert {*(tmp_path / "versions").iterdir()} == {served, refused}


def test_a_link_to_the_adapters_is_followed_at_each_load(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a release is a folder of its own, and `current` a link to the newest."""
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.shared.updates import Updates

    sources = []
    for release, scaling in (("1", 1.0), ("2", 2.0)):
        copy = shutil.copytree(tmp_path / "a", tmp_path / release / "billing")
        write_json(copy / "adapter_config.json", sealed(read_json(copy / "adapter_config.json") | {"scaling": scaling}))
        sources.append(copy)
    variables = {
        shared.BASIS_VARIABLE: "a",
        shared.UPDATES_VARIABLE: "current",
        shared.VERSIONS_VARIABLE: "versions",
        shared.BASE_VARIABLE: "base",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "current").symlink_to("1")
    app = Updates(Response())
    for source in sources:
        (tmp_path / "current").unlink()
        (tmp_path / "current").symlink_to(source.parent.name)
        assert answered(app, scope_of(models), b'{"lora_name": "billing"}') == 200
        loaded = Path(models.lora_requests["billing"].lora_path)
        assert read_json(loaded / "adapter_config.json") == read_json(source / "adapter_config.json")


def logged_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As it is started beside the adapter `a`."""
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.shared import updates

    variables = {
        shared.BASIS_VARIABLE: "a",
        shared.UPDATES_VARIABLE: "",
        shared.VERSIONS_VARIABLE: "versions",
        shared.BASE_VARIABLE: "base",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    assert updates.logger.name.startswith("vllm.")  # the one that its server has handlers for
    monkeypatch.setattr(updates, "logger", logging.getLogger("updates"))
    return updates.Updates(Response())


def test_every_change_is_logged_with_its_version(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app, config = logged_updates(tmp_path, monkeypatch), tmp_path / "a" / "adapter_config.json"
    from lorasb_export.serving.shared import updates

    caplog.set_level(logging.INFO)
    versions, load, unload = [], scope_of(models), scope_of(models, updates.UNLOAD)
    for scaling in (1.0, 2.0):
        write_json(config, sealed(read_json(config) | {"scaling": scaling}))
        versions.append(version_name("a", tmp_path / "a"))
        assert answer_of(app, load, b'{"lora_name": "a"}') == (200, {"message": "loaded a", "version": versions[-1]})
    assert answer_of(app, unload, b'{"lora_name": "a"}') == (200, {"message": "unloaded a", "version": versions[-1]})
    answered(app, unload, b'{"lora_name": "a"}')
    answered(app, load, json.dumps({"lora_name": "a" * 200 + "\n"}).encode())
    answered(app, load, b"{")
    said = [record.getMessage() for record in caplog.records]
    assert said[:4] == [
        f"loaded a: version {versions[0]}",
        f"replaced a: version {versions[1]}, before {versions[0]}",
        f"unloaded a: version {versions[1]}",
        "did not unload 'a', status 404: no adapter 'a' is loaded",
    ]
    assert said[4].startswith(f"did not load '{'a' * 99}, status 400: '{'a' * 200}\\n' cannot be served as a name")
    assert said[5].startswith("did not load '', status 400: the request is not a JSON object")


def test_a_version_that_is_sent_again_stays_what_it_is_to_the_engine(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under a new id it would take another slot, and another adapter would leave its own."""
    app, config = logged_updates(tmp_path, monkeypatch), tmp_path / "a" / "adapter_config.json"
    caplog.set_level(logging.INFO)
    first = answer_of(app, scope_of(models), b'{"lora_name": "a"}')
    request = models.lora_requests["a"]
    assert answer_of(app, scope_of(models), b'{"lora_name": "a"}') == first
    assert models.lora_requests == {"a": request}
    assert models.engine_client.add_lora.await_count == 1
    assert len(caplog.messages) == 1
    assert answered(app, scope_of(models), b'{"lora_name": "b", "lora_path": "a"}') == 200  # another name
    write_json(config, sealed(read_json(config) | {"scaling": 0.125}))
    assert answered(app, scope_of(models), b'{"lora_name": "a"}') == 200
    assert models.engine_client.add_lora.await_count == 3
    assert models.lora_requests["a"].lora_path != request.lora_path


def test_an_adapter_of_a_base_in_four_bits_is_warned_of_once(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the server's start, by the name that it is served under."""
    app, config = logged_updates(tmp_path, monkeypatch), tmp_path / "a" / "adapter_config.json"

    def load(name: str) -> None:
        body = json.dumps({"lora_name": name, "lora_path": "a"}).encode()
        assert answered(app, scope_of(models), body) == 200

    load("exact")
    write_json(config, sealed(read_json(config) | {"training": {"settings": {"dtype": "nf4"}}}))
    for name in ("x", "x", "y"):
        load(name)
    assert caplog.messages == [
        "The adapter was trained beside a base in four bits, and may score more merged by "
        f"`lorasb merge --base-dtype nf4` ({name})"
        for name in "xy"
    ]


def test_an_adapter_that_learnt_another_chat_template_is_warned_of_once(
    adapter: Adapter, models: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the server's start, by the name that it is served under; also where it is warned of four bits too."""
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    app, config = logged_updates(tmp_path, monkeypatch), tmp_path / "a" / "adapter_config.json"

    def load(training: dict[str, Any], scaling: float = 1.0) -> list[str]:
        caplog.clear()
        write_json(config, sealed(read_json(config) | {"training": training, "scaling": scaling}))
        assert answered(app, scope_of(models), b'{"lora_name": "x", "lora_path": "a"}') == 200
        return caplog.messages

    assert not load({})
    assert not load({TEMPLATE_KEY: template_sha256(tmp_path / "base")})
    (warning,) = load({TEMPLATE_KEY: "0" * 64})
    assert warning.startswith("x: trained with another chat template than this base has, and may answer worse")
    assert str(tmp_path / "base") in warning
    assert not load({TEMPLATE_KEY: "0" * 64}, scaling=2.0)
    (warning,) = load({TEMPLATE_KEY: "0" * 64, "settings": {"dtype": "nf4"}})
    assert "trained beside a base in four bits" in warning


def test_a_request_without_end_is_answered(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.shared.updates import LOAD, Updates

    variables = {
        shared.BASIS_VARIABLE: "a",
        shared.UPDATES_VARIABLE: "",
        shared.VERSIONS_VARIABLE: "versions",
        shared.BASE_VARIABLE: "base",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": LOAD, "headers": []}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(openai_serving_models=None))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1024, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Updates(Response())(scope, receive, send))
    assert sent[0]["status"] == 400
    assert b"more than 65536 bytes" in sent[1]["body"]
