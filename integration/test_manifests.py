"""What the manifests in docs/ hand to vLLM serves our adapters, without `lorasb serve`; here on a merged model."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from integration.torture.tiny_server import greedy, tiny_world, wrong_answer  # it hides broken packages, before vLLM
from lorasb_export import Adapter, environment, merge
from lorasb_export.serving.launcher import _claim_port
from lorasb_export.serving.server import RunningServer
from lorasb_export.serving.shared import BASIS_VARIABLE
from tests.manifests import read
from tests.random_adapter import write_in

KEY = "only-for-this-run"


def test_ray_hands_vllm_arguments_it_has() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    (config,) = read("ray.yaml")["applications"][0]["args"]["llm_configs"]
    assert config["runtime_env"]["env_vars"].keys() == {BASIS_VARIABLE}
    assert set(config["engine_kwargs"]) <= {field.name for field in fields(AsyncEngineArgs)}


def test_the_arguments_of_the_production_stack_serve_adapters(tmp_path: Path) -> None:
    """The model answers as the adapter that is merged into it, and others as that and their own update."""
    (spec,) = read("production-stack.yaml")["servingEngineSpec"]["modelSpec"]
    versions, _ = tiny_world(tmp_path, 2, tied=True)  # as many small models are: a merged one has no lm_head
    adapters = dict(zip(("dates", "orders"), versions, strict=True))
    updates = [Adapter.load(tmp_path / "adapters" / version) for version in versions]
    merge(updates[0], tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    write_in(model, updates[0])
    answers = {("merged", prompt): tokens for prompt, tokens in greedy(model).items()}
    for version, update in zip(versions, updates, strict=True):
        both = deepcopy(model)
        write_in(both, update)
        answers |= {(version, prompt): tokens for prompt, tokens in greedy(both).items()}
    assert len({*answers.values()}) == len(answers)
    arguments = ["--enable-lora", "--enable-prefix-caching", "--max-loras", str(spec["vllmConfig"]["maxLoras"])]
    for argument in spec["vllmConfig"]["extraArgs"]:
        name, equals, folder = argument.partition("=/adapters/")
        arguments.append(f"{name}={tmp_path / 'adapters' / adapters[folder]}" if equals else argument)
    assert [variable["name"] for variable in spec["env"]] == [BASIS_VARIABLE]
    port = _claim_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "merged")]
    command += ["--served-model-name", "tiny", "--port", str(port), *arguments]
    command += ["--dtype", "float32", "--max-model-len", "128"]  # of a tiny model on a CPU
    variables = {BASIS_VARIABLE: str(tmp_path / "adapters" / versions[0]), "VLLM_API_KEY": KEY}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = RunningServer(command, environment.child_environment(**variables), f"http://127.0.0.1:{port}", echo=False)
    try:
        server.start()
        assert server.models == ["tiny", "dates", "orders"]
        assert not wrong_answer(server.url, KEY, {"tiny": "merged", **adapters}, answers)
    finally:
        server.stop()
