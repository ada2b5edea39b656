"""What an agent asks of its guardian, and what comes back: a JSON object a line, over its standard streams.

Never here: protobuf messages; the agent turns those into these values, so that a guardian needs no coordinator's words.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from resilience.events import SnapshotFact, SnapshotKind

__all__ = ["Answer", "Begin", "Flush", "Order", "Peer", "Settle", "Source", "decode", "encode", "read", "write"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A node, as the guardians of the others see it."""

    node: str
    address: str
    """`host:port` of its guardian; empty where it has none that serves."""
    ranks: tuple[int, ...]
    """In `Begin`: the ranks it runs. In `Source`: the ranks whose files it holds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The snapshot that all nodes load."""

    step: int
    generation: int
    """Generation that took it."""
    peers: tuple[Peer, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A generation is about to begin; no rank of it runs yet. Answered when what it loads lies there."""

    generation: int
    world_size: int
    ranks: tuple[int, ...]
    """Those of this node."""
    peers: tuple[Peer, ...]
    """All nodes of the generation, in their order, this one included."""
    source: Source | None
    """None: its script starts from what it loads itself, and what is in the arena belongs to another past."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """The ranks have ended: hash what they committed, at full speed. Answered when done, or after `timeout_s`."""

    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Flush:
    """The run is leaving: write the newest snapshot to disk. Answered when it is there, or after `timeout_s`."""

    timeout_s: float


Order = Begin | Settle | Flush


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To the order of the same number."""

    number: int
    problem: str = ""
    """Why it could not be done, in words; empty where it was."""
    path: str = ""
    """To `Begin` with a source: the folder that was prepared. To `Flush`: the checkpoint that was written."""


_ORDERS: dict[str, type[Order]] = {"begin": Begin, "settle": Settle, "flush": Flush}
_NAMES = {kind: name for name, kind in _ORDERS.items()}


def encode(order: Order, *, number: int) -> bytes:
    """An order as a line."""
    body = {"number": number, "order": _NAMES[type(order)], **dataclasses.asdict(order)}
    return json.dumps(body).encode() + b"\n"


def decode(line: bytes) -> tuple[int, Order]:
    """The number and the order of a line. Only a guardian's own agent writes to it, so this trusts the types."""
    body = json.loads(line)
    kind = _ORDERS[body.pop("order")]
    number = body.pop("number")
    if kind is not Begin:
        return number, kind(**body)
    source = body.pop("source")
    peers = _peers(body.pop("peers"))
    ranks = tuple(body.pop("ranks"))
    if source is not None:
        source = Source(step=source["step"], generation=source["generation"], peers=_peers(source["peers"]))
    return number, Begin(**body, ranks=ranks, peers=peers, source=source)


def write(message: Answer | SnapshotFact) -> bytes:
    """What a guardian says, as a line."""
    kind = "answer" if isinstance(message, Answer) else "fact"
    return json.dumps({kind: dataclasses.asdict(message)}).encode() + b"\n"


def read(line: bytes) -> Answer | SnapshotFact:
    """What a guardian said.

    Raises:
        ValueError: it is no line of this protocol.
    """
    body = json.loads(line)
    try:
        if "answer" in body:
            return Answer(**body["answer"])
        fact: Mapping[str, Any] = body["fact"]
        return SnapshotFact(**{**fact, "kind": SnapshotKind(fact["kind"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"no line of a guardian: {error}") from None


def _peers(found: list[dict[str, Any]]) -> tuple[Peer, ...]:
    return tuple(Peer(node=p["node"], address=p["address"], ranks=tuple(p["ranks"])) for p in found)
