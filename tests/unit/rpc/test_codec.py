"""Round trips of every value, and the limits on what comes from the wire."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.events import Decision, Detection, Evidence, OrderAnswer, RankExit, Strike
from resilience.rpc import codec
from resilience.rpc.v1 import coordinator_pb2 as pb

# What every field may hold on the wire: 32-bit numbers, text without lone surrogates, floats without NaN (NaN != NaN).
st.register_type_strategy(int, st.integers(0, 2**31 - 1))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FLOATS = st.floats(allow_nan=False)


def values(cls: type) -> st.SearchStrategy[Any]:
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for name, hint in cls.__annotations__.items():
        if hint == "str":
            fields[name] = TEXT
        elif hint == "str | None":
            fields[name] = st.none() | TEXT.filter(bool)
        elif hint == "float":
            fields[name] = FLOATS
        elif hint == "float | None":
            fields[name] = st.none() | FLOATS
        elif hint == "tuple[str, ...]":
            fields[name] = st.lists(TEXT, max_size=3).map(tuple)
        elif hint == "tuple[Detection, ...]":
            fields[name] = st.lists(values(Detection), max_size=2).map(tuple)
    return st.builds(cls, **fields)


@pytest.mark.parametrize("cls", [Detection, Evidence, Decision, Strike, RankExit, OrderAnswer])
def test_what_is_sent_is_what_arrives(cls: type) -> None:
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(values(cls))
    def round_trip(value: Any) -> None:
        message = codec.to_proto(value)
        read = type(message).FromString(message.SerializeToString())
        codec.check_bounds(read)
        assert codec.from_proto(read) == value

    round_trip()


def test_infinite_residual_survives() -> None:
    message = pb.Detection(check=pb.CHECK_SCREEN, kind=pb.DETECTION_KIND_INF, residual_ratio=math.inf)
    assert codec.from_proto(message).residual_ratio == math.inf


def test_an_enum_that_is_not_set_is_named() -> None:
    with pytest.raises(codec.BoundsError, match=r"Detection\.check = 0"):
        codec.from_proto(pb.Detection(kind=pb.DETECTION_KIND_INF))


def test_an_enum_of_a_newer_version_is_named() -> None:
    message = pb.Decision.FromString(pb.Decision(decision_id="x").SerializeToString() + b"\x28\x63")
    with pytest.raises(codec.BoundsError, match=r"Decision\.action = 99.*another version"):
        codec.from_proto(message)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.LeaveRequest(reason="x" * (codec.MAX_STRING_BYTES + 1)), r"LeaveRequest\.reason is longer"),
        (pb.ReportRequest(notes=[pb.Note()] * (codec.MAX_ITEMS + 1)), r"ReportRequest\.notes has 4097 items"),
        (
            pb.DecideRequest(evidence=pb.Evidence(detections=[pb.Detection(site="é" * 2100)])),
            r"DecideRequest\.evidence\.detections\[0\]\.site is longer",
        ),
        (pb.ReportRequest(badput_seconds={"x" * 5000: 1.0}), r"badput_seconds is longer"),
    ],
)
def test_oversized_parts_are_refused_by_name(message: Any, text: str) -> None:
    with pytest.raises(codec.BoundsError, match=text):
        codec.check_bounds(message)


def test_long_text_of_our_own_is_cut_not_refused() -> None:
    strike = RankExit(generation=1, rank=0, node="n", device="d", exit_code=1, message="é" * 5000)
    message = codec.to_proto(strike)
    codec.check_bounds(message)
    assert message.message.endswith("…")
