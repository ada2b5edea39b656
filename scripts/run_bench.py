"""Starts a benchmark on two ranks, prints what it measured, and writes it as JSON where asked."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from launching import LaunchError, launch
from rich.console import Console
from rich.table import Table

FILES = Path(__file__).parent / "demo_gpt"
STRENGTHS = ("screen", "invariants", "checksum")


def show(result: dict[str, Any]) -> None:
    title = f"{result['model']}, {result['world_size']} ranks, {result['device']}, share of calls checked: 1"
    table = Table(title=title)
    for heading in ("strength", "plain step", "protected ÷ plain, median", "least", "most", "pair by pair"):
        table.add_column(heading)
    for row in result["strengths"]:
        ratios = row["ratios"]
        spread = [f"{value:.3f}" for value in (row["median_ratio"], min(ratios), max(ratios))]
        pairs = " ".join(f"{ratio:.3f}" for ratio in ratios)
        table.add_row(row["strength"], f"{row['plain_step_ms']:.0f} ms", *spread, pairs)
    Console(width=120).print(table)
    print(
        "Protected is all that happens in a rank: recording, checks, screens, the vote. Heartbeats leave from another"
    )
    print("thread, twice a second, and are not in it.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("benchmark", choices=["overhead"])
    parser.add_argument("--strengths", default=",".join(STRENGTHS), help=f"default: {','.join(STRENGTHS)}")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks for each strength (default: 6)")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps in a block (default: 5)")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.strengths.split(",")) - set(STRENGTHS))
    if unknown:
        parser.error(f"--strengths {unknown[0]}: not a strength; take some of {','.join(STRENGTHS)}")
    if min(arguments.pairs, arguments.steps) < 1:
        parser.error("--pairs and --steps must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, and so ends the launch
    with tempfile.TemporaryDirectory(prefix="resilience-bench-") as directory:
        result_file = Path(directory) / "result.json"
        words = ["--num_gpus", "2", str(FILES / "overhead.py"), "--deepspeed_config", str(FILES / "ds_config.json")]
        words += ["--strengths", arguments.strengths, "--pairs", str(arguments.pairs), "--steps", str(arguments.steps)]
        try:
            launch([*words, "--result", str(result_file)], Path(directory))
        except LaunchError as error:
            print(f"scripts/bench: {error}", file=sys.stderr)
            return 1
        text = result_file.read_text(encoding="utf-8")
    show(json.loads(text))
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
