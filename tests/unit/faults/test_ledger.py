"""Strikes are counted per run, on disk, whatever happens to the process that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.errors import FaultPlanError
from resilience.events import Strike
from resilience.faults.ledger import Ledger, read_strikes


def strike(strike_id: str, *, rank: int = 0, struck_at: float = 1.0, **more: object) -> Strike:
    address = {"step": 3, "micro_step": 1, "site": "gradient", "layer": 2, "kind": "scale"}
    return Strike(strike_id=strike_id, rank=rank, struck_at=struck_at, **(address | more))  # type: ignore[arg-type]


def test_strikes_survive_their_process(tmp_path: Path) -> None:
    first = Ledger(tmp_path, 0)
    assert (first.num_strikes(2), first.next_id(2)) == (0, "f2-n0")
    first.append(strike("f2-n0", relative_change=float("inf")))
    first.append(strike("f12-n0", no_effect=True, attempt=1))

    later = Ledger(tmp_path, 0)
    assert later.strikes() == first.strikes()
    assert (later.num_strikes(2), later.num_strikes(12), later.num_strikes(1)) == (1, 1, 0)
    assert later.next_id(2) == "f2-n1"


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    ledger.append(strike("f0-n0"))
    with ledger.path.open("ab") as file:
        file.write(b'{"strike_id": "f0-n')

    later = Ledger(tmp_path, 0)
    assert later.num_strikes(0) == 1
    later.append(strike("f0-n1"))
    assert [s.strike_id for s in Ledger(tmp_path, 0).strikes()] == ["f0-n0", "f0-n1"]


def test_ranks_do_not_count_for_each_other_and_are_read_together(tmp_path: Path) -> None:
    Ledger(tmp_path, 1).append(strike("f0-n0", rank=1, struck_at=2.0))
    Ledger(tmp_path, 0).append(strike("f1-n0", rank=0, struck_at=1.0))
    assert Ledger(tmp_path, 0).num_strikes(0) == 0
    assert [s.strike_id for s in read_strikes(tmp_path)] == ["f1-n0", "f0-n0"]
    assert read_strikes(tmp_path / "other") == []


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strikes" / "rank-0.jsonl"
    path.parent.mkdir()
    path.write_text('{"what": 1}\n', encoding="utf-8")
    with pytest.raises(FaultPlanError, match="not a ledger of this version"):
        Ledger(tmp_path, 0)


def test_what_cannot_be_recorded_does_not_strike(tmp_path: Path) -> None:
    (tmp_path / "strikes").write_text("in the way", encoding="utf-8")
    with pytest.raises(FaultPlanError, match="ledger cannot be read"):
        Ledger(tmp_path, 0)
    (tmp_path / "strikes").unlink()
    ledger = Ledger(tmp_path, 0)
    (tmp_path / "strikes").write_text("in the way", encoding="utf-8")
    with pytest.raises(FaultPlanError, match="strike cannot be recorded"):
        ledger.append(strike("f0-n0"))
    assert ledger.num_strikes(0) == 0
