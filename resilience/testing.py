"""Fakes for tests of whatever talks to the coordinator or decides about faults: a clock, a run in memory, a bad link.

    clock = FakeClock()
    run = FakeRun(num_nodes=1, num_devices=2)
    run.start()
    run.script.at(step=3, rank=0).alarms(site="linear.out", times=1)
    run.train(until=5)
    assert run.decisions() == ["g1-s3-a0 replay", "g1-s3-a1 continue"]

`FakeRun` drives the real machine and the real policy; only clock, disk, network and processes are fakes. No torch, no
grpc, no threads: everything happens when it is told to.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Sequence

from resilience.config import PolicyConfig
from resilience.coordinator.journal import decode_fact, encode_fact
from resilience.coordinator.machine import Machine
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.answers import JoinAnswer, JoinStatus, answer_join
from resilience.coordinator.machine.effects import Effect, Record, RememberCordon, RememberFault
from resilience.coordinator.machine.facts import Agent, Device, Opened
from resilience.coordinator.machine.state import State
from resilience.coordinator.machine.vetoes import decision_id
from resilience.events import Action, Check, Decision, Detection, DetectionKind, Evidence, Mode, Outcome, RankExit
from resilience.policy import Copy

__all__ = ["Delivery", "FakeClock", "FakeLink", "FakeRun", "FaultScript", "detection", "evidence"]


class FakeClock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self._wall = start
        self._monotonic = 0.0

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        return self._wall

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        assert seconds >= 0, "time never goes back"
        self._wall += seconds
        self._monotonic += seconds

    def set_wall(self, wall: float) -> None:
        """Set the wall clock, as an operator or NTP would; the monotonic reading stays."""
        self._wall = wall


def detection(
    *,
    step: int,
    rank: int = 0,
    number: int = 1,
    generation: int = 1,
    attempt: int = 0,
    micro_step: int = 0,
    site: str = "linear.out",
    layer: int = 0,
    check: Check = Check.CHECKSUM,
    kind: DetectionKind = DetectionKind.MISMATCH,
    mended: bool = False,
    caused_by: str | None = None,
    param: str | None = None,
    device: str | None = None,
    detected_at: float = 0.0,
) -> Detection:
    """A detection with everything filled in that a test does not care about."""
    return Detection(
        detection_id=f"g{generation}-r{rank}-{number}",
        generation=generation,
        step=step,
        micro_step=micro_step,
        attempt=attempt,
        rank=rank,
        node="a",
        device=device or f"device-{rank}",
        site=site,
        layer=layer,
        check=check,
        kind=kind,
        residual_ratio=math.inf if kind is not DetectionKind.MISMATCH else 40.0,
        mended=mended,
        bit_exact=mended,
        caused_by=caused_by,
        param=param,
        detected_at=detected_at,
        latency_ms=0.5,
    )


def evidence(
    *detections: Detection,
    step: int,
    run_id: str = "run",
    generation: int = 1,
    attempt: int = 0,
    world_size: int = 2,
    previous: Iterable[Detection] = (),
    deterministic: bool | None = None,
    replay_available: bool = True,
    replay_reason: str = "",
    bit_equal: bool = False,
    loss_scale_search: bool = False,
    consecutive_skips: int = 0,
    rewind_step: int | None = None,
    rewind_reason: str = "",
    rewound_to: int | None = None,
    num_rewinds: int = 0,
) -> Evidence:
    """Evidence of one attempt of a step."""
    return Evidence(
        run_id=run_id,
        generation=generation,
        step=step,
        attempt=attempt,
        world_size=world_size,
        detections=detections,
        previous=tuple(previous),
        deterministic=deterministic,
        replay_available=replay_available,
        replay_reason=replay_reason,
        bit_equal=bit_equal,
        loss_scale_search=loss_scale_search,
        consecutive_skips=consecutive_skips,
        rewind_step=rewind_step,
        rewind_reason=rewind_reason,
        rewound_to=rewound_to,
        num_rewinds=num_rewinds,
    )


@dataclasses.dataclass
class _Planned:
    step: int
    rank: int
    times: int
    change: dict[str, object]


class FaultScript:
    """What checks will see, addressed by step and rank, as `script.at(step=3, rank=0).alarms(times=1)`."""

    def __init__(self) -> None:
        self._planned: list[_Planned] = []
        self._number = 0

    def at(self, *, step: int, rank: int = 0) -> FaultScript:
        """The address of the alarms that follow."""
        self._planned.append(_Planned(step, rank, 0, {}))
        return self

    def alarms(self, *, times: int = 1, **change: object) -> FaultScript:
        """A check alarms there, on so many executions of the step (−1: on all); other fields as in `detection`."""
        self._planned[-1].times, self._planned[-1].change = times, change
        return self

    def strike(self, *, step: int, generation: int, attempt: int, at: float) -> tuple[Detection, ...]:
        """The alarms of one execution of `step`, counted off the plan."""
        found = []
        for planned in self._planned:
            if planned.step != step or planned.times == 0:
                continue
            planned.times -= 1
            self._number += 1
            known = detection(
                step=step,
                rank=planned.rank,
                number=self._number,
                generation=generation,
                attempt=attempt,
                detected_at=at,
            )
            found.append(dataclasses.replace(known, **planned.change))  # type: ignore[arg-type]  # a test's own fields
        return tuple(found)


class Delivery(enum.StrEnum):
    """What a link does to one command."""

    ARRIVES = "arrives"
    REQUEST_LOST = "request_lost"
    REPLY_LOST = "reply_lost"
    TWICE = "twice"


class FakeLink:
    """Between a member and the machine. A lost reply looks to the sender as a lost request does: it sends again."""

    def __init__(self, choose: Callable[[], Delivery] = lambda: Delivery.ARRIVES, *, max_tries: int = 20) -> None:
        self._choose = choose
        self._max_tries = max_tries

    def send(self, submit: Callable[[], None]) -> None:
        """Submit until a reply comes through."""
        for _ in range(self._max_tries):
            delivery = self._choose()
            if delivery is not Delivery.REQUEST_LOST:
                submit()
            if delivery is Delivery.TWICE:
                submit()
            if delivery in (Delivery.ARRIVES, Delivery.TWICE):
                return
        submit()


class FakeRun:
    """A run in memory: agents and ranks that behave, a real machine, and a journal that is a list of lines."""

    def __init__(
        self,
        *,
        num_nodes: int = 1,
        num_devices: int = 2,
        limits: PolicyConfig | None = None,
        mode: Mode = Mode.ENFORCE,
        lease_s: float = 15.0,
        num_spare_nodes: int = 0,
        node_wait_s: float = 0.0,
        run_id: str = "run",
        link: FakeLink | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.run_id = run_id
        self.nodes = [chr(ord("a") + index) for index in range(num_nodes)]
        self.num_devices = num_devices
        self.script = FaultScript()
        self.silent: set[str] = set()
        """Nodes of which nothing is heard any more."""
        self.copies: dict[str, tuple[Copy, ...]] = {}
        """Node -> what its guardian holds; told when its agent asks for a place."""
        self.link = link or FakeLink()
        self.journal: list[tuple[str, str, float]] = []
        self.remembered: list[RememberFault | RememberCordon] = []
        self.step_s = 1.0
        self.next_step = 1
        self._sequences: dict[str, int] = {}
        self._num_rewinds: dict[int, int] = {}
        self.machine, effects = Machine.open(
            Opened(
                run_id=run_id,
                mode=mode,
                limits=limits or PolicyConfig(),
                lease_s=lease_s,
                num_spare_nodes=num_spare_nodes,
                node_wait_s=node_wait_s,
                started_at=self.clock.wall(),
            ),
            now=self.clock.wall(),
        )
        self._keep(effects)

    @property
    def state(self) -> State:
        """The machine's state."""
        return self.machine.state

    @property
    def generation(self) -> int:
        """The current generation."""
        return self.state.generation

    # ------ time and the coordinator's process

    def submit(self, command: c.Command) -> None:
        """Let one command happen, through no link."""
        self._keep(self.machine.handle(command, self.clock.wall()))

    def pass_time(self, seconds: float) -> None:
        """Let time pass in quarters of a second, with a tick after each; nobody else does anything."""
        for _ in range(max(1, round(seconds / 0.25))):
            self.clock.advance(min(seconds, 0.25))
            self.submit(c.Tick())

    def restart_coordinator(self) -> None:
        """Kill the coordinator; another one comes back from the journal's lines."""
        self.machine = self.recovered()
        self.submit(c.Recover(pid=2))

    def recovered(self) -> Machine:
        """What a coordinator that starts now would read from the journal."""
        machine = Machine(now=self.clock.wall())
        for kind, body, at in self.journal:
            machine.restore(decode_fact(kind, body, where="journal"), at)
        return machine

    def _keep(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Record):
                self.journal.append((type(effect.fact).__name__, encode_fact(effect.fact), effect.at))
            elif isinstance(effect, RememberFault | RememberCordon):
                self.remembered.append(effect)

    # ------ agents

    def agent(self, node: str) -> Agent:
        """The agent of `node`."""
        index = self.nodes.index(node)
        first = index * self.num_devices
        return Agent(
            node=node,
            node_rank=index,
            num_nodes=len(self.nodes),
            address=f"10.0.0.{index + 1}",
            devices=tuple(Device(slot=slot, device=f"device-{first + slot}") for slot in range(self.num_devices)),
            pid=100 + index,
        )

    def join_agent(
        self,
        node: str,
        *,
        last_generation: int = 0,
        exits: Sequence[RankExit] = (),
        reason: str = "",
        pid: int | None = None,
    ) -> JoinAnswer:
        """The agent of `node` asks for a place; with a `pid`, one that was started anew."""
        known = self.agent(node)
        command = c.JoinAgent(
            run_id=self.run_id,
            agent=known if pid is None else dataclasses.replace(known, pid=pid),
            last_generation=last_generation,
            exits=tuple(exits),
            reason=reason,
            copies=self.copies.get(node, ()),
            guardian_address=f"guardian-of-{node}:7000",
        )
        self.link.send(lambda: self.submit(command))
        return answer_join(self.state, node, last_generation)

    def holds(self, node: str, *, step: int, generation: int | None = None, **fields: object) -> None:
        """From now on the guardian of `node` holds its part of a snapshot; other fields as in `policy.Copy`."""
        taken_by = self.generation if generation is None else generation
        places = dict(self.state.generations[taken_by - 1].places)
        known = {"world_size": sum(len(ranks) for ranks in places.values()), "ranks": places[node], **fields}
        copy = Copy(step=step, generation=taken_by, **known)  # type: ignore[arg-type]  # a test's own fields
        kept = (c for c in self.copies.get(node, ()) if (c.step, c.generation) != (step, taken_by))
        self.copies[node] = (*kept, copy)

    def join_rank(self, rank: int, *, generation: int | None = None) -> None:
        """A rank announces itself."""
        command = c.JoinRank(
            run_id=self.run_id,
            generation=self.generation if generation is None else generation,
            rank=rank,
            world_size=len(self.state.seats),
            node=self.state.seats[rank].seat.node,
            pid=1000 * self.generation + rank,
        )
        self.link.send(lambda: self.submit(command))

    def start(self) -> None:
        """All agents join, the first generation begins, its ranks join."""
        for node in self.nodes:
            answer = self.join_agent(node)
        assert answer.status is JoinStatus.READY, answer.reason
        self.join_ranks()

    def join_ranks(self) -> None:
        """All ranks of the generation announce themselves."""
        for rank in self.state.seats:
            self.join_rank(rank)

    def exit_of(self, rank: int, exit_code: int, *, message: str = "", generation: int | None = None) -> RankExit:
        """How a rank ended."""
        seat = self.state.seats[rank].seat
        return RankExit(
            generation=self.generation if generation is None else generation,
            rank=rank,
            node=seat.node,
            device=seat.device,
            exit_code=exit_code,
            message=message,
            exited_at=self.clock.wall(),
        )

    def restart(self, *, from_step: int, exits: Sequence[RankExit] = ()) -> None:
        """The agents see `exits`, ask for a new generation and get it; training will go on after `from_step`."""
        ended = self.generation
        for node in self.nodes:
            own = [e for e in exits if e.node == node]
            self.join_agent(node, last_generation=ended, exits=own, reason="ranks ended")
        for node in self.nodes:
            self.join_agent(node, last_generation=ended)
        if self.generation > ended:
            self.join_ranks()
            self.next_step = from_step + 1

    # ------ ranks

    def report(self, member: str, *, generation: int | None = None, **content: object) -> None:
        """One report of `member`; fields as in `commands.Report`."""
        self._sequences[member] = self._sequences.get(member, 0) + 1
        command = c.Report(
            run_id=self.run_id,
            generation=self.generation if generation is None else generation,
            member=member,
            sequence=self._sequences[member],
            **content,  # type: ignore[arg-type]  # a test's own fields
        )
        self.link.send(lambda: self.submit(command))

    def beat(self, *, step: int, state: str = "training", seconds: Sequence[float] = ()) -> None:
        """All ranks and agents give a sign of life."""
        for rank, seat in self.state.seats.items():
            if seat.left is None and seat.seat.node not in self.silent:
                beat = c.Heartbeat(
                    step=step, state=state, last_verified_step=step, step_seconds_since=tuple(seconds), loss=1.0
                )
                self.report(f"rank:{rank}", heartbeat=beat)
        for node in self.nodes:
            if node in self.state.nodes and node not in self.silent:
                self.report(f"agent:{node}")

    def ask(self, evidence: Evidence) -> Decision:
        """Rank 0 asks what to do."""
        command = c.Decide(evidence=evidence)
        self.link.send(lambda: self.submit(command))
        return self.state.decisions[decision_id(command)]

    def conclude(self, decision: Decision) -> None:
        """Rank 0 says what it executed."""
        self.link.send(lambda: self.submit(c.Conclude(run_id=self.run_id, rank=0, decision=decision)))

    def step(self, **known: object) -> Decision | None:
        """The ranks execute the next step as a guard would: alarms, decisions, replays; fields as in `evidence`.

        Returns:
            The last decision, or None where nothing was to be decided.
        """
        step, attempt = self.next_step, 0
        course: dict[str, object] = {"num_rewinds": self._num_rewinds.get(self.generation, 0)}
        previous: tuple[Detection, ...] = ()
        pending: Decision | None = None
        while True:
            self.clock.advance(self.step_s)
            alarms = self.script.strike(step=step, generation=self.generation, attempt=attempt, at=self.clock.wall())
            if not alarms and attempt == 0:
                self._take(step)
                return None
            decision = self.ask(
                evidence(
                    *alarms,
                    step=step,
                    run_id=self.run_id,
                    generation=self.generation,
                    attempt=attempt,
                    world_size=len(self.state.seats),
                    previous=previous,
                    **{**known, **course},  # type: ignore[arg-type]  # a test's own fields
                )
            )
            unmended = tuple(alarm for alarm in alarms if not alarm.mended)
            if pending is not None:
                outcome = Outcome.FAILED if unmended else Outcome.SUCCEEDED
                self.conclude(dataclasses.replace(pending, outcome=outcome, lost_s=self.step_s, latency_ms=1.0))
            if decision.action not in (Action.REPLAY, Action.REWIND):
                outcome = Outcome.SHADOWED if decision.outcome is Outcome.SHADOWED else Outcome.SUCCEEDED
                self.conclude(dataclasses.replace(decision, outcome=outcome, latency_ms=1.0))
                if decision.action in (Action.CONTINUE, Action.CORRECTED):
                    self._take(step)
                return decision
            course.pop("rewound_to", None)
            if decision.action is Action.REWIND:
                self._num_rewinds[self.generation] = self._num_rewinds.get(self.generation, 0) + 1
                course = {"rewound_to": known["rewind_step"], "num_rewinds": self._num_rewinds[self.generation]}
            pending, previous, attempt = decision, unmended, attempt + 1

    def _take(self, step: int) -> None:
        self.next_step = step + 1
        self.beat(step=step, seconds=(self.step_s,))

    def train(self, *, until: int, **known: object) -> None:
        """Take steps until `until`, or until a decision ends the generation."""
        while self.next_step <= until and not self.state.generation_ended:
            self.step(**known)

    def decisions(self) -> list[str]:
        """`<id> <action>` of every decision, in the order in which they were made."""
        return [f"{d.decision_id} {d.action}" for d in self.state.decisions.values()]
