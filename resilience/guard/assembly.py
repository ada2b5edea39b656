"""Puts the guard of one engine together: client, injectors, protection, screen, transaction, verified checkpoints.

Never here: anything that happens within a step.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import resilience
from resilience import imported
from resilience.abft.calibration import Recorder
from resilience.abft.protection import Protection
from resilience.config import Config
from resilience.context import ARENA_VARIABLE, RunContext
from resilience.deepspeed import checkpoint, snapshot_take
from resilience.deepspeed.adapter import EngineAdapter
from resilience.deepspeed.monitor import monitor_of
from resilience.deepspeed.profile import profile_of
from resilience.deepspeed.shards import Holdings, watch_edits
from resilience.errors import FaultPlanError
from resilience.events import Mode
from resilience.faults.ledger import Ledger
from resilience.faults.plan import STATE_SITES, FaultPlan, load_plan
from resilience.faults.process import ProcessInjector
from resilience.faults.tensor import TensorInjector
from resilience.guard import support
from resilience.guard.at_rest import AtRest
from resilience.guard.client import Client, RankIdentity
from resilience.guard.ending import Ending
from resilience.guard.line import LineToCoordinator
from resilience.guard.past import ArenaPast
from resilience.guard.reporter import Reporter, SilentReporter
from resilience.guard.screens import GradientScreen
from resilience.guard.settings import Settings
from resilience.guard.snapshots import RankSnapshots
from resilience.guard.succession import Succession, succeed
from resilience.guard.trail import TrailWriter
from resilience.guard.transaction import Guard
from resilience.imported import ImportNote
from resilience.last_place import LastPlace, path_of
from resilience.snapshot.arena import Arena
from resilience.snapshot.copiers import WaitingCopier, copier_for

__all__ = ["Guarded", "guard_engine"]


@dataclasses.dataclass(frozen=True, slots=True)
class Guarded:
    """An engine under guard."""

    guard: Guard
    uninstall: Callable[[], None]
    """Puts the engine, its module and torch back as they were."""
    protection: Protection | None = None
    """The checks of its operations; None where nothing of the kind is on."""


def guard_engine(
    engine: Any,
    config: Config,
    *,
    context: RunContext | None = None,
    reporter: Reporter | None = None,
    versions: dict[str, str] | None = None,
) -> Guarded:
    """Put `engine` under guard. Collective: every rank calls it at the same place.

    Args:
        engine: a `DeepSpeedEngine` that trains.
        config: what is on.
        context: the run; None outside of a launch by us, where there is no coordinator and no fault plan.
        reporter: used in place of a coordinator's client.
        versions: of what matters, for the report.
    """
    settings = _settings(config, context)
    adapter = EngineAdapter(engine)
    undo: list[Callable[[], None]] = []
    last_place = _last_place(context, settings)
    if reporter is None:
        reporter = _line(context, settings, versions or {}, last_place) if context is not None else SilentReporter()
    problem = _announce(engine, reporter, settings.rank)
    tensor_injector, process_injector = _injectors(context, settings, reporter, problem)
    protection = _protection(adapter, settings, context, tensor_injector, reporter, undo)
    succession = succeed(engine, adapter, settings, reporter, last_place, undo)
    # The place comes first: an injector may end this process.
    listeners = last_place, _import_note(context, settings), process_injector, tensor_injector
    at_rest = _at_rest(engine, config, tensor_injector, settings, undo) if not problem else None
    snapshots = _snapshots(engine, adapter, settings, reporter, succession.trail, problem, undo)
    guard = Guard(
        adapter,
        settings,
        reporter=reporter,
        screen=_screen(adapter, settings, tensor_injector),
        protector=protection,
        listeners=tuple(item for item in listeners if item is not None),
        replay_problem=problem,
        at_rest=at_rest,
        snapshots=snapshots,
        # A rewind loads below what verifies the script's loads, and above what tells the hashes of edits.
        past=ArenaPast(engine, snapshots, settings, engine.load_checkpoint) if snapshots is not None else None,
        trail=succession.trail,
        fast_forwarding=succession.fast_forward,
    )
    guard.boundary.monitor = monitor_of(engine, settings.rank)
    undo.append(guard.uninstall)
    succession.watch(guard)
    if context is not None:
        undo.append(_verify_checkpoints(engine, context, reporter, guard, succession))
    undo.append(_tell_of_saves(engine, guard))
    succession.stand_in()

    def uninstall() -> None:
        for step in reversed(undo):
            step()

    return Guarded(guard, uninstall, protection)


def _verify_checkpoints(
    engine: Any, context: RunContext, reporter: Reporter, guard: Guard, succession: Succession
) -> Callable[[], None]:
    return checkpoint.install(
        engine,
        context=context,
        client=reporter,
        guard_state=guard,
        led=succession.fast_forward,
        clock=guard.settings.clock,
    )


def _settings(config: Config, context: RunContext | None) -> Settings:
    rank = dist.get_rank() if dist.is_initialized() else 0
    run_id = context.run_id if context is not None else config.launch.run_id or "unlaunched"
    return Settings.from_environment(config, run_id=run_id, rank=rank, environ=os.environ)


def _screen(adapter: EngineAdapter, settings: Settings, injector: TensorInjector | None) -> GradientScreen:
    detection = settings.config.detection
    is_on = detection.strength != "off"
    return GradientScreen(adapter.module, detection, enabled=is_on, injector=injector, clock=settings.clock)


def _last_place(context: RunContext | None, settings: Settings) -> LastPlace | None:
    return LastPlace(path_of(context.run_dir, settings.generation, settings.rank)) if context is not None else None


def _import_note(context: RunContext | None, settings: Settings) -> ImportNote | None:
    """For the standby process of this node, unless a rank has written it before."""
    if context is None or not context.config.launch.warm_standby or os.environ.get("LOCAL_RANK") != "0":
        return None
    path = imported.path_of(context.run_dir, settings.node)
    return None if path.exists() else ImportNote(path)


def _line(context: RunContext, settings: Settings, versions: dict[str, str], last_place: LastPlace | None) -> Reporter:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    identity = RankIdentity(
        generation=settings.generation,
        rank=settings.rank,
        local_rank=local_rank,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        node=settings.node,
        device=settings.device,
        device_name=name,
        pid=os.getpid(),
        versions={
            "resilience": resilience.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **versions,
        },
    )
    client = Client(context, identity, clock=settings.clock)
    client.start()
    line = LineToCoordinator(client)
    _say_goodbye(line, last_place)
    return line


def _say_goodbye(line: LineToCoordinator, last_place: LastPlace | None) -> None:
    """Tell the agent and the coordinator when this process ends by itself, with which code where that is known."""

    def leave(exit_code: int | None, reason: str) -> None:
        if exit_code is not None and last_place is not None:
            last_place.end(exit_code)
        line.leave(exit_code or 0, reason)  # what the process really ended with comes from its agent

    Ending(leave).watch()


def _announce(engine: Any, reporter: Reporter, rank: int) -> str:
    """Say what is off for this engine; returns why no step of it can be replayed, or an empty string."""
    off = support.problems(profile_of(engine, is_first_engine=True))
    if not off:
        return ""
    text = f"replay off: {', '.join(off)}; {support.INSTEAD}; weights and optimizer state are not checked at rest"
    if rank == 0:
        print(f"resilience: {text}", file=sys.stderr, flush=True)
        reporter.note("replay_off", text)
    return ", ".join(off)


def _injectors(
    context: RunContext | None, settings: Settings, reporter: Reporter, problem: str
) -> tuple[TensorInjector | None, ProcessInjector | None]:
    if context is None or context.fault_plan is None:
        return None, None
    plan = load_plan(context.fault_plan)
    _require_protected_sites(plan, context.config.detection.strength, problem)
    ledger = Ledger(context.run_dir, settings.rank)
    for strike in ledger.strikes():
        # The coordinator may have died, or this rank, before it heard of them; it knows them by their ids.
        reporter.report(strike)
    tensor = TensorInjector(plan, rank=settings.rank, ledger=ledger, on_strike=reporter.report, clock=settings.clock)
    process = ProcessInjector(
        plan,
        rank=settings.rank,
        ledger=ledger,
        run_dir=context.run_dir,
        on_strike=reporter.report,
        clock=settings.clock,
    )
    return tensor, process


def _require_protected_sites(plan: FaultPlan, strength: str, problem: str) -> None:
    """A fault that can never strike is a mistake in the plan."""
    state = [fault.site for fault in plan.fault if fault.site in STATE_SITES]
    if state and problem:
        raise FaultPlanError(f"site {state[0]!r}: state is not known well enough to be struck, because of {problem}")
    outside = ("gradient", *STATE_SITES)
    inside = [fault.site for fault in plan.fault if fault.strikes_tensor and fault.site not in outside]
    if inside and strength in ("off", "screen"):
        raise FaultPlanError(
            f"site {inside[0]!r}: struck inside protected operations only, and detection.strength is {strength!r}; "
            "set it to 'checksum', or strike the site 'gradient'"
        )


def _protection(
    adapter: EngineAdapter,
    settings: Settings,
    context: RunContext | None,
    injector: TensorInjector | None,
    reporter: Reporter,
    undo: list[Callable[[], None]],
) -> Protection | None:
    detection = settings.config.detection
    if detection.strength in ("off", "screen"):
        return None
    protection = Protection(detection, injector=injector)
    protection.install()
    undo.append(protection.uninstall)
    protection.attach(adapter.module)
    if settings.rank == 0:
        # Other ranks may have other shares: each measures its own costs.
        protection.tell_shares(lambda found: reporter.note("checks", f"share of checks on rank 0: {found.reason}"))
    if context is not None and detection.calibrate:
        _calibrate(protection, context, settings.rank, undo)
    return protection


def _at_rest(
    engine: Any,
    config: Config,
    injector: TensorInjector | None,
    settings: Settings,
    undo: list[Callable[[], None]],
) -> AtRest | None:
    detection = config.detection
    is_on = detection.strength != "off" and bool(detection.at_rest_share or detection.replica_interval_steps)
    if not is_on and injector is None:
        return None
    share = detection.at_rest_share if is_on else 0.0
    holdings = Holdings(engine)
    at_rest = AtRest(holdings, share=share, injector=injector, clock=settings.clock)
    at_rest.on_forget = holdings.forget
    undo.append(watch_edits(engine, at_rest.forget))
    return at_rest


def _snapshots(
    engine: Any,
    adapter: EngineAdapter,
    settings: Settings,
    reporter: Reporter,
    trail: TrailWriter | None,
    problem: str,
    undo: list[Callable[[], None]],
) -> RankSnapshots | None:
    """Copies of the state in the arena of this node; None where there is no arena, or this engine cannot be copied."""
    arena, config = os.environ.get(ARENA_VARIABLE), settings.config
    if not arena or config.snapshot.interval_steps == 0 or config.mode is Mode.OFF:
        return None

    def tell(reason: str, what: str = "snapshots off") -> None:
        text = f"rank {settings.rank}: {what}: {reason}"
        print(f"resilience: {text}", file=sys.stderr, flush=True)
        reporter.note(what.replace(" ", "_"), text)

    reason = problem or snapshot_take.problem(engine)
    if reason:
        if settings.rank == 0:
            tell(reason)
        return None
    copier = copier_for(engine.device)
    parity = config.snapshot.parity_losses != 0 and int(os.environ.get("CROSS_SIZE", "1")) > 1
    snapshots = RankSnapshots(
        engine,
        Arena(Path(arena)),
        settings,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        keeps_parity=parity,
        rng=adapter,
        trail_bytes=(lambda: trail.num_bytes) if trail is not None else (lambda: 0),
        copier=copier,
        on_off=tell,
        on_waiting=lambda reason: tell(reason, "snapshots wait"),
        on_lost=lambda reason: reporter.note("snapshot_lost", f"rank {settings.rank}: no snapshot: {reason}"),
        clock=settings.clock,
    )
    undo.append(snapshots.close)
    if not isinstance(copier, WaitingCopier):
        undo.append(watch_edits(engine, before=snapshots.finish))
        # A script that fails between two steps leaves the snapshot of the first one whole.
        atexit.register(snapshots.finish)
        undo.append(lambda: atexit.unregister(snapshots.finish))
    return snapshots


def _calibrate(protection: Protection, context: RunContext, rank: int, undo: list[Callable[[], None]]) -> None:
    """Keep this rank's histogram of residuals; it is written now and then, and when the process ends."""
    recorder = Recorder(context.run_dir, rank)
    protection.tell_ratios(recorder.add)
    atexit.register(recorder.write)
    undo.append(recorder.write)


def _tell_of_saves(engine: Any, guard: Guard) -> Callable[[], None]:
    """Nothing damaged is saved; and a drain waits for the script's next checkpoint: tell the guard of each."""
    saved = engine.save_checkpoint
    before = engine.__dict__.get("save_checkpoint")

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        guard.check_before_save()
        result = saved(*args, **kwargs)
        guard.boundary.checkpoint_saved()
        return result

    engine.__dict__["save_checkpoint"] = save_checkpoint

    def undo() -> None:
        with contextlib.suppress(KeyError):
            del engine.__dict__["save_checkpoint"]
        if before is not None:
            engine.__dict__["save_checkpoint"] = before

    return undo
