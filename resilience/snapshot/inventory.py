"""What a node holds of memory snapshots, read from its arena: what its agent tells when it asks for a place.

Never here: hashing. What is not in a published manifest, whose slots still hold it, is not told.
"""

from __future__ import annotations

import dataclasses

from resilience.errors import SnapshotError
from resilience.snapshot.arena import Arena
from resilience.snapshot.kept import parity_of
from resilience.snapshot.manifest import Commit, Manifest, Part, parse_commit, parse_manifest

__all__ = ["Copy", "is_still_there", "read_commits", "read_inventory", "read_manifest"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A node's part of a memory snapshot, whole and hashed."""

    step: int
    generation: int
    """Generation that took it."""
    world_size: int
    ranks: tuple[int, ...]
    """Ranks whose files are here."""
    clean_through: int
    """Newest step known to be clean when something was last said about it."""
    num_bytes: int
    at: float
    """When it was taken, in seconds since the Unix epoch."""
    parity_nodes: tuple[str, ...] = ()
    """Nodes of the parity group whose exchange for this step is complete here, this one included."""
    parity_losses: int = 0
    """Losses within them that the others can make up for."""


def read_inventory(arena: Arena) -> list[Copy]:
    """What can be restored from this arena, oldest first."""
    commits = read_commits(arena)
    manifests = []
    for step, generation in arena.published():
        manifest = read_manifest(arena, step, generation)
        if manifest is not None and all(is_still_there(part, commits) for part in manifest.parts):
            manifests.append(manifest)
    told = [commit.clean_through for commit in commits.values()] + [each.clean_through for each in manifests]
    clean_through = max(told, default=0)
    return [_copy(arena, manifest, clean_through) for manifest in manifests]


def _copy(arena: Arena, manifest: Manifest, clean_through: int) -> Copy:
    parity_nodes, parity_losses = parity_of(arena, manifest)
    return Copy(
        step=manifest.step,
        generation=manifest.generation,
        world_size=manifest.world_size,
        ranks=manifest.ranks,
        clean_through=clean_through,
        num_bytes=manifest.num_bytes,
        at=manifest.at,
        parity_nodes=parity_nodes,
        parity_losses=parity_losses,
    )


def read_manifest(arena: Arena, step: int, generation: int) -> Manifest | None:
    """This node's manifest of a snapshot; None where there is none that can be read."""
    path = arena.manifest(step, generation)
    try:
        return parse_manifest(path.read_bytes(), source=str(path))
    except (OSError, SnapshotError):
        return None


def read_commits(arena: Arena) -> dict[tuple[int, int], Commit]:
    """Every commit in the arena, by (rank, slot); slots that are being written have none."""
    found = {}
    for rank in arena.ranks():
        for slot in arena.slots(rank):
            path = arena.commit(rank, slot)
            try:
                commit = parse_commit(path.read_bytes(), source=str(path))
            except (OSError, SnapshotError):
                continue
            if (commit.rank, commit.slot) == (rank, slot):
                found[rank, slot] = commit
    return found


def is_still_there(part: Part, commits: dict[tuple[int, int], Commit]) -> bool:
    """Whether the slot of a part still holds what was hashed."""
    commit = commits.get((part.commit.rank, part.commit.slot))
    return commit is not None and (commit.run_id, commit.generation, commit.step, commit.sequence) == (
        part.commit.run_id,
        part.commit.generation,
        part.commit.step,
        part.commit.sequence,
    )
