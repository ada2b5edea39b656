"""A trail that cannot be written ends with a reason, once, and training goes on; a load that fails is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from resilience.config import Config
from resilience.errors import CheckpointError, SnapshotError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.guard.exchange import Exchange
from resilience.guard.fast_forward import FastForward, Target
from resilience.guard.reporter import Fact, SilentReporter
from resilience.guard.settings import Settings
from resilience.guard.trail import StepOutcome, TrailWriter
from resilience.guard.trail_reader import read_trail
from resilience.testing import FakeClock

CLOCK = FakeClock()


class NoStates:
    """An engine without generators of its own."""

    def rng_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_rng_states(self, states: dict[str, torch.Tensor]) -> None:
        assert not states


def writer(path: Path, told: list[str], *, bytes_max: int = 1 << 20) -> TrailWriter:
    return TrailWriter(
        path,
        bytes_max=bytes_max,
        source=NoStates(),
        outcome=lambda: StepOutcome(applied=True, grad_norm=None),
        tell=told.append,
    )


def go_on(trail: TrailWriter, steps: range) -> None:
    for step in steps:
        began = trail.before_forward((torch.ones(2),), {})
        trail.after_forward(began, 0, None, torch.ones(1))
        trail.step_taken(step, deterministic=None)


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("method", ["mkdir", "write_bytes", "replace"])
def test_a_trail_that_cannot_be_begun_ends_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    told: list[str] = []
    trail = writer(tmp_path / "rank-0" / "trail.bin", told)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, full)
        go_on(trail, range(1, 2))
    go_on(trail, range(2, 4))
    assert told == [f"the trail {tmp_path}/rank-0/trail.bin cannot be written (No space left on device)"]
    assert trail.num_bytes == 0, "a snapshot that vouched for a part of it would vouch for nothing"
    assert not list(tmp_path.glob("rank-0/*")), "nothing half written is left"


def test_a_trail_that_cannot_be_continued_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    path = tmp_path / "trail.bin"
    go_on(writer(path, told), range(1, 3))
    content = path.read_bytes()
    trail = writer(path, told)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        trail.continue_from(content, 2)
    go_on(trail, range(3, 5))
    assert len(told) == 1
    assert "No space left" in told[0]
    assert (path.read_bytes(), trail.num_bytes) == (content, 0)


def test_a_disk_that_fills_up_where_the_budget_ends_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    trail = writer(tmp_path / "trail.bin", told, bytes_max=30_000)
    go_on(trail, range(1, 2))
    monkeypatch.setattr(Path, "open", full)
    go_on(trail, range(2, 200))
    assert len(told) == 1, told


class StandIn(NoStates):
    """An engine that counts, and what stands in for its step."""

    def __init__(self) -> None:
        self.global_steps = 0

    def begin(self, refuse: Callable[[str], NoReturn]) -> None: ...

    def end(self) -> None: ...

    def ends_step(self) -> bool:
        return True

    def optimizer_step(self, lr_kwargs: Any, *, applied: bool, grad_norm: Any) -> None:
        CLOCK.advance(10.0)
        self.global_steps += 1


class Left(Exception):
    """The rank left for a new generation."""


class Alone:
    """The guard of a job of one rank."""

    exchange = Exchange()

    def __init__(self) -> None:
        self.at: int | None = None

    def caught_up(self, step: int, *, deterministic: bool | None) -> None:
        self.at = step

    def leave_for_restart(self, reason: str) -> NoReturn:
        raise Left(reason)


def forwarding(
    target: Target, on_fact: Callable[[Any], None], host: Alone | None = None, trail: TrailWriter | None = None
) -> FastForward:
    engine = StandIn()
    settings = Settings(config=Config(), run_id="run", generation=2, rank=0, node="a", device="cpu", clock=CLOCK)
    forward = FastForward(
        engine,  # type: ignore[arg-type]  # what it uses of an adapter
        engine,  # type: ignore[arg-type]  # … and of a lead
        target,
        settings=settings,
        reporter=SilentReporter(on_fact=on_fact),
        trail=trail,
        place=lambda *_: None,
    )
    forward.attach(host or Alone())
    return forward


def trail_of_two_steps(tmp_path: Path) -> Callable[[], bytes]:
    path = tmp_path / "before.bin"
    past = writer(path, [])
    for step in (1, 2):
        past.step_taken(step, deterministic=True)
    assert list(read_trail(path.read_bytes(), after=0, through=2, source="it")) == [1, 2]
    return path.read_bytes


def target(tmp_path: Path, read: Callable[[], bytes], load: Callable[[], None] = lambda: None) -> Target:
    """The snapshot of step 2."""
    return Target(
        step=2, generation=1, read_trail=read, load=load, all_snapshots=lambda: [(1, 1), (2, 1)],
        full_loads=tmp_path / "full-loads",
    )  # fmt: skip


def led(tmp_path: Path, load: Callable[[], None], trail: TrailWriter | None = None) -> tuple[Alone, list[Fact]]:
    """A script of two steps that is led to a snapshot of the second one."""
    facts: list[Fact] = []
    host = Alone()
    forward = forwarding(target(tmp_path, trail_of_two_steps(tmp_path), load), facts.append, host, trail)
    assert forward.active
    forward.step((), {})
    forward.step((), {})
    assert not forward.active
    return host, facts


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        SnapshotError("bytes differ"),
        CheckpointError("no random states of this version"),
    ],
)
def test_a_load_that_fails_is_refused_and_the_rank_leaves(tmp_path: Path, error: Exception) -> None:
    """One that only raised would be chosen again by the next generation, and fail again."""
    refused: list[Fact] = []

    def load() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SilentReporter, "report", lambda _, fact: refused.append(fact))
        with pytest.raises(Left, match="is not loaded"):
            led(tmp_path, load)
    assert [(f.kind, f.step) for f in refused if isinstance(f, SnapshotFact)] == [(SnapshotKind.REFUSED, 2)]


def no_trail() -> bytes:
    raise SnapshotError("no trail was kept")


@pytest.mark.parametrize("relies", [False, True])
def test_a_trail_that_cannot_be_read_matters_to_whoever_relies_on_the_snapshot(tmp_path: Path, relies: bool) -> None:
    """A script whose load left the optimizer's state out must not train on from there, whatever it catches."""
    refused: list[tuple[int, int]] = []
    forward = forwarding(target(tmp_path, no_trail), lambda fact: refused.append((fact.step, fact.generation)))
    assert not forward.goes_beyond(1), "it could not be led from there"
    forward.relies_on_snapshot = relies
    if relies:
        for reason in ("no trail was kept", "without having reached it"):
            with pytest.raises(Left, match=reason):
                _ = forward.active
    else:
        assert not forward.active
    assert refused[:2] == [(1, 1), (2, 1)]


