"""Benchmarks by name; each is a module with a `main`."""

from __future__ import annotations

import argparse
import sys

import bench_overhead

BENCHMARKS = {"overhead": bench_overhead.main}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, add_help=len(sys.argv) == 2)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, help="its own options; `scripts/bench NAME --help` lists them"
    )
    arguments = parser.parse_args()
    return BENCHMARKS[arguments.benchmark](arguments.words)


if __name__ == "__main__":
    sys.exit(main())
