"""`python -m resilience.coordinator --context PATH`: the embedded coordinator, started by the launcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from resilience.context import RunContext
from resilience.coordinator.log import silence_grpc
from resilience.errors import ResilienceError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the run of a context file; the code that the process ends with."""
    parser = argparse.ArgumentParser(prog="python -m resilience.coordinator", description=__doc__)
    parser.add_argument("--context", type=Path, required=True, help="context.json of the run")
    parser.add_argument("--port", type=int, help="gRPC port; without it the one in the context")
    parser.add_argument("--metrics-port", type=int, help="Prometheus port; without it the configured one")
    options = parser.parse_args(arguments)
    try:
        context = RunContext.read(options.context)
        silence_grpc(context.config.coordinator.log)
        from resilience.coordinator.runtime import serve, settings_of

        return serve(settings_of(context, port=options.port, metrics_port=options.metrics_port))
    except ResilienceError as error:
        print(f"resilience: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
