"""Fault plans, the ledger of strikes, and the injectors that carry a plan out.

`plan` and `ledger` work without torch (the launcher checks a plan before anything is started); `tensor` and `process`
live in the ranks. Nothing here detects or recovers: an injector behaves as broken hardware would, and keeps the record
that detections are held against.
"""

from resilience.faults.ledger import Ledger, read_strikes
from resilience.faults.plan import Fault, FaultPlan, load_plan

__all__ = ["Fault", "FaultPlan", "Ledger", "load_plan", "read_strikes"]
