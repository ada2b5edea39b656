"""What `resilience doctor` looks at: whether this machine has what a run needs. Changes nothing but a probe file.

Each look is a function that returns one finding, in `software`, `machine` or `way`. Nothing here imports torch unless
it is there, or DeepSpeed at all.
"""

from __future__ import annotations

from resilience.diagnosis import machine, software
from resilience.diagnosis.findings import Finding, Level

__all__ = ["Finding", "Level", "diagnose"]


def diagnose() -> list[Finding]:
    """All findings about this machine, in a fixed order."""
    return [*software.looks(), *machine.looks()]
