"""What the checks of one process have seen since somebody last asked: findings, counts, clean residuals, time.

Results that lie on a GPU wait here as device tensors until `drain` reads them all at once. No checks, no repairs.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TypeVar

import torch

from resilience.abft.adaptive import Measured, is_due
from resilience.abft.defects import defects
from resilience.abft.finding import Finding
from resilience.abft.labels import Label
from resilience.clock import Clock
from resilience.events import Check, DetectionKind

__all__ = ["Record"]

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_MAX_FINDINGS = 4096
"""Findings kept between two drains, of what was mended and of what followed from bad inputs; a tensor of NaN would
otherwise fill memory with its consequences. As many again are kept of what stayed wrong: the first of them decides."""

_SAMPLE_SIZE = 64
"""Clean residual ratios kept between two readings."""


class Record:
    """Written by the checks, read by the guard.

    Args:
        share: share of the calls of each site that are to be checked, until `set_shares` says otherwise.
        clock: wall time of findings, monotonic time of checks and operations.
    """

    def __init__(self, *, share: float, clock: Clock) -> None:
        self._seed = secrets.randbits(64)  # ranks and restarts do not pass over the same calls
        self._share = share
        self._shares: Mapping[str, float] = {}
        self.clock = clock
        self._findings: list[Finding] = []
        self._num_findings: Counter[bool] = Counter()
        """Of those, by whether they are faults that stayed."""
        self._deferred: list[tuple[Label, Check, float, torch.Tensor]] = []
        self._sample: list[float] = []
        self._num_clean = 0
        self._random = random.Random(0)
        self.replaying = False
        """Set while a step is repeated. Then all is checked, whatever the share, or a lasting fault would seem to be
        gone; and all is read at once, on every device, so that the second stage tells a fault from round-off."""
        self.calls: Counter[str] = Counter()
        """Operations that were asked about, by site."""
        self.checks: Counter[str] = Counter()
        """Operations checked, by site."""
        self.unprotected: Counter[str] = Counter()
        """Operations that multiply matrices and ran unchecked, by reason; calls beyond `share` are not among them."""
        self.num_failed = 0
        """Checks that went wrong themselves; by reason they are among the unprotected operations."""
        self.operation_seconds: defaultdict[str, float] = defaultdict(float)
        """Time that the operations themselves took, by site."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Time spent in checks and repairs, by site."""
        self.settling_seconds: defaultdict[str, float] = defaultdict(float)
        """The part of it that followed suspicions."""
        self.settled_s = 0.0
        """Of that, all sites together."""
        self.on_ratio: Callable[[str, float, bool], None] | None = None
        """Told the site and the residual ÷ threshold of every check, and whether it raised an alarm."""

    @property
    def check_seconds(self) -> float:
        """Time spent in checks and repairs."""
        return math.fsum(self.seconds.values())

    def measured(self) -> dict[str, Measured]:
        """Calls, checks and their times, by site, since the process began.

        What follows a suspicion is no cost of a check: a device that errs would be looked at less for it.
        """
        return {
            site: Measured(
                num_calls=num_calls,
                num_checks=self.checks[site],
                operation_s=self.operation_seconds[site],
                check_s=self.seconds[site] - self.settling_seconds[site],
            )
            for site, num_calls in self.calls.items()
        }

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """From now on check these shares of the calls of these sites."""
        self._shares = dict(shares)

    def due(self, site: str) -> bool:
        """Whether this call is among the share that is checked; counts it if so."""
        call = self.calls[site]
        self.calls[site] = call + 1
        share = self._shares.get(site, self._share)
        if share < 1.0 and not self.replaying and not is_due(call, share, self._seed ^ zlib.crc32(site.encode())):
            return False
        self.checks[site] += 1
        return True

    def follows(self, site: str, is_due: bool) -> bool:
        """The same for a call that is checked if, and only if, the one that it belongs to was."""
        self.calls[site] += 1
        self.checks[site] += is_due
        return is_due

    def reads_at_once(self, result: torch.Tensor) -> bool:
        """Whether the check of `result` is read now; else it waits on the device for the boundary."""
        return result.is_cpu or self.replaying

    def count_unprotected(self, reason: str) -> None:
        """Note an operation that no check understands."""
        self.unprotected[reason] += 1

    def checking(self, site: str) -> AbstractContextManager[float]:
        """Around a check: gives the monotonic time of its beginning, and adds what it takes to that of the site.

        What goes wrong within is a defect of ours, or memory that only a check has asked for: the operation has run,
        the script goes on with its result, and the check counts as not made.
        """
        return _Checking(self, site)

    @contextmanager
    def settling(self, label: Label, check: Check, ratio: float, started: float) -> Iterator[None]:
        """Around what follows a suspicion: where that goes wrong, the operation is reported as faulty and unmended."""
        suspected = self.clock.monotonic()
        try:
            yield
        except defects() as error:
            self.failed(label.site, error)
            self.alarm(label, check, DetectionKind.MISMATCH, ratio, started)
        finally:
            self.settled_s += self.clock.monotonic() - suspected

    def failed(self, site: str, error: BaseException) -> None:
        """Note a check that went wrong itself."""
        reason = f"the check of {site} failed ({type(error).__name__})"
        if reason not in self.unprotected:
            _log.warning("%s; the operation's result is used as it is", reason, exc_info=error)
        self.count_unprotected(reason)
        self.num_failed += 1

    def not_made(self, site: str, error: BaseException) -> None:
        """Note a check that went wrong after it was counted as due: it is none of those that were made."""
        self.failed(site, error)
        self.checks[site] -= 1

    def operation(self, site: str, run: Callable[[], Result]) -> Result:
        """Run an operation, and add its time to that of the site's operations."""
        started = self.clock.monotonic()
        result = run()
        self.operation_seconds[site] += self.clock.monotonic() - started
        return result

    def clean(self, site: str, ratio: float) -> None:
        """Note a residual ÷ threshold that raised no alarm (reservoir sampling)."""
        if self.on_ratio is not None:
            self.on_ratio(site, ratio, False)
        self._num_clean += 1
        if len(self._sample) < _SAMPLE_SIZE:
            self._sample.append(ratio)
            return
        slot = self._random.randrange(self._num_clean)
        if slot < _SAMPLE_SIZE:
            self._sample[slot] = ratio

    def dismissed(self, site: str, ratio: float) -> None:
        """Note an alarm of the first stage that the second one did not confirm."""
        if self.on_ratio is not None:
            self.on_ratio(site, ratio, False)

    def alarm(
        self,
        label: Label,
        check: Check,
        kind: DetectionKind,
        ratio: float,
        started: float,
        *,
        mended: bool = False,
        bit_exact: bool = True,
        inputs_bad: bool = False,
    ) -> None:
        """Note an alarm. A repair is bit-exact, by the same call again, unless it is said to be none."""
        if self.on_ratio is not None and not inputs_bad:
            self.on_ratio(label.site, ratio, True)
        is_fault = not (mended or inputs_bad)
        if self._num_findings[is_fault] >= _MAX_FINDINGS:
            return
        self._num_findings[is_fault] += 1
        self._findings.append(
            Finding(
                site=label.site,
                layer=label.layer,
                check=check,
                kind=kind,
                residual_ratio=ratio if math.isfinite(ratio) else math.inf,
                mended=mended,
                bit_exact=mended and bit_exact,
                inputs_bad=inputs_bad,
                detected_at=self.clock.wall(),
                latency_ms=(self.clock.monotonic() - started) * 1e3,
            )
        )

    def defer(self, label: Label, check: Check, result: torch.Tensor) -> None:
        """Keep (worst ratio, whether the inputs were bad), shape (2,), on its device until the next drain."""
        self._deferred.append((label, check, self.clock.monotonic(), result))

    def drain(self) -> list[Finding]:
        """Everything that was noted since the last call; waits for the device if results are deferred there."""
        deferred, self._deferred = self._deferred, []
        if deferred:
            results = _values([result for *_, result in deferred])
            for (label, check, started, _), (ratio, inputs_bad) in zip(deferred, results, strict=True):
                if ratio <= 1.0:
                    self.clean(label.site, ratio)
                else:
                    kind = DetectionKind.MISMATCH if math.isfinite(ratio) else DetectionKind.NAN
                    self.alarm(label, check, kind, ratio, started, inputs_bad=bool(inputs_bad))
        findings, self._findings = self._findings, []
        self._num_findings.clear()
        return findings

    def sample(self) -> list[float]:
        """Up to 64 clean ratios since the last call, drawn uniformly."""
        sample, self._sample, self._num_clean = self._sample, [], 0
        return sample


def _values(results: list[torch.Tensor]) -> list[list[float]]:
    """The elements of tensors of one shape, read once from each of their devices."""
    places: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, result in enumerate(results):
        places[result.device].append(place)
    values: dict[int, list[float]] = {}
    for at in places.values():
        values.update(zip(at, torch.stack([results[place] for place in at]).tolist(), strict=True))
    return [values[place] for place in range(len(results))]


class _Checking:
    """What `Record.checking` gives: around every product, so no generator."""

    __slots__ = ("_record", "_settled_s", "_site", "_started")

    def __init__(self, record: Record, site: str) -> None:
        self._record = record
        self._site = site

    def __enter__(self) -> float:
        self._settled_s = self._record.settled_s
        self._started = self._record.clock.monotonic()
        return self._started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        record, is_ours = self._record, error is not None and isinstance(error, defects())
        if error is not None and is_ours:
            record.not_made(self._site, error)
        record.seconds[self._site] += record.clock.monotonic() - self._started
        if record.settled_s != self._settled_s:
            record.settling_seconds[self._site] += record.settled_s - self._settled_s
        return is_ours
