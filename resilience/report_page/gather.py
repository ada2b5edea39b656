"""What a page is drawn from, and where it lies: the journal (everything), report.json (what it names), or, for a run on
another machine, its coordinator. Reads only.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.clock import SystemClock
from resilience.coordinator.devices import DeviceHistory, DeviceRecord
from resilience.coordinator.journal import Journal, JournalError
from resilience.coordinator.machine import Machine
from resilience.coordinator.machine.facts import AgentJoined, GenerationBegan, Sampled
from resilience.coordinator.machine.state import State
from resilience.coordinator.paths import devices_path, journal_path
from resilience.coordinator.report import SCHEMA_VERSION, as_report
from resilience.errors import CoordinatorUnreachableError, ResilienceError, UsageError

if TYPE_CHECKING:
    from resilience.cli.source import Endpoint, Source

__all__ = ["Device", "Material", "Samples", "from_coordinator", "from_directory"]


@dataclasses.dataclass
class Samples:
    """What rank 0's heartbeats said, as it was sampled into the journal: at most once a second."""

    progress: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)
    """(seconds since the Unix epoch, generation, last step taken)."""
    durations: list[tuple[int, int, float]] = dataclasses.field(default_factory=list)
    """(generation, step, seconds) of every step."""
    losses: list[tuple[int, int, float]] = dataclasses.field(default_factory=list)
    """(generation, step, loss); on a GPU a loss is read every ten steps, and counts for the step where it was told."""

    def add(self, fact: Sampled, at: float) -> None:
        """Take one sample."""
        self.durations += [(fact.generation, step, seconds) for step, seconds in fact.durations]
        step = dict(fact.steps).get(0)
        if step is None:
            return
        self.progress.append((at, fact.generation, step))
        # The heartbeats of a GPU repeat the loss that was read last.
        before = self.losses[-1] if self.losses else (0, 0, None)
        is_stale = fact.loss == before[2] and fact.generation == before[0] and step > before[1]
        if fact.loss is not None and not is_stale:
            self.losses.append((fact.generation, step, fact.loss))


@dataclasses.dataclass
class Device:
    """A device that the run knows."""

    device: str
    node: str
    name: str = ""
    ranks: set[int] = dataclasses.field(default_factory=set)
    cordoned: bool = False
    reason: str = ""
    is_lost: bool = False
    """Whether its node's agent was given up."""
    num_faults_ever: int | None = None
    """Over all jobs; None where the history is not at hand."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Everything that the page is drawn from."""

    report: Mapping[str, Any]
    """With the names of report.json."""
    at: float
    """The moment that it tells of, in seconds since the Unix epoch."""
    is_live: bool
    """Whether the run's coordinator answers."""
    samples: Samples | None
    """None where there is no journal."""
    devices: Mapping[str, Device]
    snapshot_seconds: Mapping[str, tuple[int, float]]
    """Phase (copy, load, flush) of memory snapshots -> how often, and seconds in all."""
    source: str
    """Where it comes from, for the foot of the page."""
    remarks: tuple[str, ...] = ()
    """What the reader must know about it."""


def from_directory(run_dir: Path) -> Material:
    """The run in `run_dir`: from its journal (a copy or the live one), else report.json, else from its coordinator.

    Raises:
        UsageError: there is no run.
        CoordinatorUnreachableError: it left nothing here, and nobody answers.
        ResilienceError: what it left cannot be read.
    """
    from resilience.cli.source import LiveSource, read_endpoint  # gRPC, which a run that has ended does not need

    if not run_dir.is_dir():
        raise UsageError(f"{run_dir}: no run there; give its directory, or the name of one in ./resilience-runs")
    endpoint = read_endpoint(run_dir)
    candidates = [run_dir / "journal.db"]
    if endpoint is not None:
        candidates.append(journal_path(os.environ, endpoint.run_id))
    report = run_dir / "report.json"
    problem = ""
    for path in candidates:
        if path.is_file():
            try:
                return _from_journal(path, endpoint)
            except JournalError as error:
                problem = str(error)
    if report.is_file():
        return _from_report(report, problem)
    if problem:
        raise ResilienceError(problem)
    if endpoint is None:
        raise UsageError(f"{run_dir}: no run there (neither coordinator.json nor journal.db nor report.json)")
    try:
        return from_coordinator(LiveSource(endpoint.address, endpoint.token_file, endpoint.tls))
    except CoordinatorUnreachableError:
        raise CoordinatorUnreachableError(
            f"coordinator {endpoint.address} of the run in {run_dir} does not answer and left neither journal.db nor "
            "report.json there; is it running on this network?"
        ) from None


