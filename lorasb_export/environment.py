"""Optional packages: those that are not installed, and those that are but cannot be imported.

The CPU build of vLLM brings CUDA builds of torchaudio and torchcodec. Importing them raises OSError, which
transformers and vLLM do not expect from an optional package, so both fail to import. Hiding the broken
package makes them take the path for "not installed". Healthy packages are left alone. `lorasb_export` asks for
that when it is imported itself, so that whoever imports transformers after it need not know.

And accelerate's switches, which are environment variables.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from importlib.abc import MetaPathFinder
from pathlib import Path

from .errors import MissingPackageError

_SUSPECTS = ("torchaudio", "torchcodec")
_INSTALL = "In a clone of lorasb: pip install '.[cpu]' (on a Mac without vLLM), or '.[gpu]' with an NVIDIA GPU"
_CHILD_SITE = Path(__file__).parent / "child_site"


@cache
def _broken_packages() -> tuple[str, ...]:
    """Names among the suspects that are installed and raise something other than ImportError when imported."""
    broken = []
    for name in _SUSPECTS:
        if sys.modules.get(name) is not None or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        except Exception:  # OSError (missing CUDA library), RuntimeError (missing ffmpeg), ...
            broken.append(name)
    return tuple(broken)


def require_packages(*names: str, fix: str = _INSTALL) -> None:
    """Raise MissingPackageError for the first of `names` that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(f"the package {name.replace('_', '-')} is not installed", fix=fix)


def hide_before_transformers() -> None:
    """Hide broken packages once transformers is about to be imported; to look for them takes the import of torch."""
    sys.meta_path.insert(0, _BeforeTransformers())


class _BeforeTransformers(MetaPathFinder):
    """Finds nothing: once transformers is looked for, each broken package is as one that is not installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "transformers":
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]  # not in place: it is iterated
            for name in _broken_packages():
                for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                    del sys.modules[loaded]
                sys.modules[name] = None  # type: ignore[assignment]  # the import system reads None as "not found"


def child_environment(*hidden: str, **changes: str) -> dict[str, str]:
    """The environment for a Python child process in which broken packages, and those named, are hidden as well.

    The child (and every Python process it starts) finds `child_site/sitecustomize.py` first on its path, and nothing
    in the current folder.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **changes}
    # Others are of the current folder: the empty one too, which `PYTHONPATH=$PYTHONPATH:/x` often has.
    path = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    if hidden := (*_broken_packages(), *hidden):
        environment["LORASB_HIDDEN_PACKAGES"] = ",".join(hidden)
        path.insert(0, str(_CHILD_SITE))
    return environment | {"PYTHONPATH": os.pathsep.join(path)}


def accelerate_uses(what: str) -> bool:
    """Whether accelerate's environment variable ACCELERATE_USE_<what> is on."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() in ("1", "true")
