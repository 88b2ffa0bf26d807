"""Write docs/supply-chain: the exact packages of the extra `cpu` with their hashes, and the same as a CycloneDX list.

`uv` resolves them (pip install uv); further words go to it, such as where torch's CPU builds are found. Install from it
with `pip install --require-hashes -r docs/supply-chain/requirements-cpu.txt`, then
`pip install --no-deps --no-build-isolation .`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "supply-chain"
LOCK, BOM = FOLDER / "requirements-cpu.txt", FOLDER / "sbom-cpu.cdx.json"
_UV = ["uv", "pip", "compile", "--quiet", "--extra", "cpu", "--python-version", "3.11", "--generate-hashes"]
_SILENT = ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]


def components(lock: str) -> list[dict[str, str]]:
    """Name, version and package URL of every package in a hashed requirements file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock, re.MULTILINE)
    return [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in found
    ]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    root = FOLDER.parents[1]
    words = [*_UV, *_SILENT, *sys.argv[1:], "pyproject.toml", "-o", str(LOCK.relative_to(root))]
    subprocess.run(words, cwd=root, check=True)
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components(LOCK.read_text())}
    BOM.write_text(json.dumps(bom, indent=1) + "\n")


if __name__ == "__main__":
    main()
