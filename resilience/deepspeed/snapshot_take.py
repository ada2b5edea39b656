"""Takes the state of an engine through DeepSpeed's own `save_checkpoint`, with memory in the place of its writer.

What DeepSpeed would save, and under which name, stays its own business, so that every ZeRO stage and MoE come along.
DeepSpeed clones nothing on the way: what is collected aliases the live state, and must be copied before the next
optimizer step. Collecting is collective, as `save_checkpoint` is; copying is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from deepspeed.utils import logger

from resilience.deepspeed import powers
from resilience.snapshot.archive import Archive, Image, as_bytes, picture
from resilience.snapshot.copiers import Copier, WaitingCopier
from resilience.snapshot.manifest import STATE, FileEntry, Part

__all__ = ["Taker", "compare", "counters", "num_hashing_threads", "problem"]

_THREADS_MAX = 8
"""More do not hash faster: memory is what they wait for."""
_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


def problem(engine: Any) -> str:
    """Why no snapshots of this engine can be taken, in words; empty where they can."""
    if type(engine).__name__ == "PipelineEngine":
        return "pipeline parallelism (its layers are saved as files of their own)"
    if engine.zero_nvme_offload_optimizer():
        return "optimizer state offloaded to NVMe (its files are not in memory)"
    if engine.checkpoint_engine.is_decoupled():
        return f"{type(engine.checkpoint_engine).__name__} (it writes in the background)"
    return ""


def counters(engine: Any) -> dict[str, int]:
    """What the engine counts, a load of a checkpoint brings back only some of it."""
    return {**{name: int(getattr(engine, name)) for name in _COUNTERS}, powers.NAME: powers.origin(engine)}


class Taker:
    """Fills slots with the state of one engine. The files of a slot are laid out when it is used first.

    Args:
        engine: a DeepSpeedEngine.
        copier: of what lies on its device; None to copy all at once.
    """

    def __init__(self, engine: Any, copier: Copier | None = None) -> None:
        self._engine = engine
        self.copier = copier or WaitingCopier()
        self._archives: dict[Path, Archive] = {}

    def collect(self) -> dict[str, Image]:
        """What this rank would save, by its path within a slot. Collective."""
        return _collect(self._engine, everyone=False)

    def is_laid_out(self, slot: Path, images: dict[str, Image]) -> bool:
        """Whether these images have their files in `slot` already."""
        archives = [self._archives.get(slot / path) for path in images]
        return all(
            archive is not None and archive.fits(image)
            for archive, image in zip(archives, images.values(), strict=True)
        )

    def fill(self, slot: Path, images: dict[str, Image]) -> tuple[FileEntry, ...]:
        """Copy the images into a slot, some of it perhaps later (`copier.is_copying`); what its files hold then.

        Raises:
            SnapshotError: there is no room.
        """
        entries = []
        self.copier.begin(functools.partial(_lasting, self._engine))
        for path, image in images.items():
            archive = self._archive(slot / path, image)
            entries.append(dataclasses.replace(archive.fill(image, self.copier), path=path))
        self.copier.seal()
        self._drop_others(slot, images)
        return tuple(entries)

    def close(self) -> None:
        """Let all mappings go."""
        self.copier.drop()
        for archive in self._archives.values():
            self._close(archive)
        self._archives.clear()

    def _archive(self, path: Path, image: Image) -> Archive:
        archive = self._archives.get(path)
        if archive is not None and archive.fits(image):
            return archive
        if archive is not None:
            self._close(self._archives.pop(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = self._archives[path] = Archive(path, image)
        self.copier.admit(archive.memory)
        return archive

    def _drop_others(self, slot: Path, images: dict[str, Image]) -> None:
        """A file that is not saved any more must not be found beside the others."""
        kept = {slot / path for path in images}
        for path in [path for path in self._archives if path.is_relative_to(slot) and path not in kept]:
            self._close(self._archives.pop(path))
            path.unlink(missing_ok=True)

    def _close(self, archive: Archive) -> None:
        self.copier.release(archive.memory)
        archive.close()


def _lasting(engine: Any) -> frozenset[int]:
    """The storages of weights, masters and moments, by identity: nothing changes them but an optimizer step, or the
    script. DeepSpeed replaces some of them at each step."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = [part for weight in engine.module.parameters() for part in (weight, getattr(weight, "ds_tensor", None))]
    masters = [*optimizer.state, *(master for group in optimizer.param_groups for master in group["params"])]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    kept = (each for each in (*weights, *masters, *moments) if isinstance(each, torch.Tensor))
    return frozenset(tensor.untyped_storage()._cdata for tensor in kept)


