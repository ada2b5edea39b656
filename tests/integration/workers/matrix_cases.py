"""The cells of the support matrix that are run: what differs from case to case. Read by the worker and by the tests."""

from __future__ import annotations

import dataclasses
import itertools

__all__ = ["CASES", "Case"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration of an engine, a model and a training loop."""

    name: str
    zero: int = 2
    precision: str = "bf16"
    accumulation: int = 2
    model: str = "gpt"
    """`gpt` (the tests' own), `gpt2` and `llama` (Hugging Face, from config), `convolution` (batch statistics)."""
    attention: str = "eager"
    checkpointing: str = ""
    """`reentrant` or `plain`."""
    backward: str = "engine"
    """`engine`: engine.backward(loss); `direct`: loss.backward(); `outside`: the script computes the loss."""
    boundary: str = "managed"
    """`managed`; `script`: managed_gradient_accumulation = false; `forced`: set_gradient_accumulation_boundary;
    `no_sync`; `joint`: two forwards, one backward; `apart`: two forwards, then a backward for each, by `script`."""
    offload: bool = False
    sharded: bool = False
    """With ZeRO-3: no parameter is small enough to stay gathered."""
    loss_scale: float = 0.0
    """With fp16: a static loss scale; 0 searches for one."""


def _cases() -> list[Case]:
    grid = [
        Case(
            name=f"zero{zero}-{precision}-accumulation{accumulation}",
            zero=zero,
            precision=precision,
            accumulation=accumulation,
        )
        for zero, precision, accumulation in itertools.product((0, 1, 2, 3), ("fp32", "bf16", "fp16"), (1, 2))
    ]
    hugging_face = [
        Case(
            name=f"{model}-{attention}-{kind or 'stored'}",
            model=model,
            attention=attention,
            checkpointing=kind,
            zero=zero,
        )
        for (model, attention), (kind, zero) in itertools.product(
            itertools.product(("gpt2", "llama"), ("eager", "sdpa")), (("", 2), ("reentrant", 1), ("plain", 3))
        )
    ]
    loops = [
        Case(name="direct-zero1", backward="direct", zero=1),
        Case(name="direct-zero2", backward="direct", zero=2),
        Case(name="direct-zero3-llama", backward="direct", zero=3, model="llama"),
        Case(name="outside-zero0", backward="outside", zero=0, model="convolution", precision="fp32"),
        Case(name="outside-zero2", backward="outside", zero=2, model="convolution", precision="fp32"),
        Case(name="script-zero0", boundary="script", zero=0, precision="fp32"),
        Case(name="script-zero1", boundary="script", zero=1),
        Case(name="script-zero2", boundary="script", zero=2),
        Case(name="script-zero3", boundary="script", zero=3),
        Case(name="forced-zero2", boundary="forced", zero=2),
        Case(name="no-sync-zero0", boundary="no_sync", zero=0),
        Case(name="no-sync-zero1", boundary="no_sync", zero=1),
        Case(name="joint-zero2", boundary="joint", zero=2),
        Case(name="joint-zero3", boundary="joint", zero=3),
        Case(name="apart-zero2", boundary="apart", zero=2, accumulation=1),
        Case(name="reentrant-zero2-llama", model="llama", checkpointing="reentrant", zero=2),
        Case(name="reentrant-zero3-gpt2", model="gpt2", checkpointing="reentrant", zero=3),
        Case(name="zero2-fp16-static-scale", precision="fp16", loss_scale=128.0),
        *(Case(name=f"offload-zero{zero}", offload=True, zero=zero) for zero in (1, 2, 3)),
    ]
    return [*grid, *hugging_face, *loops]


CASES = _cases()
