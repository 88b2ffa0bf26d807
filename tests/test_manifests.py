"""The manifests in docs/ are ones Kubernetes takes, and start `lorasb serve` with options it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate")

DOCS = Path(__file__).parent.parent / "docs"
MANIFEST = DOCS / "how-to" / "serve-many" / "kubernetes.yaml"


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


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
