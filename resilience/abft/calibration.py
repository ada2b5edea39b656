"""What the residuals of clean runs say about the thresholds: histograms by site, bounds on false alarms, profiles.

A rank adds every residual ÷ threshold to its `Histogram` and leaves it in the run directory; `resilience calibrate`
adds up those of all ranks, bounds the probability of a false alarm, and writes a *profile*: a factor on the threshold
of each site. Plain Python: the command runs where torch is not installed. Never here: checks, launching.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resilience.errors import ConfigError

__all__ = [
    "FOLDER",
    "Histogram",
    "Recorder",
    "SiteHistogram",
    "false_positive_bound",
    "load_profile",
    "read_histograms",
    "scale_of",
    "write_profile",
]

FOLDER = "calibration"
"""In the run directory; holds `rank-<r>.json`."""

BINS_PER_DECADE = 8
_LOWEST = -8
_HIGHEST = 4
_NUM_BINS = (_HIGHEST - _LOWEST) * BINS_PER_DECADE + 2
_OFFSET = 1 - _LOWEST * BINS_PER_DECADE

MIN_CHECKS = 1_000
"""Checks of a site below which a profile never makes its threshold smaller."""

_ADDED_PER_WRITE = 20_000


@dataclasses.dataclass(slots=True)
class SiteHistogram:
    """Residual ÷ threshold of the checks of one site."""

    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * _NUM_BINS)
    """By size: the first bin holds what is below 1e-8, the last what is above 1e4 or not a number, between them
    `BINS_PER_DECADE` bins a decade."""
    num_checks: int = 0
    num_exceeded: int = 0
    """Ratios above 1 or not a number: a second stage looked at them, or they were alarms."""
    num_alarms: int = 0
    """Findings. In a run without faults, false ones."""
    max_ratio: float = 0.0
    """Largest finite ratio."""

    def add(self, ratio: float, *, alarm: bool = False) -> None:
        """Note one check."""
        self.num_checks += 1
        self.num_alarms += alarm
        if math.isfinite(ratio):
            self.max_ratio = max(self.max_ratio, ratio)
            slot = int(math.log10(ratio) * BINS_PER_DECADE + _OFFSET) if ratio > 0.0 else 0
            self.counts[min(max(slot, 0), _NUM_BINS - 1)] += 1
        else:
            self.counts[-1] += 1
        if not ratio <= 1.0:
            self.num_exceeded += 1

    def merge(self, other: SiteHistogram) -> None:
        """Add what another process saw."""
        self.counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        self.num_checks += other.num_checks
        self.num_exceeded += other.num_exceeded
        self.num_alarms += other.num_alarms
        self.max_ratio = max(self.max_ratio, other.max_ratio)

    def quantile(self, share: float) -> float:
        """Upper edge of the bin that the smallest ratio lies in that `share` of the checks do not exceed."""
        wanted = share * self.num_checks
        seen = 0
        for slot, count in enumerate(self.counts):
            seen += count
            if seen >= wanted and seen:
                edge = 10.0 ** ((slot + 1 - _OFFSET) / BINS_PER_DECADE)
                return math.inf if slot == _NUM_BINS - 1 else min(edge, self.max_ratio)
        return 0.0


class Histogram:
    """Residual ÷ threshold of every check of a process, by site."""

    def __init__(self, sites: Mapping[str, SiteHistogram] | None = None) -> None:
        self.sites: dict[str, SiteHistogram] = dict(sites or {})

    def add(self, site: str, ratio: float, alarm: bool = False) -> None:
        """Note one check. About a microsecond."""
        found = self.sites.get(site)
        if found is None:
            found = self.sites[site] = SiteHistogram()
        found.add(ratio, alarm=alarm)

    def merge(self, other: Histogram) -> None:
        """Add what another process saw."""
        for site, histogram in other.sites.items():
            self.sites.setdefault(site, SiteHistogram()).merge(histogram)

    def write(self, path: Path) -> None:
        """Write as JSON, atomically; the folder is made where it is missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema_version": 1, "sites": {site: dataclasses.asdict(one) for site, one in self.sites.items()}}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Histogram:
        """Read what `write` wrote.

        Raises:
            ConfigError: it is not such a file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {site: SiteHistogram(**fields) for site, fields in content["sites"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}: is no histogram of residuals; run `resilience calibrate` again") from None
        if any(len(one.counts) != _NUM_BINS for one in found.values()):
            raise ConfigError(f"{path}: was written by another version; run `resilience calibrate` again")
        return cls(found)


class Recorder:
    """The histogram of one rank, and its file. Goes on with what an earlier generation of the same run left there.

    Args:
        run_dir: directory of the run.
        rank: of this process.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / FOLDER / f"rank-{rank}.json"
        self._histogram = Histogram.read(self._path) if self._path.exists() else Histogram()
        self._num_unwritten = 0

    def add(self, site: str, ratio: float, alarm: bool = False) -> None:
        """Note one check; now and then write the file."""
        self._histogram.add(site, ratio, alarm)
        self._num_unwritten += 1
        if self._num_unwritten >= _ADDED_PER_WRITE:
            self.write()

    def write(self) -> None:
        """Write the file, if there is anything new."""
        if self._num_unwritten:
            self._histogram.write(self._path)
            self._num_unwritten = 0