def compare(engine: Any, parts: dict[int, Part], *, rank: int) -> str:
    """Hold what is in the engine against the digests of a snapshot: what differs, in words; empty if nothing does.

    Collective. Replicated weights are compared on every rank, with the part of the rank that saved them.

    Args:
        engine: it has just loaded the snapshot.
        parts: of the ranks whose files were loaded here.
        rank: this rank.
    """
    known = {entry.path: entry for part in parts.values() for entry in part.commit.files}
    own = {entry.path for entry in parts[rank].commit.files} if rank in parts else set()
    images = _collect(engine, everyone=True)
    for path in sorted(own - set(images)):
        return f"{path} has nothing in the engine that belongs to it"
    for path, image in images.items():
        entry = known.get(path)
        if entry is None:
            if path in own:
                return f"{path} is not in the snapshot"
            continue
        difference = _difference(image, entry)
        if difference:
            return f"{path}: {difference}"
    return ""


def _difference(image: Image, entry: FileEntry) -> str:
    """What of a file is not in the engine as it should be, in words. Less is a difference, too: of optimizer state that
    was not loaded there is nothing to compare."""
    expected = {record.name: record.digest for record in entry.records}
    found = {name: storage for name, storage in image.storages if storage.nbytes()}
    if found.keys() != expected.keys():
        return f"the engine has {len(found)} storages where the snapshot holds {len(expected)}"
    with ThreadPoolExecutor(num_hashing_threads()) as pool:
        digests = pool.map(_digest, found.values())
        for name, digest in zip(found, digests, strict=True):
            if digest != expected[name]:
                return f"{name} in the engine is not what the snapshot holds"
    return ""


def _digest(storage: Any) -> str:
    return xxhash.xxh3_128_hexdigest(as_bytes(storage).cpu().numpy().data)


def num_hashing_threads() -> int:
    """How many threads of this rank may hash while training stands still: its share of the node's cores."""
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_THREADS_MAX, len(os.sched_getaffinity(0)) // num_ranks))


class _Collector:
    """Stands in for DeepSpeed's checkpoint engine: pictures what it is told to save, and touches no disk."""

    name = "resilience"

    def __init__(self, original: Any) -> None:
        self._original = original
        self.images: dict[str, Image] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.images[path.removeprefix("/")] = picture(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There is no folder to make."""

    def create(self, info: Any) -> None:
        """Nothing begins."""

    def commit(self, info: Any) -> bool:
        return True


def _collect(engine: Any, *, everyone: bool) -> dict[str, Image]:
    """What `save_checkpoint` hands to its writer; with `everyone`, replicated weights on every rank."""
    with _quiet(), _collecting(engine, everyone) as collector:
        # The class's own: nothing that was put around the engine's sees a save.
        type(engine).save_checkpoint(engine, "/", tag=STATE, save_latest=False)
    return collector.images


@contextlib.contextmanager
def _collecting(engine: Any, everyone: bool) -> Iterator[_Collector]:
    collector = _Collector(engine.checkpoint_engine)
    before = dict(vars(engine))
    replaced = {"checkpoint_engine": collector, "_copy_recovery_script": lambda *_: None}
    if everyone and not engine.has_moe_layers:
        replaced["save_non_zero_checkpoint"] = True
    replaced |= {name: lambda *_: None for name in ("_create_checkpoint_file", "_create_zero_checkpoint_files")}
    for name, value in replaced.items():
        vars(engine)[name] = value
    try:
        yield collector
    finally:
        for name in replaced:
            if name in before:
                vars(engine)[name] = before[name]
            else:
                del vars(engine)[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed says each save, and there is one every few steps."""
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
