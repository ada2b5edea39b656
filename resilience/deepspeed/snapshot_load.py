"""Installs a memory snapshot in a live engine, for a rewind and after a restart: verified before and after.

Nothing is unpickled whose bytes were not held against the manifest first. Afterwards what is *in the engine* is held
against it, too: a load that went wrong must not be trained on. All of this is collective, and all ranks fail alike.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from resilience.checkpoint import randomness
from resilience.checkpoint.exchange import gather
from resilience.deepspeed import powers
from resilience.deepspeed.snapshot_take import compare, num_hashing_threads
from resilience.errors import ResilienceError, SnapshotError
from resilience.kernels.copying import copy_past_caches
from resilience.snapshot.hashing import verify_files
from resilience.snapshot.manifest import STATE, Manifest, Part, parse_manifest
from resilience.snapshot.mapped import Mapped
from resilience.snapshot.prepare import SNAPSHOT, is_shared, tag_of

__all__ = ["load", "read_prepared", "resume_randomness"]

LoadCheckpoint = Callable[..., Any]

_MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, pickle.UnpicklingError)
"""What DeepSpeed, torch and pickle raise when a state is not that of the engine."""


def read_prepared(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        SnapshotError: it is not there, or is damaged.
    """
    path = folder / SNAPSHOT
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_manifest(content, source=str(path))


def load(
    engine: Any,
    folder: Path,
    manifest: Manifest,
    *,
    rank: int,
    load_checkpoint: LoadCheckpoint,
    verify_files: bool = True,
) -> None:
    """Make the engine what it was at the end of the snapshot's step. Collective.

    Random states are another matter, for they belong to the place where the script goes on: `resume_randomness`.

    Args:
        engine: a live DeepSpeedEngine of as many ranks as took the snapshot.
        folder: has the files below `global_step<S>/`.
        manifest: of what the ranks of this node need.
        rank: this rank.
        load_checkpoint: DeepSpeed's own, of this engine; it may tell others that weights were written.
        verify_files: hold the files against the manifest first; False for one who has just done so.

    Raises:
        SnapshotError: on all ranks alike. The engine must not be used then, unless its files were refused before.
    """
    device = engine.device
    parts = {part.commit.rank: part for part in manifest.parts}
    tag_folder = folder / tag_of(manifest.step)
    if verify_files:
        _agree(device, lambda: _verify(tag_folder, parts, rank))
    _agree(device, lambda: _check_rank(parts, rank))
    where = f"snapshot of step {manifest.step}: rank {rank}"

    def load_it() -> None:
        if load_checkpoint(str(folder), tag=tag_folder.name)[0] is None:
            raise SnapshotError(f"{where}: DeepSpeed found nothing to load")

    _load_mapped(engine, device, lambda: _agree(device, lambda: _telling(where, load_it)))
    _agree(device, lambda: _telling(where, lambda: _set_counters(engine, parts[rank])))
    difference = compare(engine, parts, rank=rank)

    def check() -> None:
        if difference:
            raise SnapshotError(f"{where}: {difference}")

    _agree(device, check)


def resume_randomness(part: Part, *, source: str) -> None:
    """Put every generator of this process to where it was at the end of the snapshot's step.

    Raises:
        CheckpointError: these are not random states of this version.
    """
    tracked = randomness.restore(part.commit.random, source=source)
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)


def _verify(folder: Path, parts: dict[int, Part], rank: int) -> None:
    verify_files(
        (
            (folder / Path(entry.path).relative_to(STATE), entry)
            for owner, part in parts.items()
            for entry in part.commit.files
            if owner == rank or is_shared(entry.path)
        ),
        num_threads=num_hashing_threads(),
    )


def _check_rank(parts: dict[int, Part], rank: int) -> None:
    if rank not in parts:
        raise SnapshotError(f"rank {rank} has no part in the snapshot, only {sorted(parts)} do")


def _set_counters(engine: Any, part: Part) -> None:
    counters = dict(part.commit.counters)
    powers.bring_back(engine, counters.pop(powers.NAME))
    for name, value in counters.items():
        setattr(engine, name, value)


def _agree(device: torch.device, check: Callable[[], None]) -> None:
    """Run `check`; if it fails on any rank, it fails on all, with the first rank's words."""
    problem = ""
    try:
        check()
    except (ResilienceError, OSError, json.JSONDecodeError) as error:
        problem = str(error)
    problems = [found for found in gather(problem, device) if found]
    if problems:
        raise SnapshotError(problems[0])


def _telling(where: str, work: Callable[[], None]) -> None:
    """Run what runs DeepSpeed's and torch's code on verified files: where they do not fit this engine, it fails in one
    of many ways, and on all ranks alike."""
    try:
        work()
    except _MISFITS as error:
        raise SnapshotError(f"{where}: does not fit the engine ({type(error).__name__}: {error})") from error


def _load_mapped(engine: Any, device: torch.device, load_it: Callable[[], None]) -> None:
    """Load out of mappings of the files, which is several times as fast as by way of fresh memory; and once more that
    way if anything of the engine still lies in a mapping: it would change when the file's slot is overwritten."""
    reader, moments = _MappedReader(engine.checkpoint_engine), _moments(engine)
    with _reading_with(engine, reader):
        load_it()
    _bring_home(engine, moments, reader)
    if any(gather(not reader.close(), device)):
        with _reading_with(engine, _PlainReader(engine.checkpoint_engine)):
            load_it()


class _PlainReader:
    """DeepSpeed's checkpoint engine, reading with torch alone, into memory of its own."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        # The bytes were verified: what is unpickled is what this run pickled.
        return torch.load(path, map_location=map_location, weights_only=False, mmap=False)


class _MappedReader(_PlainReader):
    """The same, out of mappings. Everything comes to the CPU, as DeepSpeed asks for; it copies to where it belongs."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._files: list[Mapped] = []

    def load(self, path: str, map_location: Any = None) -> Any:
        mapped = Mapped(Path(path))
        self._files.append(mapped)
        return mapped.read()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the mappings."""
        return any(mapped.holds(tensor) for mapped in self._files)

    def close(self) -> bool:
        """Let them go; False where one cannot, because something still lies in it."""
        self._files = [mapped for mapped in self._files if not mapped.close()]
        return not self._files


_Moments = dict[Any, dict[str, torch.Tensor]]


def _moments(engine: Any) -> _Moments:
    """The tensors of the optimizer that DeepSpeed's wrapper drives, by parameter and name."""
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state
    return {
        parameter: {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for parameter, state in states.items()
    }


def _bring_home(engine: Any, before: _Moments, reader: _MappedReader) -> None:
    """Torch's optimizers take over the tensors that they load: copy these to where they were before the load."""
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state
    for parameter, state in _moments(engine).items():
        for name, value in state.items():
            if not reader.holds(value):
                continue
            home = before.get(parameter, {}).get(name)
            if home is None or (home.shape, home.dtype, home.device) != (value.shape, value.dtype, value.device):
                states[parameter][name] = value.clone()
            else:
                states[parameter][name] = _copied(home, value)


def _copied(home: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`home`, now with what `value` holds; both lie on the CPU."""
    if not (home.is_contiguous() and value.is_contiguous() and home.numel()):
        return home.copy_(value)
    copy_past_caches(home.detach().view(-1).view(torch.uint8).numpy(), value.view(-1).view(torch.uint8).numpy())
    return home


@contextlib.contextmanager
def _reading_with(engine: Any, reader: _PlainReader) -> Iterator[None]:
    original = engine.checkpoint_engine
    engine.checkpoint_engine = reader
    try:
        yield
    finally:
        engine.checkpoint_engine = original
