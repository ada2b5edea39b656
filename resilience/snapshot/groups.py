"""Which nodes keep parity for each other, and how it is laid out over them. Pure: no clock, no disk, no network.

A *group* is a few nodes of a generation that can make up for the loss of some of its members. What a member has of a
snapshot, its files and trails one after the other, is its *volume*. With n members and m losses, every volume is cut
into n − m *segments* of one length (the last ones are padded with zeros), and there are n *stripes*: stripe t has a
segment of each of n − m members and is protected by m blocks of parity, which the other m members keep,

    t, t + 1, …, t + m − 1  (mod n),

so that every member keeps as much parity as any other: m segments. For n = 2, m = 1 that is a copy at the peer; for
n = 6, m = 2 each stripe is 4 + 2. A stripe loses at most one block with a member, so that any m lost members leave
n − m blocks of every stripe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

__all__ = ["MAX_MEMBERS", "Extent", "Group", "Grouping", "Layout", "form_groups"]

MAX_MEMBERS = 32
"""Of a group: what liberasurecode takes as data and parity together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Nodes that keep parity for each other."""

    nodes: tuple[str, ...]
    """In the order of the hostfile; the first one leads their exchanges."""
    losses: int
    """Lost members that the others can make up for: at least 1, fewer than there are members."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grouping:
    """All groups of a generation."""

    groups: tuple[Group, ...]
    remarks: tuple[str, ...]
    """What a person should know: a domain whose loss is too much for a group, or nodes that are not protected."""

    def of(self, node: str) -> Group | None:
        """The group of a node; None where it has none."""
        return next((group for group in self.groups if node in group.nodes), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a volume within one stripe."""

    stripe: int
    start: int
    """First byte, within the member's segment of this stripe."""
    end: int
    """First byte after it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How the volumes of `num_members` members lie in stripes, for `losses` losses."""

    num_members: int
    losses: int
    segment_bytes: int
    """Length of every segment."""

    @classmethod
    def of(cls, volumes: Sequence[int], losses: int) -> Layout:
        """The layout for volumes of these many bytes, in the order of the members.

        Raises:
            ValueError: `losses` cannot be made up for by so many members.
        """
        if not 1 <= losses < len(volumes):
            raise ValueError(f"losses = {losses}: {len(volumes)} members can make up for 1 to {len(volumes) - 1}")
        num_segments = len(volumes) - losses
        return cls(len(volumes), losses, -(-max(volumes) // num_segments))

    def keepers(self, stripe: int) -> tuple[int, ...]:
        """Members that keep the parity of a stripe, in the order of its parity blocks."""
        return tuple((stripe + i) % self.num_members for i in range(self.losses))

    def sources(self, stripe: int) -> tuple[int, ...]:
        """Members that have data in a stripe, in the order of its data blocks."""
        keepers = self.keepers(stripe)
        return tuple(member for member in range(self.num_members) if member not in keepers)

    def stripes(self, member: int) -> tuple[int, ...]:
        """Stripes that hold the segments of a member's volume, in their order."""
        return tuple(t for t in range(self.num_members) if member not in self.keepers(t))

    def kept(self, member: int) -> tuple[int, ...]:
        """Stripes whose parity a member keeps, one block of it each."""
        return tuple(t for t in range(self.num_members) if member in self.keepers(t))

    def segment(self, member: int, stripe: int) -> int:
        """Where in a member's volume its segment of a stripe begins, in bytes."""
        return self.stripes(member).index(stripe) * self.segment_bytes

    def extents(self, member: int, start: int, end: int) -> list[Extent]:
        """The pieces of a range of a member's volume, in order."""
        found = []
        stripes = self.stripes(member)
        while start < end:
            index, offset = divmod(start, self.segment_bytes)
            length = min(end - start, self.segment_bytes - offset)
            found.append(Extent(stripes[index], offset, offset + length))
            start += length
        return found


def form_groups(
    nodes: Sequence[str], *, size_max: int, losses: int, domains: Mapping[str, str] | None = None
) -> Grouping:
    """Spread nodes over groups so that what fails together is apart.

    There are as few groups as `size_max` allows, because parity costs m ÷ (n − m) of the state; more where only that
    keeps the members of a group that share a failure domain down to `losses`.

    Args:
        nodes: of the generation, in hostfile order.
        size_max: most members of a group; never more than `MAX_MEMBERS`.
        losses: lost members of a group that the others shall make up for; 0 forms no groups.
        domains: node → what it fails with; a node that is not named fails by itself.
    """
    size_max = min(size_max, MAX_MEMBERS)
    wanted = min(losses, size_max - 1)
    if wanted < 1 or len(nodes) < 2:
        return Grouping((), ())
    members: dict[str, list[str]] = {}
    for node in nodes:
        members.setdefault((domains or {}).get(node, f"node {node}"), []).append(node)
    by_size = sorted(members.items(), key=lambda item: -len(item[1]))
    num_groups = _num_groups(len(nodes), size_max, wanted, len(by_size[0][1]))
    dealt: list[list[str]] = [[] for _ in range(num_groups)]
    for place, node in enumerate(node for _, together in by_size for node in together):
        dealt[place % num_groups].append(node)
    order = {node: place for place, node in enumerate(nodes)}
    groups = [
        Group(tuple(sorted(each, key=order.__getitem__)), min(wanted, len(each) - 1)) for each in dealt if len(each) > 1
    ]
    groups.sort(key=lambda group: order[group.nodes[0]])
    return Grouping(tuple(groups), tuple(_remarks(groups, nodes, losses, size_max, members)))


def _num_groups(num_nodes: int, size_max: int, losses: int, largest_domain: int) -> int:
    """As few groups as possible; dealing spreads c nodes of a domain so that no group has more than ⌈c ÷ groups⌉."""
    fewest = -(-num_nodes // size_max)
    most = num_nodes // (losses + 1)
    needed = -(-largest_domain // losses)
    return max(fewest, needed) if needed <= most else fewest


def _remarks(
    groups: Sequence[Group], nodes: Sequence[str], losses: int, size_max: int, members: Mapping[str, Sequence[str]]
) -> list[str]:
    remarks = []
    if losses >= size_max:
        remarks.append(
            f"snapshot.parity_losses = {losses} cannot be made up for by groups of {size_max}; groups protect against "
            f"{size_max - 1}: raise snapshot.parity_group_size above {losses}"
        )
    wanted = min(losses, size_max - 1)
    for group in groups:
        if group.losses < wanted:
            remarks.append(
                f"the group of {', '.join(group.nodes)} is too small for {wanted} losses and protects against "
                f"{group.losses}; add nodes, or choose another snapshot.parity_group_size"
            )
        for domain, together in members.items():
            hit = [node for node in together if node in group.nodes]
            if len(hit) > group.losses:
                remarks.append(
                    f"{domain} has {len(hit)} of the {len(group.nodes)} nodes of a group ({', '.join(hit)}) that "
                    f"protects against {group.losses}: its loss cannot be made up for"
                )
    alone = [node for node in nodes if not any(node in group.nodes for group in groups)]
    if alone:
        remarks.append(f"{', '.join(alone)}: no group, so that its snapshots are lost with it")
    return remarks
