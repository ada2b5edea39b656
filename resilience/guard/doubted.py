"""Tells of checkpoints that were saved between damage to the state and its discovery."""

from __future__ import annotations

from resilience.checkpoint.doubt import Saved
from resilience.events import CheckpointFact, CheckpointKind
from resilience.guard.reporter import Reporter
from resilience.guard.settings import Settings

__all__ = ["tell_doubted"]


def tell_doubted(settings: Settings, reporter: Reporter, saved: Saved, text: str) -> None:
    """Say that a checkpoint is loaded no more, or could not be marked.

    Args:
        settings: of this rank.
        reporter: the line to the coordinator.
        saved: the checkpoint.
        text: what became of it, in words.
    """
    if settings.rank != 0:  # it leads a storage of its node's own, with the same checkpoints
        reporter.note("checkpoint_doubted", text)
        return
    reporter.report(
        CheckpointFact(
            kind=CheckpointKind.DOUBTED,
            directory=str(saved.directory),
            tag=saved.tag,
            step=saved.step,
            generation=settings.generation,
            last_verified_step=0,
            reason=text,
            at=settings.clock.wall(),
        )
    )
