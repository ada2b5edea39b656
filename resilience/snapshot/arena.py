"""The arena of one node: a folder on tmpfs with everything that the memory tier keeps. Paths, making, removing, room.

    <snapshot.dir>/resilience-<uid>-<run id>-<node>/      0700; made by the agent, removed at the end of the run
      owner.json                          the run and the agent; locked for as long as agent or guardian live
      guardian.json                       where the guardian answers
      generation.json                     whose commits make a snapshot: for a guardian that was started again
      rank-<r>/slot-<i>/state/…           the files of DeepSpeed's checkpoint
      rank-<r>/slot-<i>/commit.json       absent while the slot is being written
      rank-<r>/trail.bin                  what leads a restarted script forward
      manifests/<step>-g<generation>.json this node's part of a snapshot, whole and hashed
      holds.json                          snapshots that ranks must not overwrite
      peers/…                             parity for other nodes
      restore-g<generation>/              what the ranks of that generation load

Whoever is killed leaves its arena behind; the kernel gives its lock back, so that the next run of the same user sees
that nobody holds it and removes it. Nothing is ever removed here but folders with a well-formed `owner.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from resilience.errors import SnapshotError
from resilience.snapshot.manifest import STATE

__all__ = ["Arena", "Owner", "Room", "make", "remove_run", "remove_stale", "room", "write_atomically"]

_OWNER = "owner.json"
_RANK = re.compile(r"rank-(\d+)\Z")
_SLOT = re.compile(r"slot-(\d+)\Z")
_MANIFEST = re.compile(r"(\d+)-g(\d+)\.json\Z")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose an arena is."""

    run_id: str
    node: str
    run_dir: str
    pid: int
    """Of the agent, for people: whether it lives is told by the lock, which also holds across containers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a folder on tmpfs can still take."""

    free: int
    """Left in the file system."""
    available: int
    """Left in memory, within the limit of this process's control group."""

    @property
    def bytes(self) -> int:
        return min(self.free, self.available)


