"""Benchmarks by name; each is a module with a `main`."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys

BENCHMARKS = {
    "overhead": "bench_overhead",
    "campaign": "bench_campaign",
    "recovery": "bench_recovery",
    "rewind": "bench_rewind",
    "snapshot": "bench_snapshot",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, add_help=len(sys.argv) == 2)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, help="its own options; `scripts/bench NAME --help` lists them"
    )
    arguments = parser.parse_args()
    try:
        return int(importlib.import_module(BENCHMARKS[arguments.benchmark]).main(arguments.words))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(f"scripts/bench: {error.strerror}{where}; make room, or name a file elsewhere", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
