"""Transcripts of what happens to a run, and of what the machine must say to it. Each *.txt beside this file is one.

A line is what happens, or begins with `expect` and is what must be so; `#` begins a comment. The words:

    run nodes=2 devices=1 mode=shadow lease_s=15 max_restarts=1    how the run is set up; the first line
    run nodes=3 spares=1 node_wait_s=60
    time 12.5                              seconds since the start; ticks happen in between, nobody says anything
    agent a joins [after generation 1] [with 1:-9 0:-15]           rank:code of the ranks that ended
    agent a of pid 7 joins
    agent a reports exits 1:-9
    agent a holds 54:1 clean=52 parity=a,b losses=1               its part of the snapshot of step 54 of generation 1
    agent a has lost 54:1 | agent a has lost everything
    agent a | rank 0 refuses 54:1 [on a] because …
    agent a | rank 0 leaves with 0
    launcher leaves with 75 because …
    ranks join | rank 0 of generation 1 joins
    node b falls silent | node b speaks again                     its agent and its ranks, for `ranks beat`
    ranks beat step=3 | rank 0 beats step=3 micro=1 state=saving
    ranks train until 5                    steps of a second each, with the alarms that were announced
    rank 0 will alarm at step 3 times=1 check=checksum kind=inf site=linear.out layer=1 [mended]
    the run is deterministic | replay is off because …
    the ranks can go back to step 4 | the ranks cannot go back because …
    rank 0 asks about step 3               and hears nothing of the answer
    rank 1 reports damage at step 3        to the state, about which nobody has asked yet
    rank 0 decides continue by itself for step 3 attempt 0
    someone cordons device-1 because … | someone asks to drain because …
    coordinator restarts                   killed, and back from its journal

    expect agent a ready | pending | stop 75 [because …]
    expect order a restart | stop | none
    expect generation 2 of 2 ranks
    expect decision g1-s3-a0 replay [outcome] [because …]
    expect decisions 2
    expect detection g1-r1-exit transient
    expect restore memory | peer | disk 54 [because …]            where the newest generation's state comes from
    expect passed over 54 because …        a newer snapshot that was not taken
    expect peers a:0,1 b:- of step 54      what Assignment.restore says of the nodes
    expect refused because …               the line before was refused
    expect run training | … | finished 0 | failed 75 [because …]
    expect restarts left 2 | expect step 5 | expect device-1 cordoned
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilience.config import PolicyConfig
from resilience.coordinator import queries
from resilience.coordinator.machine import Refused
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.answers import answer_join, directives_for
from resilience.events import Action, Check, DetectionKind, Mode, Origin, Outcome, SnapshotFact, SnapshotKind
from resilience.policy import restarts_left
from resilience.testing import FakeRun, detection, evidence

TRANSCRIPTS = sorted(Path(__file__).parent.glob("*.txt"))
Handler = Callable[..., None]


class Scenario:
    """Reads one transcript, line by line."""

    def __init__(self) -> None:
        self.run = FakeRun()
        self.refused: str | None = None
        self.known: dict[str, Any] = {}
        self.last_generation: dict[str, int] = {}
        self.started_at = self.run.clock.wall()

    def play(self, line: str) -> None:
        for pattern, handler in LINES:
            found = re.fullmatch(pattern, line)
            if found:
                if not line.startswith("expect refused"):
                    assert self.refused is None, f"the line before was refused: {self.refused}"
                try:
                    handler(self, **found.groupdict())
                except Refused as error:
                    self.refused = str(error)
                return
        raise AssertionError("no such line; see the head of test_scenarios.py")

    # ------ what happens

    def set_up(self, words: str) -> None:
        given = dict(word.split("=") for word in words.split())
        own = {"nodes": "num_nodes", "devices": "num_devices"}
        known: dict[str, Any] = {own[key]: int(given.pop(key)) for key in list(given) if key in own}
        for key, cast in (("spares", int), ("node_wait_s", float)):
            if key in given:
                known["num_spare_nodes" if key == "spares" else key] = cast(given.pop(key))
        if "mode" in given:
            known["mode"] = Mode(given.pop("mode"))
        if "lease_s" in given:
            known["lease_s"] = float(given.pop("lease_s"))
        self.run = FakeRun(limits=PolicyConfig.model_validate(given), **known)

    def time(self, seconds: str) -> None:
        self.run.pass_time(self.started_at + float(seconds) - self.run.clock.wall())

    def join_agent(self, node: str, after: str | None, exits: str | None) -> None:
        self.last_generation[node] = int(after or 0)
        self.run.join_agent(node, last_generation=int(after or 0), exits=self._exits(exits, int(after or 0)))

    def join_other_agent(self, node: str, pid: str) -> None:
        self.last_generation[node] = 0
        self.run.join_agent(node, pid=int(pid))

    def report_exits(self, node: str, exits: str) -> None:
        self.run.report(f"agent:{node}", exits=self._exits(exits, self.run.generation))

    def _exits(self, exits: str | None, generation: int) -> tuple[Any, ...]:
        pairs = [pair.split(":") for pair in (exits or "").split()]
        return tuple(self.run.exit_of(int(rank), int(code), generation=generation) for rank, code in pairs)

    def hold(self, node: str, step: str, generation: str, words: str) -> None:
        given = dict(word.split("=") for word in words.split())
        self.run.holds(
            node,
            step=int(step),
            generation=int(generation),
            clean_through=int(given.get("clean", 0)),
            parity_nodes=tuple(given["parity"].split(",")) if "parity" in given else (),
            parity_losses=int(given.get("losses", 0)),
        )

    def lose(self, node: str, step: str | None, generation: str | None) -> None:
        lost = None if step is None else (int(step), int(generation or 0))
        kept = [c for c in self.run.copies[node] if lost is not None and (c.step, c.generation) != lost]
        self.run.copies[node] = tuple(kept)

    def refuse(self, kind: str, name: str, step: str, generation: str, node: str | None, why: str) -> None:
        fact = SnapshotFact(
            kind=SnapshotKind.REFUSED, step=int(step), generation=int(generation), node=node or "", reason=why
        )
        self.run.report(f"{kind}:{name}", snapshots=(fact,))

    def leave(self, kind: str, name: str, code: str) -> None:
        member = f"{kind}:{name}"
        self.run.submit(c.Leave(run_id="run", generation=self.run.generation, member=member, exit_code=int(code)))

    def launcher_leaves(self, code: str, why: str | None) -> None:
        self.run.submit(c.Leave(run_id="run", generation=0, member="launcher", exit_code=int(code), reason=why or ""))

    def join_ranks(self) -> None:
        self.run.join_ranks()

    def join_rank(self, rank: str, generation: str) -> None:
        self.run.join_rank(int(rank), generation=int(generation))

    def fall_silent(self, node: str) -> None:
        self.run.silent.add(node)

    def come_back(self, node: str) -> None:
        self.run.silent.discard(node)

    def beat_all(self, step: str) -> None:
        self.run.beat(step=int(step))

    def beat(self, rank: str, words: str) -> None:
        given = dict(word.split("=") for word in words.split())
        beat = c.Heartbeat(
            step=int(given["step"]), micro_step=int(given.get("micro", 0)), state=given.get("state", "training")
        )
        self.run.report(f"rank:{rank}", heartbeat=beat)

    def train(self, step: str) -> None:
        self.run.train(until=int(step), **self.known)

    def go_on_after(self, step: str) -> None:
        self.run.next_step = int(step) + 1

    def will_alarm(self, rank: str, step: str, words: str) -> None:
        given: dict[str, Any] = {}
        for word in words.split():
            key, _, value = word.partition("=")
            given[key] = value or True
        casts = {"times": int, "layer": int, "check": Check, "kind": DetectionKind}
        change = {key: casts[key](value) if key in casts else value for key, value in given.items()}
        self.run.script.at(step=int(step), rank=int(rank)).alarms(device=f"device-{rank}", **change)

    def deterministic(self) -> None:
        self.known["deterministic"] = True

    def replay_off(self, why: str) -> None:
        self.known.update(replay_available=False, replay_reason=why)

    def go_back(self, step: str) -> None:
        self.known.update(rewind_step=int(step))

    def no_way_back(self, why: str) -> None:
        self.known.update(rewind_step=None, rewind_reason=why)

    def decide_alone(self, rank: str, action: str, step: str, attempt: str) -> None:
        known = self.run.state.decisions.get(f"g{self.run.generation}-s{step}-a{attempt}")
        assert known is not None, "the coordinator has decided already"
        self.run.conclude(
            dataclasses.replace(
                known,
                action=Action(action),
                origin=Origin.RANK,
                outcome=Outcome.SUCCEEDED,
                reason="alone",
                exit_code=None,
            )
        )

    def ask_without_acting(self, step: str) -> None:
        alarms = self.run.script.strike(
            step=int(step), generation=self.run.generation, attempt=0, at=self.run.clock.wall()
        )
        ranks = len(self.run.state.seats)
        self.run.ask(evidence(*alarms, step=int(step), generation=self.run.generation, world_size=ranks, **self.known))

    def report_damage(self, rank: str, step: str) -> None:
        found = detection(
            step=int(step),
            rank=int(rank),
            number=900 + int(step),
            generation=self.run.generation,
            check=Check.AT_REST,
            site="weight",
            layer=-1,
        )
        self.run.report(f"rank:{rank}", detections=(found,))

    def cordon(self, target: str, why: str) -> None:
        self.run.submit(c.SetCordon(target=target, cordoned=True, reason=why))

    def drain(self, why: str) -> None:
        self.run.submit(c.Drain(reason=why))

    def restart_coordinator(self) -> None:
        self.run.restart_coordinator()

    # ------ what must be so

    def expect_agent(self, node: str, status: str, code: str | None, why: str | None) -> None:
        answer = answer_join(self.run.state, node, self.last_generation.get(node, 0))
        assert str(answer.status) == status, answer
        if code is not None:
            assert answer.exit_code == int(code)
        _contains(answer.reason, why)

    def expect_order(self, node: str, order: str) -> None:
        told = directives_for(self.run.state, f"agent:{node}", self.run.generation, self.run.clock.wall())
        assert [str(directive.kind) for directive in told] == ([] if order == "none" else [order])

    def expect_generation(self, generation: str, ranks: str) -> None:
        assert (self.run.generation, len(self.run.state.seats)) == (int(generation), int(ranks))
        assert not self.run.state.generation_ended

    def expect_decision(self, name: str, action: str, outcome: str | None, why: str | None) -> None:
        decision = self.run.state.decisions[name]
        assert str(decision.action) == action, decision.reason
        if outcome is not None:
            assert str(decision.outcome) == outcome
        _contains(decision.reason, why)

    def expect_num_decisions(self, count: str) -> None:
        assert len(self.run.state.decisions) == int(count), self.run.decisions()

    def expect_detection(self, name: str, verdict: str) -> None:
        assert str(self.run.state.detections[name].verdict) == verdict

    def expect_restore(self, tier: str, step: str, why: str | None) -> None:
        choice = self.run.state.generations[-1].restore
        assert choice is not None, "the first generation begins from nothing"
        assert (str(choice.tier), choice.step) == (tier, int(step)), choice
        _contains(choice.reason, why)

    def expect_passed_over(self, step: str, why: str) -> None:
        choice = self.run.state.generations[-1].restore
        assert choice is not None
        told = [line for line in choice.passed_over if line.startswith(f"snapshot of step {step} ")]
        assert told, choice.passed_over
        _contains(" ".join(told), why)

    def expect_peers(self, words: str, step: str) -> None:
        answer = answer_join(self.run.state, next(iter(dict(self.run.state.generations[-1].places))), 0)
        assert answer.restore is not None
        assert answer.restore.step == int(step)
        told = [f"{h.node}:{','.join(map(str, h.ranks)) or '-'}" for h in answer.restore.holders]
        assert told == words.split()
        assert all(answer.guardians[name] for name, _ in answer.places)

    def expect_refused(self, why: str) -> None:
        refused, self.refused = self.refused, None
        assert refused is not None, "the line before was not refused"
        _contains(refused, why)

    def expect_run(self, state: str, code: str | None, why: str | None) -> None:
        assert queries.run_state(self.run.state) == state
        ending = self.run.state.finished or self.run.state.ending
        if code is not None:
            assert ending is not None
            assert ending.exit_code == int(code)
        if why is not None:
            assert ending is not None
            _contains(ending.reason, why)

    def expect_left(self, count: str) -> None:
        state = self.run.state
        assert restarts_left(state.failures, state.limits, now=self.run.clock.wall()) == int(count)

    def expect_step(self, step: str) -> None:
        assert queries.newest_step(self.run.machine) == int(step)

    def expect_cordoned(self, device: str) -> None:
        assert device in self.run.state.cordons


def _contains(text: str, part: str | None) -> None:
    assert part is None or part in text, f"{part!r} is not in {text!r}"


WHY = r"(?: because (?P<why>.+))?"
LINES: list[tuple[str, Handler]] = [
    (r"run(?: (?P<words>.+))?", lambda s, words: s.set_up(words or "")),
    (r"time (?P<seconds>[\d.]+)", Scenario.time),
    (
        r"agent (?P<node>\w) joins(?: after generation (?P<after>\d+))?(?: with (?P<exits>[-\d: ]+))?",
        Scenario.join_agent,
    ),
    (r"agent (?P<node>\w) of pid (?P<pid>\d+) joins", Scenario.join_other_agent),
    (r"agent (?P<node>\w) reports exits (?P<exits>[-\d: ]+)", Scenario.report_exits),
    (r"agent (?P<node>\w) holds (?P<step>\d+):(?P<generation>\d+)(?P<words>(?: \w+=\S+)*)", Scenario.hold),
    (r"agent (?P<node>\w) has lost (?:everything|(?P<step>\d+):(?P<generation>\d+))", Scenario.lose),
    (
        r"(?P<kind>agent|rank) (?P<name>\w+) refuses (?P<step>\d+):(?P<generation>\d+)(?: on (?P<node>\w))?"
        r" because (?P<why>.+)",
        Scenario.refuse,
    ),
    (r"(?P<kind>agent|rank) (?P<name>\w+) leaves with (?P<code>\d+)", Scenario.leave),
    (rf"launcher leaves with (?P<code>\d+){WHY}", Scenario.launcher_leaves),
    (r"ranks join", Scenario.join_ranks),
    (r"rank (?P<rank>\d+) of generation (?P<generation>\d+) joins", Scenario.join_rank),
    (r"node (?P<node>\w) falls silent", Scenario.fall_silent),
    (r"node (?P<node>\w) speaks again", Scenario.come_back),
    (r"ranks beat step=(?P<step>\d+)", Scenario.beat_all),
    (r"rank (?P<rank>\d+) beats (?P<words>.+)", Scenario.beat),
    (r"ranks train until (?P<step>\d+)", Scenario.train),
    (r"ranks go on after step (?P<step>\d+)", Scenario.go_on_after),
    (r"rank (?P<rank>\d+) will alarm at step (?P<step>\d+) (?P<words>.+)", Scenario.will_alarm),
    (r"the run is deterministic", Scenario.deterministic),
    (r"replay is off because (?P<why>.+)", Scenario.replay_off),
    (r"the ranks can go back to step (?P<step>\d+)", Scenario.go_back),
    (r"the ranks cannot go back because (?P<why>.+)", Scenario.no_way_back),
    (r"rank (?P<rank>0) asks about step (?P<step>\d+)", lambda s, rank, step: s.ask_without_acting(step)),
    (r"rank (?P<rank>\d+) reports damage at step (?P<step>\d+)", Scenario.report_damage),
    (
        r"rank (?P<rank>0) decides (?P<action>\w+) by itself for step (?P<step>\d+) attempt (?P<attempt>\d+)",
        Scenario.decide_alone,
    ),
    (r"someone cordons (?P<target>\S+) because (?P<why>.+)", Scenario.cordon),
    (r"someone asks to drain because (?P<why>.+)", Scenario.drain),
    (r"coordinator restarts", Scenario.restart_coordinator),
    (rf"expect agent (?P<node>\w) (?P<status>ready|pending|stop)(?: (?P<code>\d+))?{WHY}", Scenario.expect_agent),
    (r"expect order (?P<node>\w) (?P<order>restart|stop|drain|none)", Scenario.expect_order),
    (r"expect generation (?P<generation>\d+) of (?P<ranks>\d+) ranks", Scenario.expect_generation),
    (
        rf"expect decision (?P<name>g\S+) (?P<action>\w+)(?: (?P<outcome>(?!because)\w+))?{WHY}",
        Scenario.expect_decision,
    ),
    (rf"expect restore (?P<tier>memory|peer|disk) (?P<step>\d+){WHY}", Scenario.expect_restore),
    (r"expect passed over (?P<step>\d+) because (?P<why>.+)", Scenario.expect_passed_over),
    (r"expect peers (?P<words>.+) of step (?P<step>\d+)", Scenario.expect_peers),
    (r"expect decisions (?P<count>\d+)", Scenario.expect_num_decisions),
    (r"expect detection (?P<name>\S+) (?P<verdict>\w+)", Scenario.expect_detection),
    (r"expect refused because (?P<why>.+)", Scenario.expect_refused),
    (rf"expect run (?P<state>[a-z]+)(?: (?P<code>\d+))?{WHY}", Scenario.expect_run),
    (r"expect restarts left (?P<count>\d+)", Scenario.expect_left),
    (r"expect step (?P<step>\d+)", Scenario.expect_step),
    (r"expect (?P<device>device-\d+) cordoned", Scenario.expect_cordoned),
]


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=[path.stem for path in TRANSCRIPTS])
def test_transcript(path: Path) -> None:
    scenario = Scenario()
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        try:
            scenario.play(line)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{path.name}:{number}: {line}\n{error}") from error
    assert scenario.refused is None, f"{path.name}: the last line was refused: {scenario.refused}"
    assert scenario.run.recovered().state == scenario.run.state, "the journal tells the same story"


def test_there_are_transcripts_and_each_expects_something() -> None:
    assert len(TRANSCRIPTS) >= 10
    assert all("expect" in path.read_text(encoding="utf-8") for path in TRANSCRIPTS)
