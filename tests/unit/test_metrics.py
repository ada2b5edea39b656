"""The table of metrics: names, labels, and the page that is drawn from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.metrics import BY_NAME, METRICS, Kind, as_markdown, bucket_of

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
MARK = "<!-- drawn by resilience.metrics.as_markdown() -->\n"


def test_the_documentation_holds_the_table() -> None:
    assert DOCS.read_text(encoding="utf-8").partition(MARK)[2] == as_markdown(), (
        "docs/metrics.md is out of date: replace what follows its mark by the output of\n"
        '  python -c "from resilience.metrics import as_markdown; print(as_markdown(), end=str())"'
    )


def test_no_label_grows_with_the_run() -> None:
    bounded = {
        "run",
        "rank",
        "node",
        "device",
        "site",
        "kind",
        "verdict",
        "action",
        "outcome",
        "cause",
        "tier",
        "method",
        "phase",
    }
    assert all(set(metric.labels) <= bounded for metric in METRICS)


def test_names_follow_prometheus() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


@pytest.mark.parametrize(("value", "index"), [(0.0, 0), (0.001, 0), (0.0011, 1), (299.0, 11), (1e9, 12)])
def test_a_value_falls_into_the_first_bucket_that_holds_it(value: float, index: int) -> None:
    assert bucket_of(BY_NAME["decision_seconds"], value) == index
