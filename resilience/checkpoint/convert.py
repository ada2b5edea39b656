"""A checkpoint in a form that any number of ranks can load: where it lies, what it was made of, how it appears.

It lies beside its source as `<tag>-universal`, and appears under that name by one rename when it is complete, hashed
and on disk, with a manifest of its own. It remembers of which save it was made, so that it is made once, and again if
the source was saved anew. Who converts is passed in; nothing here knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from resilience.checkpoint.manifest import FileEntry, Manifest, fingerprint, serialise
from resilience.checkpoint.publish import (
    FOLDER,
    MANIFEST,
    hash_and_flush,
    hash_file,
    read_manifest,
    sync_folder,
    write_atomically,
)
from resilience.checkpoint.verify import UNIVERSAL_ORIGIN, check_plain, list_files, member_files, verify
from resilience.errors import CheckpointError

__all__ = [
    "LATEST_UNIVERSAL",
    "SUFFIX",
    "Origin",
    "convert",
    "identify",
    "is_good",
    "is_made_of",
    "read_origin",
    "universal_of",
]

SUFFIX = "-universal"
LATEST_UNIVERSAL = "latest_universal"
"""Where DeepSpeed's load_universal looks for the tag if it is given none."""
_TEMPORARY = ".resilience-converting-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The save that a universal checkpoint was made of."""

    tag: str
    fingerprint: str
    """Of the source's files: two saves under one tag differ in it."""
    run_id: str
    generation: int
    step: int
    last_verified_step: int
    world_size: int
    """Ranks that saved it; 0 where it has no manifest."""
    zero_stage: int
    created_at: float
    """When the source was saved, in seconds since the Unix epoch; 0 where it has no manifest."""


def universal_of(tag_dir: Path) -> Path:
    """Where the universal form of a checkpoint lies."""
    return tag_dir.with_name(f"{tag_dir.name}{SUFFIX}")


def identify(tag_dir: Path, *, verified: bool) -> Origin:
    """What a checkpoint is, after its files were seen to be good.

    Args:
        tag_dir: the checkpoint.
        verified: whether somebody has just held its files against its manifest, or seen that they are whole (as the
            guardian does with a folder that it prepares from memory snapshots).

    Raises:
        CheckpointError: its files are not what its manifest says, or are torn; or each node holds only its own.
        OSError: it cannot be read.
    """
    manifest = read_manifest(tag_dir)
    if manifest is None:
        return _identify_plain(tag_dir, verified)
    if any(entry.node is not None for entry in manifest.files.values()):
        raise CheckpointError(
            f"{tag_dir}: each node has only its own shards, so no process can convert it; gather the files of all "
            "nodes on shared storage, without use_node_local_storage"
        )
    problems = [] if verified else [problem.detail for problem in verify(tag_dir, manifest) if problem.fatal]
    if problems:
        raise CheckpointError(f"{tag_dir}: {problems[0]}; it is not converted. Take another checkpoint")
    return Origin(
        tag=tag_dir.name,
        fingerprint=fingerprint(manifest),
        run_id=manifest.run_id,
        generation=manifest.generation,
        step=manifest.step,
        last_verified_step=manifest.last_verified_step,
        world_size=manifest.world_size,
        zero_stage=manifest.zero_stage,
        created_at=manifest.created_at,
    )


def _identify_plain(tag_dir: Path, verified: bool) -> Origin:
    names = member_files(tag_dir)
    if not names:
        raise CheckpointError(f"{tag_dir}: no checkpoint there; give a save_dir of save_checkpoint, or one of its tags")
    problems = () if verified else check_plain(tag_dir, [name for name in names if "/" not in name])
    if problems:
        raise CheckpointError(f"{tag_dir}: {problems[0].detail}; it is not converted. Take another checkpoint")
    entries = {name: hash_file(tag_dir / name) for name in names}
    unknown = Manifest(
        run_id="",
        generation=0,
        tag=tag_dir.name,
        step=0,
        last_verified_step=0,
        world_size=0,
        zero_stage=0,
        latest=False,
        created_at=0.0,
        files=entries,
    )
    return Origin(
        tag=tag_dir.name,
        fingerprint=fingerprint(unknown),
        run_id="",
        generation=0,
        step=0,
        last_verified_step=0,
        world_size=0,
        zero_stage=0,
        created_at=0.0,
    )


