"""Detections, evidence and decisions as JSON bytes, for the ranks among themselves. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any

__all__ = ["decode", "encode"]


def encode(value: Any) -> bytes:
    """A frozen event (a dataclass of numbers, text, enums, tuples and such dataclasses), or a list of them."""
    return json.dumps(_plain(value)).encode()


def decode(kind: Any, content: bytes) -> Any:
    """What `encode` wrote, as a `kind`: a dataclass, or `tuple[a dataclass, ...]`.

    Raises:
        ValueError: it is not one.
    """
    try:
        return _build(kind, json.loads(content))
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a {kind}: {error}") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _build(kind: Any, plain: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if plain is None else _build(options[0], plain)
    if origin is tuple:
        kinds = typing.get_args(kind)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return tuple(_build(kinds[0], item) for item in plain)
        return tuple(_build(part, item) for part, item in zip(kinds, plain, strict=True))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in plain.items()})  # type: ignore[operator]
    if isinstance(kind, type) and issubclass(kind, (enum.Enum, float)):
        return kind(plain)
    return plain
