import os
from pathlib import Path

from lorasb_export import environment  # before any module imports transformers


def child_environment(*hidden: str, **changes: str) -> dict[str, str]:
    """As the library's, for modules of this package: they lie in the clone, and a child looks in no working folder."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    return environment.child_environment(*hidden, PYTHONPATH=path, **changes)
