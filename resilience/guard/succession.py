"""What a rank leaves to its successor, and takes from its predecessor: puts trail and fast-forward together.

Never here: anything that happens within a step.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from resilience.context import ARENA_VARIABLE, RESTORE_VARIABLE
from resilience.deepspeed.adapter import EngineAdapter
from resilience.deepspeed.leading import EngineLead, wrap_module_forward
from resilience.deepspeed.snapshot_load import load, read_prepared, resume_randomness
from resilience.errors import SnapshotError
from resilience.events import Mode
from resilience.guard.fast_forward import FastForward, Target
from resilience.guard.reporter import Reporter
from resilience.guard.settings import Settings
from resilience.guard.trail import StepOutcome, TrailWriter
from resilience.last_place import LastPlace
from resilience.snapshot.arena import Arena
from resilience.snapshot.manifest import Manifest, Part

if TYPE_CHECKING:
    from resilience.guard.transaction import Guard

__all__ = ["Succession", "succeed"]


class Succession:
    """Trail and fast-forward of one rank; without an arena there is neither."""

    def __init__(
        self,
        adapter: EngineAdapter,
        lead: EngineLead | None = None,
        trail: TrailWriter | None = None,
        fast_forward: FastForward | None = None,
        loader: _Loader | None = None,
        undo: list[Callable[[], None]] | None = None,
    ) -> None:
        self.trail = trail
        self.fast_forward = fast_forward
        self._adapter = adapter
        self._lead = lead
        self._loader = loader
        self._undo = undo if undo is not None else []

    def watch(self, guard: Guard) -> None:
        """See the calls of the model's own forward, too. Called before anybody verifies what the script loads."""
        if self._loader is not None:
            self._loader.load_checkpoint = self._adapter.engine.load_checkpoint
        if self.trail is not None:
            self._undo.append(wrap_module_forward(self._adapter.module, guard.module_called))

    def stand_in(self) -> None:
        """Be able to stand in for the engine. Called when all others have wrapped what they wrap."""
        if self._lead is not None:
            self._lead.install()
            self._undo.append(self._lead.uninstall)


def succeed(
    engine: Any,
    adapter: EngineAdapter,
    settings: Settings,
    reporter: Reporter,
    last_place: LastPlace | None,
    undo: list[Callable[[], None]],
    *,
    environ: Mapping[str, str] = os.environ,
) -> Succession:
    """What `environ` says that there is to leave and to take.

    Args:
        engine: under guard soon.
        adapter: its view.
        settings: this rank.
        reporter: the line to the coordinator.
        last_place: told of steps that the script is led past.
        undo: gets what takes everything off again.
        environ: of this process.
    """
    path, config = environ.get(ARENA_VARIABLE), settings.config
    if not path or not config.snapshot.fast_forward or config.mode is not Mode.ENFORCE:
        return Succession(adapter)
    lead = EngineLead(engine)
    tell = _teller(settings, reporter)
    if not lead.can_lead:
        tell(f"{type(engine).__name__} runs its own loop")
        return Succession(adapter)
    arena = Arena(Path(path))
    trail = TrailWriter(
        arena.trail(settings.rank),
        bytes_max=int(config.snapshot.trail_max_mib * (1 << 20)),
        source=adapter,
        outcome=lambda: StepOutcome(applied=adapter.step_was_applied, grad_norm=lead.grad_norm),
        tell=tell,
    )
    folder = environ.get(RESTORE_VARIABLE)
    loader = _Loader(engine, settings.rank)
    target, problem = (None, "") if not folder else _target(Path(folder), arena, settings, loader)
    fast_forward = FastForward(
        adapter,
        lead,
        target,
        settings=settings,
        reporter=reporter,
        trail=trail,
        place=last_place.begin if last_place is not None else _nowhere,
        problem=problem,
    )
    if folder:
        atexit.register(fast_forward.ended)
        undo.append(lambda: atexit.unregister(fast_forward.ended))
    return Succession(adapter, lead, trail, fast_forward, loader, undo)


def _target(folder: Path, arena: Arena, settings: Settings, loader: _Loader) -> tuple[Target | None, str]:
    """What was prepared for this rank; or why it cannot be read, in words."""
    try:
        manifest = read_prepared(folder)
        part = manifest.part(settings.rank)
    except SnapshotError as error:
        return None, str(error)
    target = Target(
        step=manifest.step,
        generation=manifest.generation,
        read_trail=lambda: _read_trail(folder / f"trail-{settings.rank}.bin", part),
        load=lambda: loader.load(folder, manifest),
        all_snapshots=lambda: _published(arena),
        full_loads=arena.full_loads,
    )
    return target, ""


class _Loader:
    """Loads what was prepared into the engine."""

    def __init__(self, engine: Any, rank: int) -> None:
        self._engine = engine
        self._rank = rank
        self.load_checkpoint: Callable[..., Any] = engine.load_checkpoint
        """DeepSpeed's own, as others watch it; not the one that verifies what a script loads."""

    def load(self, folder: Path, manifest: Manifest) -> None:
        """State, counters and random states of the snapshot; raises SnapshotError on all ranks alike. Collective."""
        load(self._engine, folder, manifest, rank=self._rank, load_checkpoint=self.load_checkpoint)
        resume_randomness(manifest.part(self._rank), source=str(folder))


def _read_trail(path: Path, part: Part) -> bytes:
    num_bytes = part.commit.trail_bytes
    if not num_bytes:
        raise SnapshotError(f"no trail was kept for the snapshot of step {part.commit.step}")
    try:
        content = path.read_bytes()[:num_bytes]
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) != num_bytes or xxhash.xxh3_128_hexdigest(content) != part.trail:
        raise SnapshotError(f"{path}: is not the trail that the manifest vouches for")
    return content


def _published(arena: Arena) -> Iterable[tuple[int, int]]:
    return arena.published()


def _teller(settings: Settings, reporter: Reporter) -> Callable[[str], None]:
    def tell(why: str) -> None:
        text = f"fast-forward off: {why}; a restart begins from what the script loads by itself"
        if settings.rank == 0:
            print(f"resilience: {text}", flush=True)
        reporter.note("fast_forward_off", f"rank {settings.rank}: {text}")

    return tell


def _nowhere(step: int, micro_step: int, attempt: int) -> None:
    """No place is kept outside of a run."""