def read_histograms(run_dir: Path) -> Histogram:
    """What all ranks of a run saw."""
    found = Histogram()
    for path in sorted((run_dir / FOLDER).glob("rank-*.json")):
        found.merge(Histogram.read(path))
    return found


# --- bounds -----------------------------------------------------------------------------------------------------------


def false_positive_bound(num_alarms: int, num_checks: int, *, confidence: float = 0.95) -> float:
    """Upper bound of the probability of an event seen `num_alarms` times in `num_checks` (Clopper and Pearson).

    The p at which so few events have a probability of 1 − confidence; about 3 ÷ n for none in n. 1 without checks.
    """
    if num_checks == 0 or num_alarms >= num_checks:
        return 1.0
    if num_alarms == 0:
        return -math.expm1(math.log1p(-confidence) / num_checks)
    low, high = num_alarms / num_checks, 1.0
    for _ in range(200):
        middle = (low + high) / 2.0
        if _probability_of_at_most(num_alarms, num_checks, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def _probability_of_at_most(k: int, n: int, p: float) -> float:
    """Binomial distribution, by its terms from the largest down: p is above k ÷ n, so they fall."""
    if p >= 1.0:
        return 0.0
    log_term = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    )
    term = total = math.exp(log_term)
    for i in range(k, 0, -1):
        term *= i * (1.0 - p) / ((n - i + 1) * p)
        total += term
        if term < total * 1e-17:
            break
    return total


# --- profiles ---------------------------------------------------------------------------------------------------------


def scale_of(histogram: SiteHistogram, *, safety_factor: float) -> float:
    """Factor on the site's threshold: `safety_factor` above the largest ratio that was seen.

    Not below 1 where there were fewer than `MIN_CHECKS`, or ratios that were not numbers.
    """
    scale = safety_factor * histogram.max_ratio
    is_known = histogram.num_checks >= MIN_CHECKS and histogram.counts[-1] == 0 and scale > 0.0
    return scale if is_known else max(scale, 1.0)


def write_profile(histogram: Histogram, path: Path, *, safety_factor: float) -> None:
    """Write a TOML file that `detection.profile` reads: for each site the factor, and what it stands on.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = [
        "# Factors on the thresholds of detection, by site; written by `resilience calibrate`, for detection.profile.",
        "# They hold for the model, the dtypes, the shapes and the library versions that were run.",
        f"safety_factor = {safety_factor}",
    ]
    for site, one in sorted(histogram.sites.items()):
        lines += [
            "",
            f'[site."{site}"]',
            f"scale = {scale_of(one, safety_factor=safety_factor):.6g}",
            f"max_ratio = {one.max_ratio:.6g}",
            f"num_checks = {one.num_checks}",
            f"num_alarms = {one.num_alarms}",
            f"false_positive_bound = {false_positive_bound(one.num_alarms, one.num_checks):.6g}",
        ]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def load_profile(path: Path) -> dict[str, float]:
    """The factor on the threshold of each site; sites that it does not name have 1.

    Raises:
        ConfigError: the file cannot be read, or is no profile.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"detection.profile = {str(path)!r}: cannot be read ({error.strerror}); `resilience calibrate` writes one"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"detection.profile = {str(path)!r}: {' '.join(str(error).split())}") from None
    sites = content.get("site")
    if not isinstance(sites, dict) or not sites:
        raise ConfigError(f"detection.profile = {str(path)!r}: names no sites; write one with `resilience calibrate`")
    return dict(_scales(path, sites))


def _scales(path: Path, sites: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for site, fields in sites.items():
        scale = fields.get("scale") if isinstance(fields, dict) else None
        if not isinstance(scale, int | float) or not 0.0 < scale < math.inf:
            raise ConfigError(
                f"detection.profile = {str(path)!r}: site {site!r} has scale {scale!r}; a number above 0 is needed"
            )
        yield site, float(scale)
