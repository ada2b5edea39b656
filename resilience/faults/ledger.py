"""The ledger of strikes: what the injectors of one rank have done in this run, on disk before its effect is felt.

A strike that kills the process must not kill it again in the next generation, and the record is the ground truth that
detections are held against. So each line is written and fsynced before the fault strikes, and read back at the start of
every generation. Never here: torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

from resilience.errors import FaultPlanError
from resilience.events import Strike

__all__ = ["STRIKES_DIRECTORY", "Ledger", "read_strikes"]

STRIKES_DIRECTORY = "strikes"


class Ledger:
    """Append-only JSON lines in `<run_dir>/strikes/rank-<rank>.jsonl`.

    Raises:
        FaultPlanError: the file cannot be written or read. A fault that is not recorded must not strike.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = run_dir / STRIKES_DIRECTORY / f"rank-{rank}.jsonl"
        self._strikes = _read(self.path)
        self._counts = Counter(_fault_of(strike) for strike in self._strikes)

    def strikes(self) -> list[Strike]:
        """All strikes of this rank in this run, of earlier generations too, oldest first."""
        return list(self._strikes)

    def num_strikes(self, fault: int) -> int:
        """How often the fault at this place in the plan has struck in this run."""
        return self._counts[fault]

    def next_id(self, fault: int) -> str:
        """The identity of the fault's next strike: `f<fault>-n<n>`, n from 0."""
        return f"f{fault}-n{self._counts[fault]}"

    def append(self, strike: Strike) -> None:
        """Record a strike that is about to happen; on return it is on disk."""
        line = json.dumps(dataclasses.asdict(strike)).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append_durably(self.path, line)
        except OSError as error:
            raise FaultPlanError(
                f"{self.path}: strike cannot be recorded ({error.strerror}); free or mend it"
            ) from None
        self._strikes.append(strike)
        self._counts[_fault_of(strike)] += 1


def read_strikes(run_dir: Path) -> list[Strike]:
    """The strikes of all ranks of a run, in the order in which they struck.

    Raises:
        FaultPlanError: a ledger cannot be read.
    """
    paths = sorted((run_dir / STRIKES_DIRECTORY).glob("rank-*.jsonl"))
    return sorted((strike for path in paths for strike in _read(path)), key=lambda strike: strike.struck_at)


def _append_durably(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b") as file:
        # A process that died in mid-write leaves a torn last line: the next one begins after the last whole line.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(path: Path) -> list[Strike]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FaultPlanError(f"{path}: ledger cannot be read ({error.strerror}); check its permissions") from None
    whole_lines = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        return [Strike(**json.loads(line)) for line in whole_lines]
    except (ValueError, TypeError):
        raise FaultPlanError(f"{path}: not a ledger of this version; use a fresh run directory") from None


def _fault_of(strike: Strike) -> int:
    """The fault's place in the plan, out of `f<fault>-n<n>`."""
    return int(strike.strike_id[1 : strike.strike_id.index("-")])
