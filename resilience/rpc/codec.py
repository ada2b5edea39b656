"""Facts as protobuf messages and back. The only place that knows both forms; it must never import grpc.

The messages mirror the values of `resilience.events` field by field, so one table of types is enough. Absent values
(None) are empty strings or unset optional fields on the wire. What comes from the wire is bounded before it is read:
`check_bounds` for sizes, `from_proto` for values that must not be missing.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, overload

from google.protobuf.message import Message

from resilience import events
from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = [
    "GRPC_OPTIONS",
    "MAX_ITEMS",
    "MAX_MESSAGE_BYTES",
    "MAX_STRING_BYTES",
    "BoundsError",
    "check_bounds",
    "clip",
    "from_proto",
    "to_proto",
]

MAX_MESSAGE_BYTES = 1 << 20
MAX_STRING_BYTES = 4096
MAX_ITEMS = 4096

GRPC_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),  # a cluster's proxy for the web is no way to a coordinator
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
"""Options for every channel and server of this package."""


class BoundsError(ValueError):
    """A message from the wire is too large, or lacks what it must have; the text names the field and the limit."""


_MESSAGE_OF: dict[type, type[Message]] = {
    events.Detection: pb.Detection,
    events.Evidence: pb.Evidence,
    events.Decision: pb.Decision,
    events.Strike: pb.Strike,
    events.RankExit: pb.RankExit,
    events.CheckpointFact: pb.CheckpointFact,
    events.SnapshotFact: pb.SnapshotFact,
    events.OrderAnswer: pb.OrderAnswer,
}
_VALUE_OF = {message: value for value, message in _MESSAGE_OF.items()}

_ENUMS: dict[str, type[enum.StrEnum]] = {
    "Action": events.Action,
    "Check": events.Check,
    "DetectionKind": events.DetectionKind,
    "Verdict": events.Verdict,
    "Origin": events.Origin,
    "Outcome": events.Outcome,
    "CheckpointFact.Kind": events.CheckpointKind,
    "SnapshotFact.Kind": events.SnapshotKind,
}
_PACKAGE = pb.DESCRIPTOR.package
_DEFAULTS: dict[str, enum.StrEnum] = {
    "Verdict": events.Verdict.PENDING,
    "Origin": events.Origin.COORDINATOR,
    "Outcome": events.Outcome.PENDING,
}
"""What an unset enum means, where it may be unset."""


@overload
def to_proto(value: events.Detection) -> pb.Detection: ...
@overload
def to_proto(value: events.Evidence) -> pb.Evidence: ...
@overload
def to_proto(value: events.Decision) -> pb.Decision: ...
@overload
def to_proto(value: events.Strike) -> pb.Strike: ...
@overload
def to_proto(value: events.RankExit) -> pb.RankExit: ...
@overload
def to_proto(value: events.CheckpointFact) -> pb.CheckpointFact: ...
@overload
def to_proto(value: events.SnapshotFact) -> pb.SnapshotFact: ...
@overload
def to_proto(value: events.OrderAnswer) -> pb.OrderAnswer: ...
def to_proto(value: Any) -> Any:
    """The message that mirrors `value`. Strings that are too long are cut, with an ellipsis."""
    message = _MESSAGE_OF[type(value)]()
    fields = message.DESCRIPTOR.fields_by_name
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if content is None:
            continue
        if field.name == "verdicts":
            getattr(message, field.name).extend(_settled(content))
        elif isinstance(content, tuple):
            getattr(message, field.name).extend(_item(item) for item in content)
        elif isinstance(content, enum.Enum):
            setattr(message, field.name, _number(fields[field.name].enum_type, content))
        else:
            setattr(message, field.name, clip(content) if isinstance(content, str) else content)
    return message


@overload
def from_proto(message: pb.Detection) -> events.Detection: ...
@overload
def from_proto(message: pb.Evidence) -> events.Evidence: ...
@overload
def from_proto(message: pb.Decision) -> events.Decision: ...
@overload
def from_proto(message: pb.Strike) -> events.Strike: ...
@overload
def from_proto(message: pb.RankExit) -> events.RankExit: ...
@overload
def from_proto(message: pb.CheckpointFact) -> events.CheckpointFact: ...
@overload
def from_proto(message: pb.SnapshotFact) -> events.SnapshotFact: ...
@overload
def from_proto(message: pb.OrderAnswer) -> events.OrderAnswer: ...
def from_proto(message: Any) -> Any:
    """The value that `message` mirrors.

    Raises:
        BoundsError: an enum that must be set is not, or has a number of a newer version.
    """
    value_type = _VALUE_OF[type(message)]
    values = {
        field.name: _read(message, message.DESCRIPTOR.fields_by_name[field.name])
        for field in dataclasses.fields(value_type)
    }
    return value_type(**values)


def check_bounds(message: Message, *, where: str = "") -> None:
    """Refuse a message with strings, lists or maps over the limits.

    Raises:
        BoundsError: names the field, its size and the limit.
    """
    where = where or message.DESCRIPTOR.name
    for field, content in message.ListFields():
        name = f"{where}.{field.name}"
        if isinstance(content, Mapping):
            _check_count(name, len(content))
            _check_strings(name, (part for pair in content.items() for part in pair))
        elif field.is_repeated:
            _check_count(name, len(content))
            if field.message_type is None:
                _check_strings(name, content)
            else:
                for index, item in enumerate(content):
                    check_bounds(item, where=f"{name}[{index}]")
        elif isinstance(content, Message):
            check_bounds(content, where=name)
        else:
            _check_strings(name, (content,))


def clip(text: str) -> str:
    """`text`, cut to what a message may carry."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MAX_STRING_BYTES:
        return raw.decode("utf-8")
    return raw[: MAX_STRING_BYTES - 3].decode("utf-8", "ignore") + "…"


