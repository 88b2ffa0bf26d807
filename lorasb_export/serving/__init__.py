"""An OpenAI-compatible server, by vLLM, for a base model and any number of adapters.

`plan` checks what is to be served and writes the command line, `server` runs it.
"""

from __future__ import annotations

from .launcher import running_server, serve
from .server import RunningServer

__all__ = ["RunningServer", "running_server", "serve"]
