"""The support matrix: the published page is what the code announces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from resilience.guard.support import ROWS, EngineProfile, as_markdown, problems

PLAIN = EngineProfile(
    engine_class="DeepSpeedEngine",
    zero_stage=2,
    precision="bf16",
    optimizer_class="DeepSpeedZeroOptimizer",
    optimizer_name="adamw",
)


def test_the_published_matrix_is_drawn_from_the_rows() -> None:
    published = Path(__file__).parents[3] / "docs" / "support-matrix.md"
    assert published.read_text(encoding="utf-8") == as_markdown(), (
        "write resilience.guard.support.as_markdown() to docs/support-matrix.md"
    )


def test_what_is_plain_is_supported() -> None:
    assert problems(PLAIN) == []
    assert problems(dataclasses.replace(PLAIN, zero_stage=3, precision="fp16", offload="cpu")) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"engine_class": "PipelineEngine"}, "pipeline"),
        ({"engine_class": "DeepSpeedHybridEngine"}, "hybrid"),
        ({"offload": "nvme"}, "NVMe"),
        ({"has_moe_layers": True}, "mixture of experts"),
        ({"optimizer_name": "onebitadam"}, "1-bit"),
        ({"optimizer_name": "muon"}, "Muon"),
        ({"zenflow": True}, "ZenFlow"),
        ({"super_offload": True}, "SuperOffload"),
        ({"compiled_zero": True}, "DeepCompile"),
        ({"quantized_gradients": True}, "quantized"),
        ({"model_parallel_size": 2}, "tensor parallelism"),
        ({"sequence_parallel_size": 2}, "sequence parallelism"),
        ({"is_first_engine": False}, "second engine"),
    ],
)
def test_what_is_off_is_named(change: dict[str, object], named: str) -> None:
    found = problems(dataclasses.replace(PLAIN, **change))  # type: ignore[arg-type]
    assert len(found) == 1
    assert named in found[0]


def test_each_row_that_is_off_can_be_recognised() -> None:
    for row in ROWS:
        if row.supported == "replay off":
            assert row.applies is not None, row.what
