"""Per rank: the step transaction, evidence, replay, and the line to the coordinator.

The only contact with DeepSpeed is through `resilience.deepspeed`. `import resilience.guard` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience.config import Config
    from resilience.context import RunContext

__all__ = ["protect"]


def protect(engine: Any, settings: Config | RunContext | None = None) -> Any:
    """Put a DeepSpeed engine under guard, for those who launch without `deepspeed --resilience`.

    Collective: every rank calls it once, right after `deepspeed.initialize`. In a run that was launched with
    `--resilience` the engine is under guard already, and comes back as it is.

    Args:
        engine: what `deepspeed.initialize` returned first.
        settings: a configuration (no coordinator: decisions are the ranks' own), the context of a run, or None for
            the defaults.

    Returns:
        `engine`.

    Raises:
        UnsupportedVersionError: this DeepSpeed was not tested.
    """
    from resilience.deepspeed import hook

    return hook.protect(engine, settings)
