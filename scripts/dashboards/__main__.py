"""Writes the dashboards as JSON into deploy/grafana/dashboards, or with --check compares them with what lies there."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import devices, fleet, handbook, run

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
PAGES = {"fleet": fleet.build, "run": run.build, "devices": devices.build, "runbook": handbook.build}


def main(words: list[str]) -> int:
    """0, or 1 where --check finds a difference."""
    if words not in ([], ["--check"]):
        print(f"scripts/gen-dashboards: no such option: {' '.join(words)}; there is --check only", file=sys.stderr)
        return 64
    wanted = {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(build().build()) + "\n"
        for name, build in PAGES.items()
    }
    found = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.json")}
    if words and found != wanted:
        differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        print(f"scripts/gen-dashboards: out of date: {', '.join(differ)}; run scripts/gen-dashboards", file=sys.stderr)
        return 1
    if not words:
        for name in found.keys() - wanted.keys():
            (FOLDER / name).unlink()
        for name, content in wanted.items():
            (FOLDER / name).write_text(content, "utf-8")
    return 0


sys.exit(main(sys.argv[1:]))
