"""Hide the packages named in LORASB_HIDDEN_PACKAGES from this process (see lorasb_export/environment.py)."""

import contextlib
import os
import sys

for _name in os.environ.get("LORASB_HIDDEN_PACKAGES", "").split(","):
    if _name:
        sys.modules[_name] = None  # type: ignore[assignment]

# Give way to the sitecustomize this one shadows, if there is one.
_here = os.path.dirname(os.path.abspath(__file__))
_path, sys.path = sys.path, [entry for entry in sys.path if os.path.abspath(entry) != _here]
_self = sys.modules.pop("sitecustomize")
with contextlib.suppress(ImportError):
    import sitecustomize  # noqa: F401
sys.path = _path
sys.modules.setdefault("sitecustomize", _self)