def _from_journal(path: Path, endpoint: Endpoint | None) -> Material:
    samples, devices, last_at, machine = Samples(), dict[str, Device](), 0.0, Machine(now=0.0)
    with Journal.open_read_only(path) as journal:
        for fact, at in journal.read():
            machine.restore(fact, at)
            last_at = at
            if isinstance(fact, Sampled):
                samples.add(fact, at)
            elif isinstance(fact, AgentJoined):
                for offered in fact.agent.devices:
                    devices[offered.device] = Device(offered.device, fact.agent.node, offered.name)
            elif isinstance(fact, GenerationBegan):
                for seat in fact.seats:
                    devices.setdefault(seat.device, Device(seat.device, seat.node)).ranks.add(seat.rank)
    if not last_at:
        raise JournalError(f"journal {path} is empty: its run never began")
    state = machine.state
    is_live = state.finished is None and endpoint is not None and _answers(endpoint)
    at = SystemClock().wall() if is_live else last_at
    return Material(
        report=as_report(state, at),
        at=at,
        is_live=is_live,
        samples=samples,
        devices=_with_history(state, devices),
        snapshot_seconds=_snapshot_seconds(state),
        source=f"journal {path.name}",
    )


def _answers(endpoint: Endpoint) -> bool:
    """Whether somebody is there, if only to refuse whoever brings no token."""
    from resilience.cli.source import LiveSource

    source = LiveSource(endpoint.address, None, endpoint.tls)
    try:
        return source.answers()
    except UsageError:
        return True
    finally:
        source.close()


def _snapshot_seconds(state: State) -> dict[str, tuple[int, float]]:
    return {
        phase: (sum(seen.counts), seen.total)
        for (metric, phase), seen in state.telemetry.histograms.items()
        if metric == "snapshot_seconds"
    }


def _with_history(state: State, devices: dict[str, Device]) -> dict[str, Device]:
    for name, cordon in state.cordons.items():
        device = devices.setdefault(name, Device(name, cordon.node))
        device.cordoned, device.reason = True, cordon.reason
    for device in devices.values():
        device.is_lost = device.node in state.nodes and state.nodes[device.node].lost_at is not None
    for record in _records():
        if record.device in devices:
            devices[record.device].num_faults_ever = record.num_transient + record.num_persistent
    return devices


def _records() -> list[DeviceRecord]:
    path = devices_path(os.environ)
    if not path.is_file():  # opening it would create it
        return []
    history = DeviceHistory(path)
    try:
        return history.records()
    finally:
        history.close()


def _from_report(path: Path, problem: str) -> Material:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResilienceError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ResilienceError(f"{path}: is not JSON ({error}); was it cut short?") from None
    if not isinstance(content, dict):
        raise ResilienceError(f"{path}: is not a report: it holds {type(content).__name__}, not an object")
    why = problem or "there is no journal beside it"
    remark = f"Drawn from report.json alone ({why}): single steps and losses are not in it."
    return Material(
        report=content,
        at=path.stat().st_mtime,
        is_live=False,
        samples=None,
        devices={},
        snapshot_seconds={},
        source="report.json",
        remarks=(remark,),
    )


def from_coordinator(source: Source) -> Material:
    """A run as its coordinator tells it.

    Raises:
        CoordinatorUnreachableError: it does not answer.
    """
    from resilience.cli.output import plain

    run = plain(source.run())
    events = [plain(event) for event in source.events(after=0, follow=False)]
    found = [plain(each) for each in source.detections(include_propagated=True, limit=0).detections]
    generations = _generations(events)
    known = ("run_id", "mode", "started_at", "deterministic", "exit_code", "last_verified_step", "goodput_ratio")
    report = {
        "schema_version": SCHEMA_VERSION,
        **{key: run[key] for key in known},
        "versions": {},
        "config_digest": None,
        "finished_at": None,
        "outcome": run["state"],
        "reason": run["last_event"] if run["exit_code"] else "",
        "num_generations": run["generation"],
        "generations": generations,
        "num_steps": run["step"],
        "badput_s": {},
        "faults_injected": [],
        "detections": [each for each in found if each["caused_by"] is None],
        "propagated": [each for each in found if each["caused_by"] is not None],
        "decisions": [plain(each) for each in source.decisions(limit=0).decisions],
        "checkpoints": [plain(each) for each in source.checkpoints().checkpoints],
        "snapshots": None,
        "notes": [],
    }
    devices = dict[str, Device]()
    for each in source.devices().devices:
        ever = each.num_transient + each.num_persistent
        devices[each.device] = Device(
            each.device, each.node, cordoned=each.cordoned, reason=each.reason, num_faults_ever=ever
        )
    for rank in source.ranks().ranks:
        devices.setdefault(rank.device, Device(rank.device, rank.node)).ranks.add(rank.rank)
    used = {name: each for name, each in devices.items() if each.ranks or each.cordoned}  # the history knows others too
    return Material(
        report=report,
        at=run["now"],
        is_live=run["exit_code"] is None,
        samples=None,
        devices=used,
        snapshot_seconds={},
        source="its coordinator",
        remarks=(
            "Drawn from what the coordinator tells: single steps, losses, injected faults and the causes of badput are "
            "in its journal, on its own machine.",
        ),
    )


def _generations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Generations by the lines of the story; the first line about a step stands for the first step."""
    began = [event for event in events if event["kind"] == "generation"]
    first = {
        event["generation"]: event["at"] for event in reversed(events) if event["step"] and event["kind"] != "exit"
    }
    ends = [*(event["at"] for event in began[1:]), None]
    return [
        {
            "generation": event["generation"],
            "began_at": event["at"],
            "first_step_at": first.get(event["generation"]),
            "ended_at": end,
            "reason": event["text"],
        }
        for event, end in zip(began, ends, strict=False)
    ]