def _check_count(name: str, count: int) -> None:
    if count > MAX_ITEMS:
        raise BoundsError(
            f"{name} has {count} items; at most {MAX_ITEMS} are accepted, send the rest in further messages"
        )


def _check_strings(name: str, contents: Iterable[Any]) -> None:
    for content in contents:
        if isinstance(content, str) and len(content.encode("utf-8")) > MAX_STRING_BYTES:
            raise BoundsError(f"{name} is longer than {MAX_STRING_BYTES} bytes; shorten it")


def _item(item: Any) -> Any:
    return clip(item) if isinstance(item, str) else to_proto(item)


def _settled(verdicts: Iterable[tuple[str, events.Verdict]]) -> list[pb.SettledVerdict]:
    enum_type = pb.SettledVerdict.DESCRIPTOR.fields_by_name["verdict"].enum_type
    return [pb.SettledVerdict(detection_id=name, verdict=_number(enum_type, verdict)) for name, verdict in verdicts]


def _read(message: Any, field: Any) -> Any:
    content = getattr(message, field.name)
    if field.is_repeated:
        if field.name == "verdicts":
            verdict = pb.SettledVerdict.DESCRIPTOR.fields_by_name["verdict"]
            return tuple((item.detection_id, _member(verdict, item.verdict, "SettledVerdict")) for item in content)
        return tuple(content) if field.message_type is None else tuple(from_proto(item) for item in content)
    if field.enum_type is not None:
        return _member(field, content, message.DESCRIPTOR.name)
    if field.name in ("caused_by", "param"):
        return content or None
    if field.has_presence and not message.HasField(field.name):
        return None
    return content


def _number(enum_type: Any, member: enum.Enum) -> Any:
    names = enum_type.values_by_name  # those of a nested enum carry no prefix
    prefixed = f"{_prefix(enum_type.name)}_{member.name}"
    return names[prefixed if prefixed in names else member.name].number


def _member(field: Any, number: int, message_name: str) -> enum.StrEnum:
    if number == 0 and field.enum_type.name in _DEFAULTS:
        return _DEFAULTS[field.enum_type.name]
    found = field.enum_type.values_by_number.get(number)
    if found is None or number == 0:
        raise BoundsError(
            f"{message_name}.{field.name} = {number} is not set or not known; is the sender of another version?"
        )
    return _ENUMS[field.enum_type.full_name.removeprefix(f"{_PACKAGE}.")][
        found.name.removeprefix(f"{_prefix(field.enum_type.name)}_")
    ]


def _prefix(name: str) -> str:
    """`DetectionKind` -> `DETECTION_KIND`."""
    return "".join(f"_{letter}" if letter.isupper() and index else letter for index, letter in enumerate(name)).upper()
