"""digest"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from resilience.cli import output
from resilience.cli.options import Json
from resilience.errors import CheckpointError, ResilienceError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("digest")(digest)


def digest(
    directory: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_DIR", help="A save_dir (its `latest`) or a tag's directory.")
    ],
    as_json: Json = False,
) -> None:
    """SHA-256 over a checkpoint's consolidated fp32 weights, in name order: equal weights, equal digest."""
    from resilience.checkpoint.publish import read_manifest
    from resilience.checkpoint.verify import locate, verify

    missing = [name for name in ("torch", "deepspeed") if importlib.util.find_spec(name) is None]
    if missing:
        raise ResilienceError(
            f"digest needs {' and '.join(missing)} to read checkpoints: pip install 'deepspeed-resilience[train]'"
        )
    tag_dir = locate(directory)
    manifest = read_manifest(tag_dir)
    if manifest is None:
        print(f"resilience: {tag_dir}: has no manifest, so it is read without being verified", file=sys.stderr)
    else:
        problems = [problem.detail for problem in verify(tag_dir, manifest) if problem.fatal]
        if problems:
            raise CheckpointError(f"{tag_dir}: {problems[0]}; a digest of it would mean nothing")
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed greets on standard output when it is imported
        from resilience.deepspeed import consolidate

    found = consolidate.digest(tag_dir)
    if as_json:
        content = {"directory": str(tag_dir), "tag": tag_dir.name, "digest": found, "verified": manifest is not None}
        output.print_json(content)
    else:
        print(found)