class Arena:
    """Paths below one arena. Making one of these touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.guardian = path / "guardian.json"
        self.generation = path / "generation.json"
        self.holds = path / "holds.json"
        self.manifests = path / "manifests"
        self.peers = path / "peers"

    @classmethod
    def of(cls, directory: Path, *, run_id: str, node: str) -> Arena:
        """The arena of a node of a run below `directory`."""
        return cls(directory / f"resilience-{os.getuid()}-{run_id}-{_UNSAFE.sub('_', node)}")

    def rank(self, rank: int) -> Path:
        """Folder of a rank."""
        return self.path / f"rank-{rank}"

    def slot(self, rank: int, slot: int) -> Path:
        """Folder of a slot: the `save_dir` of its checkpoint, whose tag is `state`."""
        return self.rank(rank) / f"slot-{slot}"

    def state(self, rank: int, slot: int) -> Path:
        """Folder of a slot's files."""
        return self.slot(rank, slot) / STATE

    def commit(self, rank: int, slot: int) -> Path:
        """A rank's word that the slot is whole; absent while it is not."""
        return self.slot(rank, slot) / "commit.json"

    def trail(self, rank: int) -> Path:
        return self.rank(rank) / "trail.bin"

    def manifest(self, step: int, generation: int) -> Path:
        """This node's manifest of a snapshot."""
        return self.manifests / f"{step}-g{generation}.json"

    def restore(self, generation: int) -> Path:
        """Folder that is prepared for the ranks of a generation."""
        return self.path / f"restore-g{generation}"

    @property
    def full_loads(self) -> Path:
        """Is there once a rank ended between a load without the optimizer's shards and the snapshot: load all from then
        on."""
        return self.path / "full-loads"

    def ranks(self) -> list[int]:
        """Ranks that have a folder here."""
        return sorted(int(match[1]) for name in _names(self.path) if (match := _RANK.match(name)))

    def slots(self, rank: int) -> list[int]:
        """Slots that a rank has made."""
        return sorted(int(match[1]) for name in _names(self.rank(rank)) if (match := _SLOT.match(name)))

    def published(self) -> list[tuple[int, int]]:
        """(step, generation) of each manifest, oldest first; one that is being written does not count."""
        found = [match for name in _names(self.manifests) if (match := _MANIFEST.match(name))]
        return sorted(((int(m[1]), int(m[2])) for m in found), key=lambda pair: (pair[1], pair[0]))

    def owner(self) -> Owner | None:
        """Whose it is; None where that cannot be told."""
        return _owner(self.path)

    def hold(self) -> int:
        """Show that somebody needs this arena, until this process ends or the descriptor is closed.

        Raises:
            SnapshotError: it is gone, or is being removed.
        """
        try:
            descriptor = os.open(self.path / _OWNER, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotError(f"{self.path}: the arena cannot be held ({error.strerror}); was it removed?") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise SnapshotError(f"{self.path}: the arena is being removed by another run") from None
        return descriptor

    def remove(self) -> None:
        """Remove everything. Processes that have files of it mapped keep them until they end."""
        _remove(self.path)


def make(directory: Path, *, run_id: str, node: str, run_dir: Path) -> tuple[Arena, int]:
    """Make the arena of a node, and hold it; what a dead run left under its name is removed first.

    Args:
        directory: on tmpfs; it must exist.
        run_id: the run.
        node: this node's name.
        run_dir: the run's directory, for telling runs of the same name apart.

    Returns:
        The arena, and the descriptor that holds it.

    Raises:
        SnapshotError: one line that says why there can be none, and what to do.
    """
    arena = Arena.of(directory, run_id=run_id, node=node)
    if arena.path.is_symlink() or (arena.path.exists() and not _is_own(arena.path)):
        raise SnapshotError(
            f"{arena.path}: belongs to another user or is no folder; remove it, or give another snapshot.dir"
        )
    if arena.path.exists() and not _remove_if_unheld(arena.path):
        raise SnapshotError(
            f"{arena.path}: a run of the same name is going on here (agent pid {_pid_of(arena.path)}); "
            "give this one another run id"
        )
    owner = Owner(run_id=run_id, node=node, run_dir=str(run_dir), pid=os.getpid())
    try:
        arena.path.mkdir(mode=0o700)
        descriptor = _take(arena.path, owner)
        arena.manifests.mkdir()
        arena.peers.mkdir()
    except OSError as error:
        arena.remove()
        raise SnapshotError(
            f"snapshot.dir {directory}: no arena can be made in it ({error.strerror}); "
            "give a folder on tmpfs that you may write to, or turn snapshots off with snapshot.interval_steps = 0"
        ) from None
    return arena, descriptor


def remove_stale(directory: Path) -> list[str]:
    """Remove the arenas of this user that nobody holds any more: their runs are dead.

    Returns:
        The names that were removed.
    """
    prefix = f"resilience-{os.getuid()}-"
    candidates = [directory / name for name in _names(directory) if name.startswith(prefix)]
    return sorted(path.name for path in candidates if _owner(path) is not None and _remove_if_unheld(path))


def remove_run(directory: Path, *, run_id: str, run_dir: Path) -> list[str]:
    """Remove every arena of one run on this machine, whoever still holds it. Call it when the run's processes ended.

    Returns:
        The names that were removed.
    """
    removed = []
    for name in _names(directory):
        path = directory / name
        if not name.startswith(f"resilience-{os.getuid()}-{run_id}-") or not _is_own(path):
            continue
        owner = _owner(path)
        if owner is not None and (owner.run_id, owner.run_dir) == (run_id, str(run_dir)):
            _remove(path)
            removed.append(name)
    return sorted(removed)


def room(directory: Path) -> Room:
    """How much more this folder can take.

    Raises:
        SnapshotError: it is not there.
    """
    try:
        usage = os.statvfs(directory)
    except OSError as error:
        raise SnapshotError(f"snapshot.dir {directory}: cannot be looked at ({error.strerror})") from None
    return Room(free=usage.f_bavail * usage.f_frsize, available=min(_memory_available(), _group_available()))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: readers see the old or the new one. For tmpfs: nothing is made durable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _take(path: Path, owner: Owner) -> int:
    """Write `owner.json`, locked from the moment that it can be seen; the descriptor that holds it."""
    temporary = path / f".{_OWNER}"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.write(descriptor, json.dumps(dataclasses.asdict(owner)).encode())
    temporary.replace(path / _OWNER)
    return descriptor


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def _is_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
    return False


def _owner(path: Path) -> Owner | None:
    if not _is_own(path):
        return None
    try:
        return Owner(**json.loads((path / _OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _pid_of(path: Path) -> str:
    owner = _owner(path)
    return "unknown" if owner is None else str(owner.pid)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody holds the arena; nobody can begin to while this lasts."""
    try:
        descriptor = os.open(path / _OWNER, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # its maker died before it was finished, or it is half removed
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_if_unheld(path: Path) -> bool:
    with _locked(path) as is_free:
        if is_free:
            _remove(path)
        return is_free


def _remove(path: Path) -> None:
    """Remove a tree, its `owner.json` last: until then a killed remover leaves what the next one recognises."""
    for name in _names(path):
        entry = path / name
        if name == _OWNER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _memory_available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo does not say what is available")


def _group_available() -> int:
    """What the memory limit of the control group (v2) leaves; where there is none, more than any machine has."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        current = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - current)
