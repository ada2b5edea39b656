"""`python -m resilience.launch …`: the line that `deepspeed --resilience …` takes, without the `.pth` hook."""

from __future__ import annotations

import sys

from resilience.deepspeed.launcher import runner_module
from resilience.launch.runner import extend

__all__ = ["main"]

_OPTION = "--resilience"


def main() -> None:
    """Launch with `--resilience`, whether it is given or not."""
    arguments = sys.argv[1:]
    runner = runner_module()
    extend(runner)
    runner.main(arguments if _OPTION in arguments else [_OPTION, *arguments])


if __name__ == "__main__":
    main()
