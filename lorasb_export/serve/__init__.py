"""An OpenAI-compatible server, by vLLM, for a base model and any number of adapters.

`plan` checks what is to be served and writes the command line, `server` runs it, `names` says what words mean.
"""

from __future__ import annotations

from .launcher import running_server, serve
from .names import resolve_adapters
from .server import RunningServer

__all__ = ["RunningServer", "resolve_adapters", "running_server", "serve"]
