"""Saving: a marker, DeepSpeed's files, the random states, a hash of every file, the manifest, and only then `latest`.

DeepSpeed's own `latest` is held back: it writes it before all ranks have ended. A rank that cannot write goes through
all of DeepSpeed's barriers nevertheless, so that nobody waits for it; then all ranks raise and nothing is published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from resilience.checkpoint import randomness
from resilience.checkpoint.doubt import Saved
from resilience.checkpoint.exchange import agree, attempt, broadcast, gather
from resilience.checkpoint.manifest import FileEntry, Manifest, assign
from resilience.checkpoint.publish import Marker, begin, hash_and_flush, publish, random_states_file
from resilience.checkpoint.verify import member_files
from resilience.deepspeed import light_load, powers
from resilience.deepspeed.checkpoint_setting import Setting
from resilience.deepspeed.universal_batch import batch_of
from resilience.errors import CheckpointError
from resilience.events import CheckpointKind

__all__ = ["Saver"]

# What writing can fail with on one rank alone: the disk (torch reports it as RuntimeError), or a client state that
# cannot be pickled, which only the rank that writes it notices.
_WRITE_ERRORS = (OSError, RuntimeError, TypeError, ValueError, AttributeError, pickle.PicklingError)


class Saver:
    """The wrapper around one engine's save_checkpoint."""

    def __init__(self, setting: Setting, original: Callable[..., Any]) -> None:
        self._setting = setting
        self._original = original
        self._signature = inspect.signature(original)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """`DeepSpeedEngine.save_checkpoint`, and publication of what it wrote.

        Raises:
            CheckpointError: a rank could not write or read; on all ranks alike, and nothing is published.
            FencedError: a newer generation of the run has published already.
        """
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        if not options["save_dir"]:
            return self._original(*args, **kwargs)
        setting, engine = self._setting, self._setting.engine
        if setting.led is not None and setting.led.relies_on_snapshot:
            setting.led.begin_again("the script saves a checkpoint before it trains")
        started = setting.clock.monotonic()
        save_dir = Path(options["save_dir"])
        tag = f"global_step{engine.global_steps}" if options["tag"] is None else str(options["tag"])
        what = f"saving checkpoint {save_dir / tag}"
        latest = bool(options["save_latest"])
        options.update(tag=tag, save_latest=False)
        self._if_leading(what, lambda: begin(save_dir, tag, self._marker(), since=setting.started_at))
        with _contained(engine) as writing:
            result = self._original(*call.args, **call.kwargs)
            writing.attempt(lambda: self._save_random_states(save_dir / tag))
        agree(what, writing.failure, setting.device)
        manifest = self._manifest(tag, latest, self._hash(what, save_dir / tag, writing.paths))
        self._if_leading(what, lambda: publish(save_dir, manifest, since=setting.started_at))
        if setting.share.leads:
            setting.guard_state.saved.add(Saved(save_dir.absolute(), tag, manifest.step))
        setting.report(
            CheckpointKind.PUBLISHED,
            str(save_dir.absolute()),
            tag,
            manifest.step,
            generation=manifest.generation,
            last_verified_step=manifest.last_verified_step,
            seconds=setting.clock.monotonic() - started,
        )
        return result

    def _if_leading(self, what: str, work: Callable[[], None]) -> None:
        attempt(what, work if self._setting.share.leads else lambda: None, self._setting.device)

    def _marker(self) -> Marker:
        setting = self._setting
        return Marker(
            run_id=setting.run_id,
            generation=setting.guard_state.generation,
            step=setting.engine.global_steps,
            started_at=setting.clock.wall(),
        )

    def _counters(self) -> dict[str, int]:
        engine = self._setting.engine
        return {"micro_steps": engine.micro_steps, powers.NAME: powers.origin(engine)}

    def _save_random_states(self, tag_dir: Path) -> None:
        states = randomness.capture(get_cuda_rng_tracker().get_states())
        content: dict[str, Any] = {"random": states, "counters": self._counters()}
        batch = batch_of(self._setting.engine)
        hyperparameters = light_load.capture(self._setting.engine)
        if hyperparameters is not None:
            content[light_load.HYPERPARAMETERS] = hyperparameters
        if batch is not None:
            content["batch"] = dataclasses.asdict(batch)
        path = tag_dir / random_states_file(self._setting.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")

    def _hash(self, what: str, tag_dir: Path, written: list[Path]) -> dict[str, FileEntry]:
        """Hash and flush this rank's share of the files, and gather all shares.

        On shared storage rank 0's list of files is divided among all ranks; where each node has storage of its own
        (DeepSpeed's use_node_local_storage), the node's list among its ranks.
        """
        share, device = self._setting.share, self._setting.device
        sizes = attempt(what, lambda: member_files(tag_dir) if share.leads or share.node is not None else {}, device)
        if share.node is None:
            sizes = broadcast(sizes, device)

        def hash_mine() -> dict[str, FileEntry]:
            self._require_listed(written, sizes)
            return {path: hash_and_flush(tag_dir / path) for path in assign(sizes, share.index, share.count)}

        found = attempt(what, hash_mine, device)
        prefix = "" if share.node is None else f"{share.node}:"
        rows = [(prefix + path, entry.size, entry.digest, share.node) for path, entry in found.items()]
        return {
            key: FileEntry(size=size, digest=digest, node=node)
            for part in gather(rows, device)
            for key, size, digest, node in part
        }

    def _require_listed(self, written: list[Path], listed: Mapping[str, int]) -> None:
        """A file that the rank that lists does not see would be missing in the manifest, or on another machine."""
        unseen = [path for path in written if path.name not in listed and path.exists()]
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see {unseen[0]}, which rank {self._setting.rank} wrote: save to storage that all "
                "nodes share, or set use_node_local_storage in DeepSpeed's checkpoint block"
            )

    def _manifest(self, tag: str, latest: bool, files: dict[str, FileEntry]) -> Manifest:
        setting = self._setting
        return Manifest(
            run_id=setting.run_id,
            generation=setting.guard_state.generation,
            tag=tag,
            step=setting.engine.global_steps,
            last_verified_step=setting.guard_state.last_verified_step,
            world_size=setting.world_size,
            zero_stage=int(setting.engine.zero_optimization_stage()),
            latest=latest,
            created_at=setting.clock.wall(),
            files=files,
        )


class _Writing:
    """The first failure of this rank's writes; the later ones are left out."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.paths: list[Path] = []
        """What the checkpoint engine was told to write."""

    def attempt(self, write: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return write()
        except _WRITE_ERRORS as error:
            self.failure = error
            return None


@contextlib.contextmanager
def _contained(engine: Any) -> Iterator[_Writing]:
    """Keep failures of DeepSpeed's writes from jumping over its barriers."""
    writing, writer = _Writing(), engine.checkpoint_engine
    save = writer.save

    def save_and_note(state_dict: Any, path: str) -> Any:
        writing.paths.append(Path(path))
        return save(state_dict, path)

    with contextlib.ExitStack() as undo:
        undo.callback(_contain(writer, "save", save_and_note, writing))
        undo.callback(_contain(writer, "makedirs", writer.makedirs, writing))
        undo.callback(_contain(engine, "_copy_recovery_script", engine._copy_recovery_script, writing))
        yield writing


def _contain(owner: Any, name: str, write: Callable[..., Any], writing: _Writing) -> Callable[[], None]:
    before = vars(owner).get(name)
    setattr(owner, name, lambda *args, **kwargs: writing.attempt(lambda: write(*args, **kwargs)))
    return lambda: delattr(owner, name) if before is None else setattr(owner, name, before)
