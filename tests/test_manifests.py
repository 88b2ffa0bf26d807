"""The manifests in docs/ are ones their tools take; integration/test_manifests.py starts what they say."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from lorasb_cli.main import app
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lorasb_export.serving import choosing, flags
from lorasb_export.serving.server import SECONDS
from tests.manifests import DOCS, documents, read
from tests.random_adapter import save_adapter, save_base

kubernetes_validate = pytest.importorskip("kubernetes_validate")

SCHEMAS = Path(__file__).parent / "schemas"


def validate(document: Any, schema_name: str) -> None:
    jsonschema.validate(document, strict(json.loads((SCHEMAS / f"{schema_name}.json").read_text())))


def strict(schema: Any) -> Any:
    """`schema`, of whose objects with named properties no others are taken: their tools pass over a misspelt one."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    if "anyOf" in found and any("$ref" in choice for choice in found["anyOf"]):  # not a dict of anything as well
        found["anyOf"] = [choice for choice in found["anyOf"] if choice.get("additionalProperties") is not True]
    if found.get("type") == "object" and "properties" in found:
        found["additionalProperties"] = False
    return found


def test_kubernetes_takes_it() -> None:
    found = documents()
    assert sorted(found) == ["Deployment", "PodDisruptionBudget", "Service"]
    for document in found.values():
        kubernetes_validate.validate(document, "1.30", strict=True)
    found["Deployment"]["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found["Deployment"], "1.30", strict=True)


def test_its_options_are_those_of_serve() -> None:
    (container,) = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = container["args"]
    page = (DOCS / "reference" / "cli.md").read_text().split("serve", 1)[1]
    for argument in arguments[: arguments.index("--")]:
        assert argument.partition("=")[0] in page


def test_a_pod_that_ends_has_time_for_what_runs_and_makes_room_for_the_next() -> None:
    spec = documents()["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    word, before = container["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    drain = flags.number(container["args"], "--shutdown-timeout")
    assert int(before) + (drain or 0) + SECONDS < pod["terminationGracePeriodSeconds"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_namespace_of_the_restricted_level_admits_it() -> None:
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_it_serves_the_adapters_of_a_project_on_one_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "project")
    arguments = " ".join(container["args"]).replace(mount["mountPath"], str(tmp_path / "volume"))
    arguments = arguments.replace("/run/secrets/lorasb", str(tmp_path))
    (tmp_path / "key").write_text("only-for-this-test")
    modules = ["model.layers.0.self_attn.q_proj"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    trained = save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "embedded", modules)
    trained.load_basis().save(tmp_path / "home" / "basis")
    named = replace(trained, basis_source=str(tmp_path / "home" / "basis"))
    named.save(tmp_path / "home" / "adapters" / "billing")
    (tmp_path / "home").rename(tmp_path / "volume")

    monkeypatch.setattr(choosing, "why_unavailable", lambda: None)  # as if vLLM were installed
    done = CliRunner().invoke(app, ["serve", "--dry-run", "--json", *arguments.split()])
    described = json.loads(done.stdout)
    assert described["models"] == ["base", "billing"]
    assert described["mode"] == "shared"


def test_ray_which_asks_for_no_key_listens_on_this_machine_alone() -> None:
    """Left to itself a config file listens on 0.0.0.0."""
    assert read("ray.yaml")["http_options"]["host"] == "127.0.0.1"


def test_ray_takes_it() -> None:
    found = read("ray.yaml")
    validate(found, "ray-2.60.0-serve")
    arguments = found["applications"][0]["args"]
    validate(arguments, "ray-2.60.0-llm")
    for part, name in (("lora_config", "dynamic_lora_path"), ("model_loading_config", "modelid"), ("", "engine")):
        wrong = copy.deepcopy(arguments)
        config = wrong["llm_configs"][0]
        (config[part] if part else config)[name] = "x"
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong, "ray-2.60.0-llm")


def test_an_engine_of_the_production_stack_lets_requests_finish_before_kubernetes_kills_it() -> None:
    (spec,) = read("production-stack.yaml")["servingEngineSpec"]["modelSpec"]
    assert 0 < (flags.number(spec["vllmConfig"]["extraArgs"], "--shutdown-timeout") or 0) < 30


def test_the_production_stack_takes_it() -> None:
    found = read("production-stack.yaml")
    validate(found, "vllm-stack-0.1.12")
    found["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]["maxLora"] = 2
    with pytest.raises(jsonschema.ValidationError):
        validate(found, "vllm-stack-0.1.12")