def test_a_load_may_leave_out_what_the_snapshot_brings(tmp_path: Path) -> None:
    forward = forwarding(target(tmp_path, trail_of_two_steps(tmp_path)), lambda fact: None)
    assert forward.goes_beyond(0)
    assert forward.goes_beyond(1)
    assert not forward.goes_beyond(2)
    assert forward.active
    assert not forward.goes_beyond(0), "what the script does from here on is training"


@pytest.mark.parametrize("how", ["save", "end"])
def test_after_a_light_load_that_came_to_nothing_loads_leave_nothing_out(tmp_path: Path, how: str) -> None:
    """The next generation is led all the same: no snapshot is refused."""
    facts: list[Fact] = []
    aim = target(tmp_path, trail_of_two_steps(tmp_path))
    forward = forwarding(aim, facts.append)
    assert forward.goes_beyond(1)
    forward.relies_on_snapshot = True
    if how == "save":
        with pytest.raises(Left, match="the script saves"):
            forward.begin_again("the script saves a checkpoint before it trains")
    else:
        forward.ended()
    again = forwarding(aim, facts.append)
    assert not again.goes_beyond(1)
    assert again.active
    assert not facts


def test_a_full_disk_on_arrival_costs_the_trail_and_not_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    trail = writer(tmp_path / "now" / "trail.bin", told)

    def load() -> None:
        CLOCK.advance(0.5)
        monkeypatch.setattr(Path, "write_bytes", full)

    host, facts = led(tmp_path, load, trail)
    assert host.at == 2
    (fact,) = facts
    assert isinstance(fact, SnapshotFact)
    assert (fact.kind, fact.seconds) == (SnapshotKind.LOADED, 0.5), "what loading took, not the way there"
    assert len(told) == 1
    assert "No space left" in told[0]
