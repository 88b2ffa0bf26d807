"""`python -m integration.bench NAME [--quick]`: a table for people, and one JSON object as the last line."""

from __future__ import annotations

import argparse
import importlib
import json

NAMES = ("basis", "calibrate", "fit", "merge", "onnx", "push", "quality", "report", "serve", "startup")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__, add_help=False)
    parser.add_argument("name", choices=NAMES)
    bench = importlib.import_module(f"integration.bench.{parser.parse_known_args()[0].name}")
    parser = argparse.ArgumentParser(parents=[parser], description=bench.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a look")
    if hasattr(bench, "arguments"):  # those of its own
        bench.arguments(parser)
    options = vars(parser.parse_args())
    del options["name"]
    print(json.dumps(bench.run(**options)))


main()
