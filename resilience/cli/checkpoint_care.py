"""checkpoints prune · checkpoints convert"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import output
from resilience.cli.options import Json
from resilience.clock import SystemClock
from resilience.errors import CheckpointError, ResilienceError, UsageError

if TYPE_CHECKING:
    from resilience.checkpoint.batch import Batch

__all__ = ["register"]

_RECORD = "resilience/random-rank-00000.json"


def register(group: typer.Typer) -> None:
    """Add the verbs of this file."""
    group.command()(prune)
    group.command()(convert)


def prune(
    directory: Annotated[Path, typer.Argument(metavar="SAVE_DIR", help="A save_dir of save_checkpoint.")],
    keep: Annotated[int, typer.Option(min=1, help="Keep so many of the newest good ones.")] = 3,
    keep_every: Annotated[int, typer.Option(min=0, help="And each whose step is a multiple of this; 0: none.")] = 0,
    drop_bad: Annotated[
        bool, typer.Option("--drop-bad", help="Delete those that do not match their manifest.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be deleted, and why; delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete old checkpoints. Every file is read: only one that is good counts as kept.

    Never deleted: what `latest` names, the newest good one, one that is being saved, and what has no manifest.
    """
    from resilience.checkpoint.deletion import delete, known
    from resilience.checkpoint.retention import Policy, plan
    from resilience.checkpoint.verify import inspect, is_tag_dir, is_universal

    if not directory.is_dir() or is_tag_dir(directory) or is_universal(directory):
        raise UsageError(f"{directory}: give the save_dir of save_checkpoint, which holds several checkpoints")
    found = inspect(directory, read_files=True)
    if not found:
        raise CheckpointError(f"{directory}: no checkpoint there; give a save_dir of save_checkpoint")
    planned = plan([known(each) for each in found], Policy(keep=keep, keep_every=keep_every, drop_bad=drop_bad))
    gone = {} if dry_run else {each.tag: each.num_bytes for each in delete(directory, planned)}
    if as_json:
        output.print_json(
            [
                {"tag": each.tag, "delete": each.delete, "deleted": each.tag in gone, "reason": each.reason}
                for each in planned
            ]
        )
        return
    rows = [(each.tag, "deleted" if each.tag in gone else _word(each.delete, dry_run), each.reason) for each in planned]
    output.print_table(["tag", "what", "why"], rows, empty="no checkpoint was saved")
    if gone:
        output.print_text(f"{output.number(sum(gone.values()) / 1e6, 4, 'MB')} are free again")


def _word(is_planned: bool, dry_run: bool) -> str:
    if not is_planned:
        return "kept"
    return "would be deleted" if dry_run else "kept, in use"


def convert(
    directory: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_DIR", help="A save_dir (its `latest`) or a tag's directory.")
    ],
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks that are going to load it.")],
    as_json: Json = False,
) -> None:
    """Make the form of a checkpoint that any number of ranks can load, beside it, and compare it with the source.

    A run under --resilience does this by itself when it loads. With plain DeepSpeed, load it with `load_universal`.
    """
    from resilience.checkpoint.verify import is_universal, locate

    missing = [name for name in ("torch", "deepspeed") if importlib.util.find_spec(name) is None]
    if missing:
        raise ResilienceError(
            f"convert needs {' and '.join(missing)} to read checkpoints: pip install 'deepspeed-resilience[train]'"
        )
    if is_universal(directory):
        raise UsageError(f"{directory} is one that any number of ranks can load already; give the one it was made of")
    tag_dir = locate(directory).absolute()
    saved = _recorded_batch(tag_dir)
    batch = None if saved is None else _rescaled(saved, world_size)
    universal, was_there = _made_of(tag_dir)
    if as_json:
        content = {"source": tag_dir, "universal": universal, "was_there": was_there, "batch": batch}
        output.print_json({**content, "world_size": world_size})
        return
    print(f"{universal} {'was there already' if was_there else 'was made'}, and equals its source bit for bit")
    if batch is not None:
        print(f"on {world_size} ranks: {batch}")


def _made_of(tag_dir: Path) -> tuple[Path, bool]:
    """The universal form of a checkpoint, and whether it was there already."""
    from resilience.checkpoint.convert import LATEST_UNIVERSAL, convert, identify, is_good, is_made_of, universal_of
    from resilience.checkpoint.publish import write_atomically

    try:
        origin = identify(tag_dir, verified=False)
        universal = universal_of(tag_dir)
        was_there = is_made_of(universal, origin) and is_good(universal)
        if not was_there:
            with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed greets on standard output
                from resilience.deepspeed.universal import run_conversion

            convert(tag_dir, origin, run_conversion, now=SystemClock().wall())
        write_atomically(universal.parent / LATEST_UNIVERSAL, universal.name.encode())
    except OSError as error:
        raise CheckpointError(f"{tag_dir} cannot be converted ({error.strerror}: {error.filename})") from None
    return universal, was_there


def _recorded_batch(tag_dir: Path) -> Batch | None:
    """What the save recorded; its file is verified before anything is converted."""
    from resilience.checkpoint.batch import parse

    try:
        return parse(json.loads((tag_dir / _RECORD).read_text(encoding="utf-8")).get("batch"))
    except (OSError, ValueError, AttributeError):
        return None


def _rescaled(saved: Batch, world_size: int) -> Batch:
    from resilience.checkpoint.batch import rescale

    try:
        return rescale(saved, world_size)
    except CheckpointError as error:
        raise UsageError(f"--world-size {world_size}: {error}") from None
