"""What people and the shell ask for: cordons, draining, recovery, the end; and the clock's ticks."""

from __future__ import annotations

from collections.abc import Iterator

from resilience.coordinator.machine import facts as f
from resilience.coordinator.machine.commands import AskRanks, Close, Drain, ObserveRpc, Recover, SetCordon, Tick
from resilience.coordinator.machine.effects import RefusalKind, Refused
from resilience.coordinator.machine.pulse import Pulse, sample_interval_s
from resilience.coordinator.machine.rendezvous import begin, finish
from resilience.coordinator.machine.reports import flush
from resilience.coordinator.machine.state import State
from resilience.coordinator.machine.supervision import watch
from resilience.errors import ExitCode
from resilience.events import Mode

__all__ = ["ask_ranks", "close", "devices_of", "drain", "observe_rpc", "recover", "set_cordon", "tick"]


def tick(state: State, pulse: Pulse, command: Tick, now: float) -> Iterator[f.Fact]:
    """Time has passed."""
    if now - pulse.sampled_at >= sample_interval_s(len(state.seats)) and state.finished is None:
        yield from flush(state, pulse, now)
    yield from watch(state, pulse, now)
    yield from begin(state, pulse, now)
    yield from _finish_alone(state, now)


def _finish_alone(state: State, now: float) -> Iterator[f.Fact]:
    """All agents have left and no launcher has said how the run ended: it is gone, so nobody will."""
    gone = [
        node.left_at if node.lost_at is None else node.lost_at for node in state.nodes.values() if not node.is_there
    ]
    if state.finished is None and gone and len(gone) == state.num_nodes and now - max(gone) > state.lease_s:
        yield finish(state)


def set_cordon(state: State, pulse: Pulse, command: SetCordon, now: float) -> Iterator[f.Fact]:
    """A person takes devices out of use for coming generations, or puts them back."""
    known = devices_of(state, command.target) or command.devices
    if not known:
        raise Refused(
            RefusalKind.UNKNOWN,
            f"{command.target!r} is neither a device nor a node that is known; see `resilience devices`",
        )
    changed = tuple(pair for pair in known if (pair[0] in state.cordons) is not command.cordoned)
    if changed:
        yield f.CordonSet(devices=changed, cordoned=command.cordoned, reason=command.reason)


def devices_of(state: State, target: str) -> tuple[tuple[str, str], ...]:
    """(device, node) for each device that `target`, a device or a node of this run, stands for."""
    offered = [(device.device, name) for name, node in state.nodes.items() for device in node.agent.devices]
    offered += [(device, cordon.node) for device, cordon in state.cordons.items()]
    return tuple(dict.fromkeys(pair for pair in offered if target in pair))


def drain(state: State, pulse: Pulse, command: Drain, now: float) -> Iterator[f.Fact]:
    """A person asks the run to leave after its next checkpoint."""
    if state.drain is None and state.finished is None:
        yield f.DrainAsked(reason=command.reason)


def ask_ranks(state: State, pulse: Pulse, command: AskRanks, now: float) -> Iterator[f.Fact]:
    """A person asks all ranks for a snapshot, or to go back to one."""
    if state.finished is not None or state.generation_ended:
        raise Refused(RefusalKind.INVALID, f"no ranks train: there is nobody to ask for a {command.wish}")
    if state.mode is not Mode.ENFORCE and command.wish is f.Wish.REWIND:
        raise Refused(RefusalKind.INVALID, f"mode {state.mode}: nothing is done to the ranks; run with mode enforce")
    yield f.RanksAsked(wish=command.wish, reason=command.reason, step=command.step)


def observe_rpc(state: State, pulse: Pulse, command: ObserveRpc, now: float) -> Iterator[f.Fact]:
    """A call was answered."""
    pulse.observe("rpc_seconds", command.seconds, command.method)
    return
    yield


def recover(state: State, pulse: Pulse, command: Recover, now: float) -> Iterator[f.Fact]:
    """A new process took over the journal. Leases count from now."""
    yield f.Recovered(pid=command.pid)


def close(state: State, pulse: Pulse, command: Close, now: float) -> Iterator[f.Fact]:
    """The launcher ends the coordinator: write down what is known, and how the run ended if nobody has said so."""
    if state.finished is not None:
        return
    yield from flush(state, pulse, now)
    are_done = [node.left == 0 for node in state.nodes.values() if node.lost_at is None]
    if state.ending is not None or (are_done and all(are_done)):
        yield finish(state)
    else:
        yield f.Finished(exit_code=int(ExitCode.REQUEUE), outcome="interrupted", reason=command.reason)
