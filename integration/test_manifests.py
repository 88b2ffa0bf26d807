"""What the manifests in docs/ hand to vLLM serves our adapters, without `lorasb serve`."""

from __future__ import annotations

import socket
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from openai import OpenAI

from integration.torture.tiny_server import tiny_world
from lorasb_export import environment
from lorasb_export.serve.server import RunningServer
from lorasb_export.serve.shared import BASIS_VARIABLE
from tests.test_manifests import read

environment.hide_broken_packages()

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402

KEY = "only-for-this-run"


def test_ray_hands_vllm_arguments_it_has() -> None:
    (config,) = read("ray.yaml")["applications"][0]["args"]["llm_configs"]
    assert config["runtime_env"]["env_vars"].keys() == {BASIS_VARIABLE}
    assert set(config["engine_kwargs"]) <= {field.name for field in fields(AsyncEngineArgs)}


def test_the_arguments_of_the_production_stack_serve_adapters(tmp_path: Path) -> None:
    (spec,) = read("production-stack.yaml")["servingEngineSpec"]["modelSpec"]
    versions, answers = tiny_world(tmp_path, 2)
    adapters = dict(zip(("dates", "orders"), versions, strict=True))
    arguments = []
    for argument in spec["vllmConfig"]["extraArgs"]:
        name, equals, folder = argument.partition("=/adapters/")
        arguments.append(f"{name}={tmp_path / 'adapters' / adapters[folder]}" if equals else argument)
    assert [variable["name"] for variable in spec["env"]] == [BASIS_VARIABLE]
    variables = {BASIS_VARIABLE: str(tmp_path / "adapters" / versions[0]), "VLLM_API_KEY": KEY}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "tiny")]
    command += ["--served-model-name", "tiny", "--port", str(port), "--enable-lora", *arguments]
    command += ["--max-loras", "4", "--dtype", "float32", "--max-model-len", "128"]  # the stack's defaults are a GPU's
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = RunningServer(command, environment.child_environment(**variables), f"http://127.0.0.1:{port}", echo=False)
    try:
        server.start()
        assert server.models == ["tiny", "dates", "orders"]
        client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        for name in server.models:
            for (version, prompt), tokens in answers.items():
                if version == adapters.get(name, name):
                    extra = {"return_token_ids": True, "ignore_eos": True}
                    options: Any = {"max_tokens": len(tokens), "temperature": 0, "extra_body": extra}
                    answer: Any = client.completions.create(model=name, prompt=list(prompt), **options)
                    assert tuple(answer.choices[0].token_ids) == tokens
    finally:
        server.stop()
