"""A checkpoint that is doubted becomes a fact, under the name of its publication; told by rank 0, once for the job."""

from __future__ import annotations

from pathlib import Path

from resilience.checkpoint.doubt import Saved
from resilience.config import Config
from resilience.events import CheckpointFact, CheckpointKind
from resilience.guard.doubted import tell_doubted
from resilience.guard.reporter import Fact, SilentReporter
from resilience.guard.settings import Settings
from resilience.testing import FakeClock


def told_by(rank: int) -> list[Fact]:
    facts: list[Fact] = []
    settings = Settings(
        config=Config(), run_id="run", generation=2, rank=rank, node="a", device="a/0", clock=FakeClock(7.0)
    )
    saved = Saved(Path("/data/checkpoints"), "best/step4", 4)
    tell_doubted(settings, SilentReporter(on_fact=facts.append), saved, "why")
    return facts


def test_rank_0_tells_of_it_under_the_name_that_it_was_published_under() -> None:
    assert told_by(0) == [
        CheckpointFact(
            kind=CheckpointKind.DOUBTED,
            directory="/data/checkpoints",
            tag="best/step4",
            step=4,
            generation=2,
            last_verified_step=0,
            reason="why",
            at=7.0,
        )
    ]


def test_others_that_lead_a_storage_do_not_tell_of_it_again() -> None:
    assert told_by(1) == []
