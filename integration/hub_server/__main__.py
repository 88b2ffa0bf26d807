"""Serve until Ctrl-C, to try `lorasb push` on by hand."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from . import USER, HubServer


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on 127.0.0.1 to try `lorasb push` on.")
    parser.add_argument("--port", type=int, default=8899)
    port = parser.parse_args().port
    with tempfile.TemporaryDirectory() as root, HubServer(Path(root), port) as server:
        home = tempfile.mkdtemp(prefix="loopback-hub-")
        print("\n".join(f"export {name}={value}" for name, value in server.environment(Path(home)).items()))
        print(f"# serving on {server.url}; the owner is {USER!r}; Ctrl-C ends it and forgets everything", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            for violation in server.violations:
                print(f"# refused: {violation}")


main()
