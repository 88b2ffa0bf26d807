"""The manifests in docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent.parent / "docs"
MANIFESTS = DOCS / "how-to" / "serve-many"


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((MANIFESTS / "kubernetes.yaml").read_text())}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MANIFESTS / name).read_text())
    return found
