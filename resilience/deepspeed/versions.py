"""Which DeepSpeed was tested. Its internals are wrapped, so another version is refused rather than guessed at."""

from __future__ import annotations

from resilience.errors import UnsupportedVersionError

__all__ = ["TESTED_VERSIONS", "require_tested_version"]

TESTED_VERSIONS = ("0.19.8",)


def require_tested_version(version: str) -> None:
    """Refuse a DeepSpeed that was not tested.

    Args:
        version: `deepspeed.__version__`; a local part such as `+cu128` is ignored.

    Raises:
        UnsupportedVersionError: the version is not in `TESTED_VERSIONS`.
    """
    if version.partition("+")[0] not in TESTED_VERSIONS:
        raise UnsupportedVersionError(
            f"deepspeed {version} was not tested with this package (tested: {', '.join(TESTED_VERSIONS)}); "
            f"install deepspeed=={TESTED_VERSIONS[-1]}, or launch without --resilience"
        )
