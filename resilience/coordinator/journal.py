"""The journal: every fact of a run, in order, durable before it is acted on. SQLite in WAL mode on a local disk.

A commit survives the death of the process at any time (`synchronous = NORMAL`: after a power failure the newest commits
may be gone, but the journal is whole; the node that held the coordinator is lost then anyway). The copy in the run
directory is one plain file without a WAL, safe on a network file system and good for reading only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pydantic

from resilience.coordinator.machine import Machine
from resilience.coordinator.machine.effects import Effect, Record
from resilience.coordinator.machine.facts import FACTS, Fact
from resilience.errors import ResilienceError, UsageError

__all__ = [
    "SCHEMA_VERSION",
    "Journal",
    "JournalError",
    "Recorded",
    "decode_fact",
    "encode_fact",
    "open_recorded",
    "replay",
    "set_aside",
]

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS facts (
    sequence INTEGER PRIMARY KEY,   -- place in the run's story, from 1 without gaps
    at REAL NOT NULL,               -- seconds since the Unix epoch
    kind TEXT NOT NULL,             -- name of the fact's type
    body TEXT NOT NULL              -- its fields as JSON
) STRICT;
"""


class JournalError(ResilienceError):
    """A journal cannot be read or written."""


class Journal:
    """Facts on disk. One writer; use it as a context manager."""

    def __init__(self, connection: sqlite3.Connection, path: Path, lock: int | None = None) -> None:
        self._connection = connection
        self._lock = lock
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create the journal at `path` for writing.

        Raises:
            JournalError: it cannot be opened, another process writes it, or it is of another version.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _lock(path)
        except OSError as error:
            raise _cannot_open(path, error) from None
        if lock is None:
            raise JournalError(
                f"journal {path} is being written by another coordinator; give each run a launch.run_id of its own"
            )
        try:
            connection = sqlite3.connect(path, isolation_level=None)
            os.chmod(path, 0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
            journal = cls(connection, path, lock)
            journal._check_version()
        except (OSError, sqlite3.Error) as error:
            os.close(lock)
            raise _cannot_open(path, error) from None
        except JournalError:
            journal.close()
            raise
        return journal

    @classmethod
    def open_read_only(cls, path: Path) -> Journal:
        """Open a journal that must exist, without ever changing it.

        Raises:
            JournalError: it is missing, not a journal, or of another version.
        """
        if not path.is_file():
            raise JournalError(f"journal {path} does not exist; was the run started with --resilience?")
        try:
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
            journal = cls(connection, path)
            journal._check_version()
        except sqlite3.Error as error:
            raise JournalError(f"journal {path} cannot be read: {error}") from None
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the WAL is folded into it."""
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, records: Iterable[Record]) -> None:
        """Make `records` durable, all or none.

        Raises:
            JournalError: the disk is full or gone; nothing of them may be acted on.
        """
        rows = [(record.at, type(record.fact).__name__, encode_fact(record.fact)) for record in records]
        if not rows:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT INTO facts (at, kind, body) VALUES (?, ?, ?)", rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise JournalError(f"journal {self.path} cannot be written: {error}") from None

    def read(self) -> Iterator[tuple[Fact, float]]:
        """All facts with their times, oldest first.

        Raises:
            JournalError: a row is not a fact of this version.
        """
        try:
            for sequence, at, kind, body in self._connection.execute("SELECT * FROM facts ORDER BY sequence"):
                yield decode_fact(kind, body, where=f"{self.path}, fact {sequence}"), at
        except sqlite3.Error as error:
            raise JournalError(f"journal {self.path} cannot be read: {error}") from None

    def copy_to(self, target: Path) -> None:
        """Leave a consistent copy at `target`, atomically, as one file without a WAL.

        Raises:
            JournalError: the target cannot be written.
        """
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(temporary)) as copy:
                self._connection.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
            temporary.replace(target)
        except (OSError, sqlite3.Error) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise JournalError(f"journal cannot be copied to {target}: {error}") from None

    def _check_version(self) -> None:
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        if row is None or int(row[0]) != SCHEMA_VERSION:
            found = "none" if row is None else row[0]
            raise JournalError(
                f"journal {self.path} has schema version {found}, this program reads {SCHEMA_VERSION};"
                " use the version of deepspeed-resilience that wrote it"
            )


def _cannot_open(path: Path, error: Exception) -> JournalError:
    return JournalError(f"journal {path} cannot be opened: {error}; is its directory writable?")


def _lock(path: Path) -> int | None:
    """The right to write the journal at `path`, held until it is closed or the process dies; None where it is taken."""
    descriptor = os.open(path.with_name("journal.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def set_aside(path: Path) -> None:
    """Before a new run begins: put away the journal that an earlier run of the same name left at `path`.

    A coordinator goes on with the journal that it finds, also with that of a run that has ended.

    Raises:
        UsageError: that run is going on, or the journal cannot be moved.
    """
    if not path.exists():
        return
    run_id, kept, number = path.parent.name, path.parent, 0
    try:
        lock = _lock(path)
        if lock is None:
            raise UsageError(
                f"launch.run_id = {run_id!r}: a run of this name is going on on this machine; choose another"
            )
        while kept.exists():
            number += 1
            kept = path.parent.with_name(f"{run_id}~{number}")  # no run is called so: names have no tilde
        path.parent.rename(kept)
        os.close(lock)
    except OSError as error:
        raise UsageError(f"journal {path} of an earlier run cannot be put aside ({error.strerror})") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """A run as its journal tells it."""

    machine: Machine
    effects: tuple[Effect, ...]
    """What facts asked to be remembered outside of the journal, to be executed again."""
    last_at: float
    """Time of the newest fact; 0 for an empty journal."""
    num_facts: int


def replay(journal: Journal, *, now: float) -> Recorded:
    """Rebuild the machine; leases count from `now`."""
    machine = Machine(now=now)
    effects: list[Effect] = []
    last_at, count = 0.0, 0
    for fact, at in journal.read():
        effects += machine.restore(fact, at)
        last_at, count = at, count + 1
    return Recorded(machine, tuple(effects), last_at, count)


def open_recorded(path: Path) -> Recorded:
    """Read the journal at `path`, live or copied, without changing it.

    Raises:
        JournalError: it is missing, damaged, empty or of another version.
    """
    with Journal.open_read_only(path) as journal:
        recorded = replay(journal, now=0.0)
    if recorded.num_facts == 0:
        raise JournalError(f"journal {path} is empty: its run never began")
    return recorded


@functools.cache
def _adapter(kind: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(FACTS[kind])


def encode_fact(fact: Fact) -> str:
    """The fields of a fact as JSON."""
    # Python's JSON writes infinities, which residuals may be; pydantic's own would write null.
    plain = _adapter(type(fact).__name__).dump_python(fact, mode="json")
    return json.dumps(plain, separators=(",", ":"))


def decode_fact(kind: str, body: str, *, where: str) -> Fact:
    """The fact that `encode_fact` wrote.

    Raises:
        JournalError: it is not one of this version; the text begins with `where`.
    """
    if kind not in FACTS:
        raise JournalError(f"{where}: kind {kind!r} is not known; the journal is from a newer version or damaged")
    try:
        return cast(Fact, _adapter(kind).validate_python(json.loads(body)))
    except (ValueError, pydantic.ValidationError) as error:
        raise JournalError(f"{where}: {kind} cannot be read ({' '.join(str(error).split())[:200]})") from None