def read_origin(universal: Path) -> Origin | None:
    """Of what a universal checkpoint was made; None if that cannot be told."""
    try:
        return Origin(**json.loads((universal / UNIVERSAL_ORIGIN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_made_of(universal: Path, origin: Origin) -> bool:
    """Whether `universal` is there and was made of just this save; its files are not looked at."""
    return read_origin(universal) == origin


def is_good(universal: Path) -> bool:
    """Whether a universal checkpoint is as its manifest says. Reads all its files."""
    try:
        manifest = read_manifest(universal)
        return manifest is not None and not any(problem.fatal for problem in verify(universal, manifest))
    except (OSError, CheckpointError):
        return False


def convert(tag_dir: Path, origin: Origin, run: Callable[[Path, Path], None], *, now: float) -> Path:
    """Make the universal form of a checkpoint, in place of one that may be there.

    Args:
        tag_dir: the source; its files were verified.
        origin: what `identify` said of it.
        run: converts its first argument into its second, an absent folder whose name is kept.
        now: seconds since the Unix epoch.

    Returns:
        The universal checkpoint.

    Raises:
        CheckpointError: the conversion failed, or the source changed meanwhile.
        OSError: there is no room, or it cannot be written here.
    """
    universal = universal_of(tag_dir)
    with _workshop(universal) as folder:
        made = folder / universal.name
        run(tag_dir, made)
        _seal(made, origin, now)
        if identify(tag_dir, verified=True) != origin:
            raise CheckpointError(f"{tag_dir}: was saved anew while it was converted; try again")
        _put(made, universal, folder / "replaced")
    sync_folder(universal.parent)
    return universal


@contextlib.contextmanager
def _workshop(universal: Path) -> Iterator[Path]:
    """A folder beside, of this process, gone afterwards; those of processes that were killed here go first."""
    prefix = f"{_TEMPORARY}{universal.name}."
    for left in universal.parent.glob(f"{prefix}*"):
        if not _is_alive(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    folder = universal.parent / f"{prefix}{os.uname().nodename}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(owner: str) -> bool:
    """Whether a process may still be at work: of those on other machines that cannot be told."""
    host, _, pid = owner.rpartition("-")
    return host != os.uname().nodename or not pid.isdigit() or Path(f"/proc/{pid}").exists()


def _seal(made: Path, origin: Origin, now: float) -> None:
    """Write down where it came from, flush and hash every file, and write the manifest."""
    (made / FOLDER).mkdir(exist_ok=True)
    (made / UNIVERSAL_ORIGIN).write_text(json.dumps(dataclasses.asdict(origin), indent=1), encoding="utf-8")
    files: dict[str, FileEntry] = {name: hash_and_flush(made / name) for name in list_files(made)}
    manifest = Manifest(
        run_id=origin.run_id,
        generation=origin.generation,
        tag=made.name,
        step=origin.step,
        last_verified_step=origin.last_verified_step,
        world_size=origin.world_size,
        zero_stage=origin.zero_stage,
        latest=False,
        created_at=now,
        files=files,
    )
    write_atomically(made / MANIFEST, serialise(manifest).encode())
    for folder in [made, *(path for path in made.rglob("*") if path.is_dir())]:
        sync_folder(folder)


def _put(made: Path, universal: Path, replaced: Path) -> None:
    """One rename where there is none yet. An older one makes room first: a process that dies between finds none."""
    if universal.exists():
        universal.rename(replaced)
    made.rename(universal)
