"""What devices did over all jobs, and which are out of use: a database of its own beside the journals.

Several coordinators may share it. Every write is idempotent, so that a recovered coordinator may repeat its own: faults
are keyed by run, step and device, and an older word on a cordon never overrides a newer one.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from pathlib import Path
from typing import Any

from resilience.coordinator.machine.effects import RememberCordon, RememberFault
from resilience.errors import ResilienceError

__all__ = ["DeviceHistory", "DeviceRecord", "DevicesError"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS faults (
    run_id TEXT NOT NULL, fault_id TEXT NOT NULL, device TEXT NOT NULL, node TEXT NOT NULL,
    verdict TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (run_id, fault_id, device)
) STRICT;
CREATE INDEX IF NOT EXISTS faults_of_device ON faults (device);
CREATE TABLE IF NOT EXISTS cordons (
    device TEXT PRIMARY KEY, node TEXT NOT NULL, cordoned INTEGER NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL
) STRICT;
"""

_BUSY_TIMEOUT_S = 5.0


class DevicesError(ResilienceError):
    """The device history cannot be read or written."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """One device, over all jobs."""

    device: str
    node: str
    cordoned: bool
    reason: str
    num_transient: int
    num_persistent: int
    last_fault_at: float


class DeviceHistory:
    """The database. Safe to be used by several coordinators of a node at once."""

    def __init__(self, path: Path) -> None:
        """Open or create it.

        Raises:
            DevicesError: it cannot be opened.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
            os.chmod(path, 0o600)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise DevicesError(f"device history {path} cannot be opened: {error}; is its directory writable?") from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def remember_fault(self, run_id: str, fault: RememberFault) -> None:
        """Write down a settled fault, once."""
        self._execute(
            "INSERT OR REPLACE INTO faults VALUES (?, ?, ?, ?, ?, ?)",
            (run_id, fault.fault_id, fault.device, fault.node, str(fault.verdict), fault.at),
        )

    def remember_cordon(self, cordon: RememberCordon) -> None:
        """Write down that a device is out of use, or back, unless something newer is known."""
        self._execute(
            "INSERT INTO cordons VALUES (?, ?, ?, ?, ?) ON CONFLICT (device) DO UPDATE SET"
            " node = excluded.node, cordoned = excluded.cordoned, reason = excluded.reason, at = excluded.at"
            " WHERE excluded.at >= cordons.at",
            (cordon.device, cordon.node, int(cordon.cordoned), cordon.reason, cordon.at),
        )

    def records(self) -> list[DeviceRecord]:
        """Every device that was ever at fault or cordoned, by node and device."""
        rows = self._execute(
            "SELECT device, max(node), max(cordoned), max(reason), sum(transient), sum(persistent), max(at) FROM ("
            " SELECT device, node, 0 AS cordoned, '' AS reason, verdict = 'transient' AS transient,"
            "  verdict = 'persistent' AS persistent, at FROM faults"
            " UNION ALL SELECT device, node, cordoned, iif(cordoned, reason, ''), 0, 0, 0 FROM cordons"
            ") GROUP BY device ORDER BY 2, 1",
            (),
        )
        return [
            DeviceRecord(
                device=row[0],
                node=row[1],
                cordoned=bool(row[2]),
                reason=row[3],
                num_transient=row[4],
                num_persistent=row[5],
                last_fault_at=row[6],
            )
            for row in rows
        ]

    def _execute(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise DevicesError(f"device history {self.path}: {error}") from None
