"""The parity exchange of one node: which snapshot its group protects next, in phases that may break off anywhere.

The first node of a group leads. It looks for the newest snapshot that every member has published, and asks all of them,
itself included, for one phase after the other:

    hold      ranks must not overwrite it
    encode    each member reads the segments of the stripes whose parity it keeps, and stores that parity
    complete  all have stored it: from now on it counts
    forget    it counts everywhere: older parity goes, and ranks may overwrite what that belonged to

A phase begins when every member has done the one before. So there is always a snapshot whose parity counts on all
members that are left, whoever dies when, once the first exchange is through. Asking twice is harmless, and a leader
that starts again begins at the first phase. Snapshots that come faster than they can be protected are passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable

from resilience.clock import SystemClock
from resilience.config import SnapshotConfig
from resilience.context import RunContext
from resilience.coordinator.access import read_token
from resilience.errors import SnapshotError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.rpc.tls import Tls
from resilience.rpc.v1 import guardian_pb2 as pb
from resilience.snapshot.arena import Arena, write_atomically
from resilience.snapshot.encode import Interrupted, encode
from resilience.snapshot.groups import Group, form_groups
from resilience.snapshot.holdings import Description, Holdings
from resilience.snapshot.holds import Holds
from resilience.snapshot.kept import Kept, Key
from resilience.snapshot.manifest import Hold
from resilience.snapshot.orders import Begin, Peer
from resilience.snapshot.peers import Peers
from resilience.snapshot.transport import Caller, PeerClient, RefusalError, Server, own_host, run_idle
from resilience.snapshot.volume import same_data

__all__ = ["Redundancy"]

_POLL_S = (0.02, 0.3)
"""Between two looks of a leader: the shortest, while things happen, and the longest."""
_RETRY_S_MAX = 2.0
"""The longest between two tries that fail one after the other: storage that is full stays so for a while."""
_Phase = pb.ExchangeRequest.Phase
_PHASES = (
    pb.ExchangeRequest.HOLD,
    pb.ExchangeRequest.ENCODE,
    pb.ExchangeRequest.COMPLETE,
    pb.ExchangeRequest.FORGET,
)


@dataclasses.dataclass
class _Work:
    """The encoding that is going on, or how it ended."""

    key: Key
    number: int
    problem: str = ""
    done: bool = False
    is_wanted: bool = True


class Redundancy:
    """This node's server, and its part in its group's exchanges. `begin` tells it who is in the group."""

    def __init__(
        self,
        arena: Arena,
        context: RunContext,
        *,
        node: str,
        holds: Holds,
        tell: Callable[[SnapshotFact], None],
    ) -> None:
        """Nothing happens before `start`.

        Args:
            arena: of this node.
            context: the run.
            node: this node's name.
            holds: where it is said what must not be overwritten.
            tell: takes what happened; called on a thread.

        Raises:
            UsageError: the run's token cannot be read.
        """
        self._arena = arena
        self._run_id = context.run_id
        self._config: SnapshotConfig = context.config.snapshot
        self._coordinator = context.coordinator_address
        self._node = node
        self._holds = holds
        self._tell = tell
        self._clock = SystemClock()
        self._kept = Kept(arena)
        self._holdings = Holdings(arena, run_id=context.run_id, node=node)
        token = read_token(context.token_file)
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._tls = Tls.of(context.config.coordinator)
        self._server = Server(self._holdings, self, run_id=context.run_id, token=token, tls=self._tls)
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._is_ending = False
        self._generation = 0
        self._group: Group | None = None
        self._clients: dict[str, PeerClient] = {}
        self._work: _Work | None = None
        self._num_works = 0
        self._held: set[Key] = set()
        self._began: dict[Key, float] = {}
        self._settled: object = None
        self._num_failures = 0
        """Of the leader, in a row."""
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="parity", daemon=True)

    def start(self) -> str:
        """Serve, and take up what an earlier guardian was doing. The address for the guardians of other nodes.

        Raises:
            SnapshotError: nothing can be listened on.
        """
        address = self._server.start(own_host(self._coordinator), self._earlier_port())
        self._kept.remove_unfinished()
        self._hold_only(self._kept.stored())
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(self._kept.group.read_bytes())
            self._form(told["generation"], tuple(Peer(**{**p, "ranks": tuple(p["ranks"])}) for p in told["peers"]))
        self._thread.start()
        return address

    def stop(self) -> None:
        """End all that goes on."""
        self._is_ending = True
        self._abandon()
        self._wake.set()
        self._server.stop()
        for client in self._clients.values():
            client.close()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def begin(self, order: Begin) -> None:
        """A generation is about to begin; no rank of it runs yet. Call it after snapshots of another past are gone."""
        with self._lock:
            self._abandon()
            source = order.source
            self._kept.remove_unfinished()
            self._kept.go_back(order.generation, None if source is None else source.step)
            self._began.clear()
            self._hold_only(self._kept.stored())
            self._form(order.generation, order.peers)
            told = {"generation": order.generation, "peers": [dataclasses.asdict(peer) for peer in order.peers]}
            write_atomically(self._kept.group, json.dumps(told).encode())
        self._wake.set()

    def remote(self, order: Begin) -> Peers | None:
        """What a restore can have from other nodes, to be closed after use; None where there are none."""
        source = order.source
        known = (*order.peers, *(() if source is None else source.peers))
        addresses = {peer.node: peer.address for peer in known if peer.address and peer.node != self._node}
        if not addresses:
            return None
        caller = Caller(self._run_id, self._node, lambda: order.generation)
        clients = [
            PeerClient(node, at, caller, metadata=self._metadata, tls=self._tls) for node, at in addresses.items()
        ]
        return Peers(self._holdings, clients, run_id=self._run_id, node=self._node)

    # ------ as a member

    @property
    def generation(self) -> int:
        """The one that this node is in; 0 before the first."""
        return self._generation

    def advance(self, phase: _Phase, key: Key, *, leader: str, members: tuple[str, ...], losses: int) -> bool:
        """Do a phase of an exchange; whether it is done. See `resilience.snapshot.transport.Exchanges`."""
        with self._lock:
            group = self._group
            if group is None or (members, losses) != (group.nodes, group.losses) or leader != members[0]:
                raise RefusalError(f"{self._node}: {leader} leads no such group")
            try:
                return self._advance(phase, key, group)
            except OSError as error:
                raise RefusalError(f"{self._node}: {_storage(error)}") from None

    def _advance(self, phase: _Phase, key: Key, group: Group) -> bool:
        match phase:
            case pb.ExchangeRequest.HOLD:
                self._hold(key)
                return True
            case pb.ExchangeRequest.ENCODE:
                return self._encode(key, group)
            case pb.ExchangeRequest.COMPLETE:
                if not self._is_stored(key):
                    raise RefusalError(f"{self._node}: has not stored the parity of {key}")
                self._kept.complete(key)
                return True
            case pb.ExchangeRequest.FORGET:
                self._forget_others(key, group)
                return True
            case _:
                raise RefusalError(f"{self._node}: there is no phase {phase}")

    def _hold(self, key: Key) -> None:
        if self._work is not None and self._work.key != key:
            self._abandon()
        self._began = {key: self._began.get(key, self._clock.monotonic())}
        self._hold_only({key, *self._kept.stored()})
        # A rank may have begun to overwrite it just before it could see that.
        if key not in self._holdings.snapshots():
            self._hold_only(self._kept.stored())
            raise RefusalError(f"{self._node}: the snapshot of {key} is not here any more")

    def _hold_only(self, keys: Iterable[Key]) -> None:
        """Hold these for the group: parity is worth nothing without the snapshots of the members that are left."""
        wanted = set(keys)
        for key in wanted - self._held:
            self._holds.add(Hold(key.step, _why(key), key.generation))
        for key in self._held - wanted:
            self._holds.drop(_why(key))
        self._held = wanted

    def _encode(self, key: Key, group: Group) -> bool:
        work = self._work
        if work is not None and work.key == key and not work.done:
            return False
        self._work = None
        if work is not None and work.key == key and work.problem:
            raise RefusalError(f"{self._node}: {work.problem}")
        if self._is_stored(key):
            return True
        self._num_works += 1
        self._work = _Work(key, self._num_works)
        threading.Thread(target=self._run_encode, args=(self._work, group), name="encode", daemon=True).start()
        return False

    def _run_encode(self, work: _Work, group: Group) -> None:
        run_idle()
        folder, bound = self._kept.building(work.key, work.number), self._config.parity_mib_per_s
        try:
            encode(
                folder,
                work.key,
                members=group.nodes,
                losses=group.losses,
                place=group.nodes.index(self._node),
                sources=[self._holdings if node == self._node else self._clients[node] for node in group.nodes],
                wanted=lambda: work.is_wanted,
                bytes_per_s=None if bound is None else bound * 2**20,
            )
            with self._lock:
                if work.is_wanted:
                    self._kept.publish(folder, work.key)
        except Interrupted:
            pass
        except SnapshotError as error:
            work.problem = str(error)
        except OSError as error:
            work.problem = _storage(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            work.done = True

    def _is_stored(self, key: Key) -> bool:
        """Whether parity of this very snapshot is here: one that was taken again after a rewind is another."""
        parity_set = self._kept.read(key)
        if parity_set is None or self._node not in parity_set.members:
            return False
        stored = self._kept.manifest(key, parity_set.members.index(self._node))
        with contextlib.suppress(SnapshotError):
            return stored is not None and same_data(stored, self._holdings.manifest(key))
        return False

    def _forget_others(self, key: Key, group: Group) -> None:
        if not self._kept.is_complete(key):
            raise RefusalError(f"{self._node}: the parity of {key} does not count here")
        for other in self._kept.stored():
            if other != key:
                self._kept.remove(other)
        self._hold_only({key})
        began = self._began.pop(key, None)
        if began is not None:
            self._tell(self._protected(key, group, self._clock.monotonic() - began))

    def _protected(self, key: Key, group: Group, seconds: float) -> SnapshotFact:
        manifest = self._holdings.manifest(key)
        return SnapshotFact(
            kind=SnapshotKind.PROTECTED,
            step=key.step,
            generation=key.generation,
            node=self._node,
            tier="peer",
            world_size=manifest.world_size,
            num_bytes=self._kept.num_bytes(key),
            clean_through=manifest.clean_through,
            redundancy=group.losses,
            seconds=seconds,
            at=self._clock.wall(),
        )

    def _abandon(self) -> None:
        """Let the encoding that is going on end by itself; what it stores is dropped."""
        if self._work is not None:
            self._work.is_wanted = False
            self._work = None

    # ------ who is in the group

    def _form(self, generation: int, peers: tuple[Peer, ...]) -> None:
        serving = [peer for peer in peers if peer.address]
        losses = self._config.parity_losses
        grouping = form_groups(
            [peer.node for peer in serving],
            size_max=self._config.parity_group_size,
            losses=1 if losses is None else losses,
            domains=self._config.failure_domains,
        )
        for remark in grouping.remarks:
            print(f"resilience: parity: {remark}", file=sys.stderr, flush=True)
        group = grouping.of(self._node)
        clients = {}
        for peer in serving:
            if group is not None and peer.node in group.nodes and peer.node != self._node:
                caller = Caller(self._run_id, self._node, lambda: self._generation)
                clients[peer.node] = PeerClient(peer.node, peer.address, caller, metadata=self._metadata, tls=self._tls)
        for client in self._clients.values():
            client.close()
        self._generation, self._group, self._clients, self._settled = generation, group, clients, None

    def _earlier_port(self) -> int:
        """The port of the guardian before this one: peers know no other until the next generation."""
        try:
            address = str(json.loads(self._arena.guardian.read_bytes())["address"])
            return int(address.rpartition(":")[2])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    # ------ as the leader

    def _run(self) -> None:
        run_idle()
        pause_s = _POLL_S[0]
        while not self._is_ending:
            group, clients, generation = self._group, self._clients, self._generation
            is_busy = False
            if group is not None and group.nodes[0] == self._node:
                is_busy = self._lead(group, clients, generation)
            longest_s = min(_POLL_S[1] * 2 ** max(0, self._num_failures - 1), _RETRY_S_MAX)
            pause_s = _POLL_S[0] if is_busy else min(1.5 * pause_s, longest_s)
            self._wake.wait(pause_s)
            self._wake.clear()

    def _lead(self, group: Group, clients: dict[str, PeerClient], generation: int) -> bool:
        """Protect the newest snapshot that all members have, if it is not; whether there was anything to do."""
        seen = (generation, self._published())
        if seen == self._settled:
            return False
        try:
            own = self._holdings.describe(generation)
            if not own.snapshots:
                return False
            found = [own, *(client.describe(num_tries=1) for client in clients.values())]
            common = frozenset.intersection(*(each.snapshots for each in found))
            if common and self._is_protected(max(common), found, group):
                self._settled = seen if max(common) == max(own.snapshots) else None
                return False
            if not common:
                return False
            for phase in _PHASES:
                self._phase(phase, max(common), group, clients, generation)
        except SnapshotError as error:
            self._failed(generation, str(error))
            return False
        except OSError as error:
            self._failed(generation, f"{self._node}: {_storage(error)}")
            return False
        self._num_failures = 0
        return True

    def _failed(self, generation: int, problem: str) -> None:
        """An exchange broke off. It is tried again, with the next snapshot if there is one by then; said once."""
        if self._generation != generation or self._is_ending:
            return
        self._num_failures += 1
        kind = re.sub(r"\d+", "", problem)
        if kind not in self._said:
            self._said.add(kind)
            print(f"resilience: parity: {problem}", file=sys.stderr, flush=True)

    def _published(self) -> list[tuple[str, int]]:
        """The files of the published manifests: one that is published again is another file."""
        with contextlib.suppress(OSError), os.scandir(self._arena.manifests) as entries:
            return sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries)
        return []

    def _is_protected(self, key: Key, found: list[Description], group: Group) -> bool:
        stored = [each.stored(key) for each in found]
        return self._is_stored(key) and all(
            each is not None and each.complete and (each.members, each.losses) == (group.nodes, group.losses)
            for each in stored
        )

    def _phase(self, phase: _Phase, key: Key, group: Group, clients: dict[str, PeerClient], generation: int) -> None:
        """Have a phase done by every member."""
        waiting = list(group.nodes)
        while waiting:
            for node in list(waiting):
                if self._is_ending or self._generation != generation:
                    raise RefusalError(f"generation {generation} has ended")
                if node == self._node:
                    done = self.advance(phase, key, leader=node, members=group.nodes, losses=group.losses)
                else:
                    done = clients[node].advance(phase, key, members=group.nodes, losses=group.losses)
                if done:
                    waiting.remove(node)
            if waiting:
                self._wake.wait(_POLL_S[0])


def _storage(error: OSError) -> str:
    return f"parity cannot be stored: {error.filename or 'the arena'}: {error.strerror}; the newest one that was counts"


def _why(key: Key) -> str:
    """The reason of a hold, one for each snapshot: they are given up one by one."""
    return f"parity of {key}"
