"""`python -m integration.torture NAME [--n N] [--seed S]`: lines for people, and one JSON object as the last line."""

from __future__ import annotations

import argparse
import importlib
import json

NAMES = ("agree", "concurrency", "disk", "kill", "lies", "load")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.torture", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--n", type=int, default=100, help="how many tries")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    harness = importlib.import_module(f"integration.torture.{options.name}")
    tally = harness.run(options.n, options.seed)
    for problem in tally.problems:
        print(problem)
    print(json.dumps(tally.as_json()))
    raise SystemExit(bool(tally.problems))


main()
