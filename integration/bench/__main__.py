"""`python -m integration.bench NAME [--quick]`: a table for people, and one JSON object as the last line."""

from __future__ import annotations

import argparse
import importlib
import json

NAMES = ("calibrate", "fit", "merge", "serve", "startup")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a look")
    options = parser.parse_args()
    result = importlib.import_module(f"integration.bench.{options.name}").run(quick=options.quick)
    print(json.dumps(result))


main()
