"""The coordinator's logic, with no input or output: `Machine.handle(command, now) -> effects`.

    commands   what comes in from outside, and ticks of the clock
    facts      what happened: journaled, and all that state is made of
    effects    what the shell must do, in this order
    state      everything a recovered coordinator needs: the fold of all facts
    fold       one fact into the state
    pulse      what the next reports bring back anyway: heartbeats, leases, sums not yet sampled
    rendezvous, reports, vetoes, supervision, operations
               planners: from a command to facts, one at a time
    story      facts as lines for people
    answers    replies and directives, read off the state

Planners are generators. Each fact that one yields is folded before it goes on, so a planner always sees the state that
its own facts made; the state that the journal gives back is equal by construction. Nothing in here may import torch,
grpc, asyncio, time, random, os or logging.
"""

from resilience.coordinator.machine.core import Machine
from resilience.coordinator.machine.effects import Effect, RefusalKind, Refused

__all__ = ["Effect", "Machine", "RefusalKind", "Refused"]
