"""Stands in for the agent in test_standby.py: starts a rank anew and from a zygote, and prints how each of them ended.

standby_agent.py FOLDER COMMAND…      with the note of imports in FOLDER/imported.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from resilience.launch.processes import adopt_orphans
from resilience.launch.standby import Standby


def main() -> None:
    adopt_orphans()
    folder = Path(sys.argv[1])
    commands: list[list[str]] = json.loads((folder / "commands.json").read_text())
    plan = folder / "plan.json"
    environment = {**os.environ, "LOCAL_RANK": "0", "RANK": "3"}
    found: dict[str, object] = {}
    standby = Standby(note=folder / "imported.json", log=folder / "standby.log")
    for generation, name in ((1, "anew"), (2, "forked")):
        for index, command in enumerate(commands):
            write_plan(plan, command, generation=generation)
            found[f"{name}-{index}"] = run(standby, plan, environment, folder / f"{name}-{index}")
        wait_until_ready(standby)
    if (changed := folder / "changed.py").exists():
        changed.rename(folder / "local_part.py")
        found["again"] = run(standby, plan, environment, folder / "again")
    found["other_environment"] = run(standby, plan, {**environment, "LD_LIBRARY_PATH": "/x"}, folder / "other")
    zygote = standby._zygote
    if zygote is not None:
        os.kill(zygote.pid, signal.SIGKILL)
        zygote.wait()
        found["zygote_dead"] = run(standby, plan, environment, folder / "dead")
    standby.close()
    found["left"] = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    (folder / "found.json").write_text(json.dumps(found))


def wait_until_ready(standby: Standby) -> None:
    deadline = time.monotonic() + 60
    standby.keep_ready()
    while standby._zygote is not None and not standby.is_ready:
        assert time.monotonic() < deadline, "no answer from the zygote"
        standby.keep_ready()
        time.sleep(0.01)


def write_plan(path: Path, command: list[str], *, generation: int) -> None:
    rank = {"command": command, "environment": {"RESILIENCE_GENERATION": str(generation)}, "log": None}
    path.write_text(json.dumps({"ranks": [rank]}))


def run(standby: Standby, plan: Path, environment: dict[str, str], output: Path) -> dict[str, object]:
    """Whether the process was forked, and how it ended."""
    rank = json.loads(plan.read_text())["ranks"][0]
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        adopted = standby.take(plan, environment, (out.fileno(), err.fileno()))
        if adopted is not None:
            return {"is_forked": True, "code": adopted.wait(60)}
        process = subprocess.Popen(
            rank["command"],
            env={**environment, **rank["environment"]},
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    return {"is_forked": False, "code": process.wait(60)}


if __name__ == "__main__":
    main()
