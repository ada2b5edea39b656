"""From values to places on an axis, and the round values that are written beside it. Pure."""

from __future__ import annotations

import dataclasses
import datetime
import math

__all__ = ["Scale", "clock", "log_ticks", "moment", "number_ticks", "share", "time_ticks"]

_TIME_STEPS_S = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600 * hours for hours in (1, 2, 3, 6, 12, 24, 48, 96)),
    *(604800 * 2**power for power in range(12)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` on an axis of 100 %."""

    low: float
    high: float
    is_log: bool = False

    def percent(self, value: float) -> float:
        """Where `value` lies, within the axis."""
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        if high <= low:
            return 50.0
        return min(100.0, max(0.0, 100.0 * (at - low) / (high - low)))


def number_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values within low … high: multiples of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten within low … high."""
    return [10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def time_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About `count` round moments within low … high (seconds since the Unix epoch) with their local time of day."""
    span = high - low
    if span < 2:
        return [(low + offset, f"+{round(offset, 6):g} s") for offset in number_ticks(0.0, span, count)]
    step = next((each for each in _TIME_STEPS_S if each * count >= span), _TIME_STEPS_S[-1])
    shift = _utc_offset_s(low)
    first = math.ceil((low + shift) / step)
    moments = [index * step - shift for index in range(first, math.floor((high + shift) / step) + 1)]
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 86400 else "%d %b"
    labels = [(at, _local(at).strftime(form)) for at in moments]
    return [(at, _local(at).strftime("%d %b") if text == "00:00" else text) for at, text in labels]


def moment(at: float) -> str:
    """A date and time of day with its zone."""
    return _local(at).strftime("%Y-%m-%d %H:%M:%S %Z")


def clock(at: float, since: float) -> str:
    """A time of day; with the date where it is not that of `since`."""
    then, now = _local(since), _local(at)
    return now.strftime("%H:%M:%S" if then.date() == now.date() else "%d %b %H:%M:%S")


def share(part: float, whole: float) -> str:
    """A part of a whole in percent; what is almost nothing or almost all is not rounded to it."""
    percent = 100.0 * part / whole if whole > 0 else 0.0
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def _local(at: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at).astimezone()


def _utc_offset_s(at: float) -> float:
    offset = _local(at).utcoffset()
    return 0.0 if offset is None else offset.total_seconds()
