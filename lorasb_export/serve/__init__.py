"""An OpenAI-compatible server, by vLLM, for a base model and any number of adapters.

`plan` checks what is to be served and writes the command line, `server` runs it.
"""

from __future__ import annotations

from .launcher import running_server, serve
from .server import RunningServer

__all__ = ["RunningServer", "running_server", "serve"]

# `lorasb_export.serve` is the function; `import lorasb_export.serve.plan as plan` looks for the module in it.
serve.__dict__ = globals()
