"""The support matrix: what of an engine's configuration the guard covers, and what serves where it does not. Pure.

`docs/support-matrix.md` is `as_markdown()`; a test compares them. What is off is said at start, never silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

__all__ = ["ROWS", "EngineProfile", "Row", "as_markdown", "problems"]

INSTEAD = "restart from the last verified checkpoint serves instead"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """What an engine is made of, as far as it matters here."""

    engine_class: str
    """`DeepSpeedEngine`, or a class derived from it."""
    zero_stage: int
    precision: str
    """`fp32`, `bf16` or `fp16`."""
    optimizer_class: str
    optimizer_name: str
    """Name in the DeepSpeed configuration, lower case; empty for a client's own."""
    offload: str = ""
    """`cpu` or `nvme` where the optimizer or parameters are offloaded."""
    has_moe_layers: bool = False
    zenflow: bool = False
    super_offload: bool = False
    compiled_zero: bool = False
    """DeepCompile: DeepSpeed's own compiler passes reduce the gradients."""
    quantized_gradients: bool = False
    model_parallel_size: int = 1
    sequence_parallel_size: int = 1
    is_first_engine: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the matrix."""

    what: str
    supported: str
    """`yes`, or what is off."""
    how_tested: str
    applies: Callable[[EngineProfile], bool] | None = None
    """For what is off: whether an engine is concerned."""


_DERIVED = "PipelineEngine", "DualPipeVEngine", "DeepSpeedHybridEngine"
_ONE_BIT = "onebitadam", "zerooneadam", "onebitlamb"

ROWS: tuple[Row, ...] = (
    Row("ZeRO 0, 1, 2, 3 with fp32 or bf16", "yes", "test_matrix: plain, protected, replayed, bit for bit"),
    Row("fp16 with static or dynamic loss scale", "yes", "test_matrix, where the device computes in fp16"),
    Row("gradient accumulation, managed by DeepSpeed", "yes", "test_matrix"),
    Row("gradient accumulation, managed by the script (`managed_gradient_accumulation = false`)", "yes", "test_matrix"),
    Row("`set_gradient_accumulation_boundary` (as Accelerate does)", "yes", "test_matrix"),
    Row("`engine.no_sync()` (ZeRO 0 and 1)", "yes", "test_matrix"),
    Row("`engine.backward(loss)`", "yes", "test_matrix"),
    Row("`loss.backward()` where DeepSpeed itself allows it (ZeRO 1 to 3)", "yes", "test_matrix"),
    Row(
        "loss computed by the script from outputs that are no scalars",
        "yes, where they replay bit-equal",
        "test_matrix",
    ),
    Row("several forwards for one backward, or ahead of a backward for each", "yes", "test_matrix"),
    Row("activation checkpointing, reentrant and not", "yes", "test_matrix"),
    Row("Hugging Face outputs (`ModelOutput`), eager and sdpa", "yes", "test_matrix"),
    Row("dropout, batch statistics, torch, numpy and Python generators", "yes", "test_matrix"),
    Row("optimizer offload to the CPU (ZeRO 1 to 3)", "yes", "test_matrix"),
    Row(
        "offload to NVMe",
        "replay off",
        "announced",
        lambda p: p.offload == "nvme",
    ),
    Row("pipeline and hybrid engines", "replay off", "announced", lambda p: p.engine_class in _DERIVED),
    Row("mixture of experts", "replay off", "announced", lambda p: p.has_moe_layers),
    Row("1-bit optimizers", "replay off", "announced", lambda p: p.optimizer_name in _ONE_BIT),
    Row("Muon", "replay off", "announced", lambda p: p.optimizer_name == "muon"),
    Row("ZenFlow", "replay off", "announced", lambda p: p.zenflow),
    Row("SuperOffload", "replay off", "announced", lambda p: p.super_offload),
    Row("DeepCompile", "replay off", "announced", lambda p: p.compiled_zero),
    Row("quantized gradients (ZeRO++)", "replay off", "announced", lambda p: p.quantized_gradients),
    Row("tensor parallelism", "replay off", "announced", lambda p: p.model_parallel_size > 1),
    Row("Ulysses sequence parallelism", "replay off", "announced", lambda p: p.sequence_parallel_size > 1),
    Row("a second engine in the same process", "not protected", "announced", lambda p: not p.is_first_engine),
    Row("`engine.coalesce_grad_reduction()`", "replay off for that step", "announced in the decision", None),
    Row("outputs of the model that the script changes in place", "replay off for that step", "test_recorder"),
    Row(
        "inputs that require gradients, or of types that may change unseen", "replay off for that step", "test_recorder"
    ),
)


def problems(profile: EngineProfile) -> list[str]:
    """What of this engine is off, in words; empty where all is on."""
    return [row.what for row in ROWS if row.applies is not None and row.applies(profile)]


def as_markdown() -> str:
    """The matrix, for docs/support-matrix.md."""
    lines = [
        "# What the guard supports",
        "",
        "Drawn from `resilience/guard/support.py`. Where replay is off, that is printed when training starts, and "
        f"{INSTEAD}, and weights and optimizer state are not checked at rest. Detection within the step goes on all "
        "the same.",
        "",
        "| configuration | supported | how it is held |",
        "|---|---|---|",
    ]
    lines += [f"| {row.what} | {row.supported} | {row.how_tested} |" for row in ROWS]
    return "\n".join(lines) + "\n"
