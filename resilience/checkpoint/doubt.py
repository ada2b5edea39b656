"""Published checkpoints that may hold damage which was found only later: a word beside the manifest says so.

It belongs to that manifest alone: a later save under the same tag is not doubted. Nobody loads what is doubted; who
knows better takes the file away. Never here: what is damaged, and since when.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from resilience.checkpoint.manifest import Manifest, fingerprint
from resilience.checkpoint.publish import FOLDER, read_manifest, write_atomically
from resilience.errors import CheckpointError

__all__ = ["DOUBT", "Saved", "SavedCheckpoints", "doubt", "read_doubt"]

DOUBT = f"{FOLDER}/doubt.json"


def doubt(tag_dir: Path, reason: str) -> None:
    """Have nobody load this checkpoint any more; nothing is done where it has no manifest.

    Raises:
        CheckpointError: its manifest cannot be read.
        OSError: the directory cannot be written.
    """
    manifest = read_manifest(tag_dir)
    if manifest is not None:
        content = {"manifest": fingerprint(manifest), "reason": reason}
        write_atomically(tag_dir / DOUBT, json.dumps(content).encode())


def read_doubt(tag_dir: Path, manifest: Manifest) -> str:
    """Why the checkpoint with this manifest must not be loaded, in words; empty where nothing is known against it."""
    try:
        content = json.loads((tag_dir / DOUBT).read_text(encoding="utf-8"))
        return str(content["reason"]) if content["manifest"] == fingerprint(manifest) else ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{DOUBT} cannot be read ({error}); somebody had reason to write it"


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was published."""

    directory: Path
    """The script's save_dir."""
    tag: str
    step: int

    @property
    def tag_dir(self) -> Path:
        return self.directory / self.tag


class SavedCheckpoints:
    """What this process has published on its storage.

    Args:
        tell: gets each that is doubted, with a line about it; also if it could not be marked.
    """

    def __init__(self, tell: Callable[[Saved, str], None]) -> None:
        self._tell = tell
        self._saved: dict[Path, Saved] = {}

    def add(self, saved: Saved) -> None:
        """A checkpoint of the state after its step is published."""
        self._saved[saved.tag_dir] = saved

    def distrust(self, clean_step: int, *, found_at: int) -> None:
        """The state has changed after `clean_step`: doubt all that was saved later.

        Args:
            clean_step: newest step that is known to be clean; below 0 nobody knows since when the state is wrong, and
                nothing is doubted, for it may all be good.
            found_at: step in which that was found.
        """
        for tag_dir, saved in [each for each in self._saved.items() if 0 <= clean_step < each[1].step]:
            del self._saved[tag_dir]
            reason = (
                f"saved after step {saved.step}; damage to the state was found in step {found_at},"
                f" and step {clean_step} is the newest that is known to be clean"
            )
            try:
                doubt(tag_dir, reason)
                self._tell(saved, f"checkpoint {tag_dir} is loaded no more: {reason}")
            except (OSError, CheckpointError) as error:
                self._tell(saved, f"checkpoint {tag_dir} may hold damage ({reason}) and cannot be marked: {error}")
