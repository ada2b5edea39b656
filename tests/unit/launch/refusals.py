"""Executed by test_refusals.py in a process of its own: runs `deepspeed --resilience …` for each line of arguments.

Prints, as JSON, the exit code and what was said on stderr. Nothing may be started.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

from deepspeed.launcher import runner

from resilience.launch import runner as ours


def refuse_to_start(*_: object, **__: object) -> None:
    raise AssertionError("an agent was started")


def main() -> None:
    ours.extend(runner)
    ours.supervise = refuse_to_start  # type: ignore[assignment]
    for line in sys.stdin:
        said, code = io.StringIO(), 0
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                runner.main(json.loads(line))
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
        print("ANSWER " + json.dumps([code, said.getvalue()]))


if __name__ == "__main__":
    main()
