"""Carries out the faults of processes: this rank's own, and the coordinator's.

The strike is on disk before the signal is sent; a fault that ends its process strikes once per run, not once per
generation. Never here: tensors.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from resilience.clock import Clock, SystemClock
from resilience.events import Strike
from resilience.faults.ledger import Ledger
from resilience.faults.plan import Fault, FaultPlan

__all__ = ["ProcessInjector"]

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class ProcessInjector:
    """Kills, stops or ends processes at the plan's addresses.

    Args:
        plan: the fault plan of the run.
        rank: this rank.
        ledger: this rank's ledger; strikes that it holds already are not repeated.
        run_dir: where `coordinator.json` names the coordinator's process.
        on_strike: called after the strike is on disk, just before the signal is sent.
        clock: for `Strike.struck_at`.
    """

    def __init__(
        self,
        plan: FaultPlan,
        *,
        rank: int,
        ledger: Ledger,
        run_dir: Path,
        on_strike: Callable[[Strike], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._faults = plan.for_rank(rank, tensor=False)
        self._ledger = ledger
        self._run_dir = run_dir
        self.on_strike = on_strike
        self._clock = clock or SystemClock()

    def begin(self, step: int, micro_step: int, attempt: int) -> None:
        """Strike if the plan says so at this address; may not return."""
        for i, fault in self._faults:
            left = fault.repeat == -1 or self._ledger.num_strikes(i) < fault.repeat
            if fault.step == step and fault.micro_step == micro_step and left:
                self._strike(i, fault, attempt)

    def _strike(self, i: int, fault: Fault, attempt: int) -> None:
        pid = os.getpid() if fault.site == "process" else _coordinator_pid(self._run_dir)
        strike = Strike(
            strike_id=self._ledger.next_id(i),
            step=fault.step,
            micro_step=fault.micro_step,
            rank=fault.rank,
            site=fault.site,
            layer=fault.layer,
            kind=fault.kind,
            struck_at=self._clock.wall(),
            attempt=attempt,
            no_effect=pid is None,
        )
        self._ledger.append(strike)
        if self.on_strike is not None:
            self.on_strike(strike)
        if fault.kind == "exit":
            # As a crash in native code would: no cleanup, no handlers, no flushing.
            os._exit(fault.exit_code or 1)
        if pid is not None:
            os.kill(pid, _SIGNALS[fault.kind])


def _coordinator_pid(run_dir: Path) -> int | None:
    """The coordinator's process, or None where none runs here. The number alone may belong to a stranger by now."""
    try:
        pid = int(json.loads((run_dir / "coordinator.json").read_text(encoding="utf-8"))["pid"])
        command = psutil.Process(pid).cmdline()
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return pid if any("resilience" in part for part in command) else None
