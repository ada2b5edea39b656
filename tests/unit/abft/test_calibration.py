"""Histograms of residuals, exact bounds on false alarms, and profiles that never go below what was seen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.abft.calibration import (
    FOLDER,
    MIN_CHECKS,
    Histogram,
    Recorder,
    SiteHistogram,
    false_positive_bound,
    load_profile,
    read_histograms,
    scale_of,
    write_profile,
)
from resilience.errors import ConfigError

QUIET = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def of(*ratios: float) -> SiteHistogram:
    found = SiteHistogram()
    for ratio in ratios:
        found.add(ratio)
    return found


@QUIET
@given(st.lists(st.one_of(st.floats(0.0, 1e300), st.sampled_from([math.inf, math.nan, 5e-324])), max_size=30))
def test_every_ratio_is_counted_once_and_quantiles_enclose_it(ratios: list[float]) -> None:
    found = of(*ratios)
    assert sum(found.counts) == found.num_checks == len(ratios)
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    assert found.max_ratio == max(finite, default=0.0)
    assert found.num_exceeded == sum(1 for ratio in ratios if not ratio <= 1.0)
    if ratios and len(finite) == len(ratios) and max(finite) < 1e4:
        assert found.quantile(1.0) == found.max_ratio
        middle = sorted(finite)[(len(finite) - 1) // 2]
        assert middle <= found.quantile(0.5) or middle < 1e-8
        assert found.quantile(0.5) <= max(middle * 10 ** (1 / 8) * 1.0001, 1e-8)


@QUIET
@given(st.lists(st.floats(1e-9, 1e5), max_size=20), st.lists(st.floats(1e-9, 1e5), max_size=20))
def test_merging_is_as_if_one_process_had_seen_it_all(one: list[float], other: list[float]) -> None:
    merged = of(*one)
    merged.merge(of(*other))
    assert merged == of(*one, *other)


def test_ranks_write_and_the_command_adds_up(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = Recorder(tmp_path, rank)
        recorder.add("linear.out", 0.1 * (rank + 1))
        recorder.write()
        again = Recorder(tmp_path, rank)  # the next generation goes on
        again.add("linear.out", 2.0, True)
        again.write()
    found = read_histograms(tmp_path).sites["linear.out"]
    assert (found.num_checks, found.num_exceeded, found.num_alarms, found.max_ratio) == (4, 2, 2, 2.0)
    assert [path.name for path in sorted((tmp_path / FOLDER).iterdir())] == ["rank-0.json", "rank-1.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sites": {"a": {"counts": [1]}}}', '{"sites": {"a": 3}}'])
def test_a_file_that_is_no_histogram_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FOLDER).mkdir()
    path = tmp_path / FOLDER / "rank-0.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="resilience calibrate"):
        read_histograms(tmp_path)


@pytest.mark.parametrize(
    ("num_alarms", "num_checks", "bound"),
    # Tables of exact one-sided 95 % limits.
    [
        (0, 10, 0.258866),
        (0, 100, 0.029513),
        (1, 10, 0.394163),
        (2, 20, 0.282619),
        (5, 100, 0.102254),
        (9, 10, 0.994884),
    ],
)
def test_bounds_are_those_of_clopper_and_pearson(num_alarms: int, num_checks: int, bound: float) -> None:
    assert false_positive_bound(num_alarms, num_checks) == pytest.approx(bound, abs=2e-6)


def test_none_in_n_is_about_three_in_n_and_nothing_seen_says_nothing() -> None:
    assert false_positive_bound(0, 1_000_000) == pytest.approx(3e-6, rel=2e-3)
    assert false_positive_bound(0, 0) == 1.0
    assert false_positive_bound(7, 7) == 1.0
    assert 1e-3 < false_positive_bound(1_000, 1_000_000) < 1.06e-3


@QUIET
@given(st.integers(0, 50), st.integers(1, 2_000))
def test_bounds_grow_with_alarms_and_shrink_with_checks(num_alarms: int, num_checks: int) -> None:
    bound = false_positive_bound(num_alarms, num_checks)
    assert num_alarms / num_checks <= bound <= 1.0 or num_alarms > num_checks
    assert bound <= false_positive_bound(num_alarms + 1, num_checks)
    assert false_positive_bound(num_alarms, num_checks + 100) <= bound


def test_a_profile_keeps_its_distance_from_what_was_seen(tmp_path: Path) -> None:
    histogram = Histogram()
    for site, ratio, num in (("quiet", 0.2, MIN_CHECKS), ("rare", 0.2, 5), ("loud", 3.0, 5), ("zero", 0.0, MIN_CHECKS)):
        for _ in range(num):
            histogram.add(site, ratio)
    for _ in range(MIN_CHECKS):
        histogram.add("broken", 0.2)
    histogram.add("broken", math.nan)
    assert {site: scale_of(one, safety_factor=2.0) for site, one in histogram.sites.items()} == {
        "quiet": 0.4,
        "rare": 1.0,
        "loud": 6.0,
        "zero": 1.0,
        "broken": 1.0,
    }
    path = tmp_path / "profile.toml"
    write_profile(histogram, path, safety_factor=2.0)
    assert load_profile(path) == {"quiet": 0.4, "rare": 1.0, "loud": 6.0, "zero": 1.0, "broken": 1.0}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "cannot be read"),
        ("scale = ", "profile"),
        ("safety_factor = 2.0", "names no sites"),
        ('[site."a"]\nscale = 0', "has scale 0"),
        ('[site."a"]\nscale = "x"', "has scale 'x'"),
        ('[site."a"]\nscale = nan', "has scale nan"),
    ],
)
def test_a_profile_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "profile.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_profile(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(Histogram(), tmp_path / "absent" / "p.toml", safety_factor=2.0)
