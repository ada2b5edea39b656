"""Runs the GPU tests and benchmarks one after the other, prints what came of each, and writes it as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from result_file import result_file, revision
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
EXIT_UNAVAILABLE = 69
LIMIT_S = 3600
"""One part that takes longer hangs."""

BENCHMARKS = tuple(sorted(path.parent.name for path in (ROOT / "kernels").glob("*/bench.py")))
"""Each is `python -m resilience.kernels.<name>.bench --json FILE`, which writes a list of rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What one command gave."""

    name: str
    command: str
    exit_code: int
    seconds: float
    rows: list[dict[str, Any]]


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "gpu": properties.name,
        "num_gpus": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "num_multiprocessors": properties.multi_processor_count,
        "driver": _first_line(query),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": revision(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _first_line(command: list[str]) -> str | None:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    except OSError:  # not installed
        return None
    return lines[0].strip() if lines else None


def tests(directory: Path) -> Part:
    """The kernels' tests, compiled and on the device, and those that only a device can run."""
    result = directory / "tests.xml"
    folders = [str(ROOT / "tests" / name) for name in ("kernels", "gpu")]
    part = _run("tests", [sys.executable, "-m", "pytest", "-q", f"--junitxml={result}", *folders])
    if not result.exists():
        return part
    suites = xml.etree.ElementTree.parse(result).getroot().iter("testsuite")
    rows = [{key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    return dataclasses.replace(part, rows=rows)


def benchmark(name: str, directory: Path) -> Part:
    """A kernel's benchmark."""
    result = directory / f"{name}.json"
    part = _run(name, [sys.executable, "-m", f"resilience.kernels.{name}.bench", "--json", str(result)])
    return _with_rows(part, result)


def overhead(only: str, directory: Path) -> Part:
    """`scripts/bench overhead` on the device."""
    result = directory / "overhead.json"
    words = ["overhead", "--only", only, "--json", str(result)]
    return _with_rows(_run("overhead", [str(ROOT / "scripts" / "bench"), *words]), result)


def snapshot(directory: Path) -> Part:
    """`scripts/bench snapshot` on the device: what training waits for, beside a copy into page-locked memory."""
    result = directory / "snapshot.json"
    words = ["snapshot", "--mib", "1024", "--json", str(result)]
    part = _run("snapshot", [str(ROOT / "scripts" / "bench"), *words])
    if not result.exists():
        return part
    return dataclasses.replace(part, rows=_rows_of_snapshots(json.loads(result.read_text(encoding="utf-8"))))


def _rows_of_snapshots(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"what": what, "name": row["name"], "blocked_s": _median(row["blocked_s"]), "all_blocked_s": row["blocked_s"]}
        for what in ("save", "restore")
        for row in found[what]
    ]
    ratios = [pair["with_s"] / pair["without_s"] for pair in found["steps"]]
    rows.append({"what": "step with a snapshot ÷ without", "ratio": _median(ratios), "ratios": ratios})
    return rows


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def _with_rows(part: Part, result: Path) -> Part:
    if not result.exists():
        return part
    found = json.loads(result.read_text(encoding="utf-8"))
    return dataclasses.replace(part, rows=found if isinstance(found, list) else [found])


def _run(name: str, command: list[str]) -> Part:
    """Run `command` at the top of the tree; its output goes to the terminal."""
    shown = " ".join(command).replace(f"{ROOT}/", "")
    print(f"\n$ {shown}", flush=True)
    started = datetime.datetime.now()
    try:
        exit_code = subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{name} did not end within {LIMIT_S} s", file=sys.stderr)
        exit_code = 124
    return Part(name, shown, exit_code, round((datetime.datetime.now() - started).total_seconds(), 1), [])


def parts(arguments: argparse.Namespace, directory: Path) -> Iterator[Part]:
    """Everything that was asked for, in turn."""
    if "tests" in arguments.parts:
        yield tests(directory)
    for name in BENCHMARKS:
        if name in arguments.parts:
            yield benchmark(name, directory)
    if "overhead" in arguments.parts:
        yield overhead(arguments.overhead_cases, directory)
    if "snapshot" in arguments.parts:
        yield snapshot(directory)


def show(machine: dict[str, Any], results: list[Part]) -> None:
    """Print a table for each part, and one of all."""
    console = Console(width=160)
    for part in results:
        flat = [line for row in part.rows for line in _lines(row)]
        table = Table(title=part.name)
        headings = list(dict.fromkeys(key for row in flat for key in row))
        for heading in headings:
            table.add_column(heading)
        for row in flat:
            table.add_row(*(str(row.get(heading, "")) for heading in headings))
        if flat:
            console.print(table)
    summary = Table(title=f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}")
    for heading in ("part", "outcome", "seconds"):
        summary.add_column(heading)
    for part in results:
        outcome = "passed" if part.exit_code == 0 else f"failed ({part.exit_code})"
        summary.add_row(part.name, outcome, f"{part.seconds:.0f}")
    console.print(summary)


def _lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a row fits into a table; a row with `rows` of its own, as cases of `overhead` are, becomes several."""
    scalars = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
    inner = row.get("rows")
    if not isinstance(inner, list):
        return [scalars]
    return [{"name": row.get("name"), **line} for lines in inner for line in _lines(lines)]


def main() -> int:
    every = ("tests", *BENCHMARKS, "overhead", "snapshot")
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--parts", default=",".join(every), help="some of these (default: %(default)s)")
    parser.add_argument("--overhead-cases", default="gpt2", help="cases of `scripts/bench overhead` (default: gpt2)")
    parser.add_argument(
        "--json", type=result_file, default=Path("gpu-check.json"), help="result (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.parts = arguments.parts.split(",")
    unknown = sorted({*arguments.parts} - {*every})
    if unknown:
        parser.error(f"--parts {unknown[0]}: not a part; take some of {','.join(every)}")
    if not torch.cuda.is_available():
        print(
            f"scripts/gpu-check: torch {torch.__version__} finds no usable CUDA device; nothing was run",
            file=sys.stderr,
        )
        return EXIT_UNAVAILABLE
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="resilience-gpu-check-") as directory:
        results = list(parts(arguments, Path(directory)))
    found = {"machine": machine, "parts": [dataclasses.asdict(part) for part in results]}
    arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    show(machine, results)
    print(f"written to {os.path.relpath(arguments.json)}")
    return 0 if all(part.exit_code == 0 for part in results) else 1


if __name__ == "__main__":
    sys.exit(main())
