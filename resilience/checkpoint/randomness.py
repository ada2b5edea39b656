"""A rank's random states as JSON, so that nothing needs to be unpickled to get them back.

Covered: torch on the CPU and on the current CUDA device, numpy's and Python's global generators, and named extra
states (DeepSpeed's tracker). Generators that a script makes for itself are its own business.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy
import torch

from resilience.errors import CheckpointError

__all__ = ["capture", "restore"]


def capture(extra: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The states of all global generators.

    Args:
        extra: further states by name, each a byte tensor of one dimension.
    """
    name, keys, position, has_gauss, gauss = cast("tuple[str, Any, int, int, float]", numpy.random.get_state())
    version, words, next_gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [name, base64.b64encode(keys.astype("<u4").tobytes()).decode(), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
        "extra": {key: _encode(state) for key, state in extra.items()},
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def restore(states: Mapping[str, Any], *, source: str) -> dict[str, torch.Tensor]:
    """Set all global generators back to what `capture` saw.

    Returns:
        The extra states, for the caller to install.

    Raises:
        CheckpointError: `states` is not what `capture` wrote.
    """
    try:
        torch_state, cuda_state = _decode(states["torch"]), states.get("cuda")
        name, keys, position, has_gauss, gauss = states["numpy"]
        numpy_state = (name, numpy.frombuffer(base64.b64decode(keys), dtype="<u4"), position, has_gauss, gauss)
        version, words, next_gauss = states["python"]
        extra = {key: _decode(state) for key, state in states["extra"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: not random states of this version ({error!r})") from None
    torch.set_rng_state(torch_state)
    numpy.random.set_state(numpy_state)
    random.setstate((version, tuple(words), next_gauss))
    if cuda_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(cuda_state))
    return extra


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
