"""The policy: evidence and limits in, a decision with its reason out.

Pure: the same functions serve the coordinator, a rank that the coordinator does not answer, `resilience explain` and
the documentation. Nothing here reads a clock, a file or an environment, and nothing here imports torch or grpc.
"""

from resilience.policy.case import is_damage
from resilience.policy.failures import EXIT_RULES, Failure, FailureKind, decide_exit, restarts_left, root_exit
from resilience.policy.ladder import Ruling, decide, decide_locally, decision_id, judge
from resilience.policy.restore import Ancestor, Choice, Copy, Holder, Tier, choose_restore
from resilience.policy.table import RULES, Rule

__all__ = [
    "EXIT_RULES",
    "RULES",
    "Ancestor",
    "Choice",
    "Copy",
    "Failure",
    "FailureKind",
    "Holder",
    "Rule",
    "Ruling",
    "Tier",
    "choose_restore",
    "decide",
    "decide_exit",
    "decide_locally",
    "decision_id",
    "is_damage",
    "judge",
    "restarts_left",
    "root_exit",
]
