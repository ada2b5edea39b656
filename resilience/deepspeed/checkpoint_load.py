"""Loading: candidates are verified before DeepSpeed opens, and so unpickles, any of their files.

All ranks share the hashing and come to the same answer. What is refused is said in one line and reported; the next
older good one is loaded instead. Random states and counters come back with a checkpoint of the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import deepspeed.runtime.engine
import torch.distributed
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from resilience.checkpoint import randomness
from resilience.checkpoint.batch import parse as parse_batch
from resilience.checkpoint.convert import LATEST_UNIVERSAL, SUFFIX
from resilience.checkpoint.exchange import attempt, broadcast, gather
from resilience.checkpoint.manifest import Manifest, assign, fingerprint, is_loaded
from resilience.checkpoint.publish import MANIFEST, hash_file, random_states_file, read_latest, read_manifest
from resilience.checkpoint.verify import (
    Candidate,
    State,
    candidates,
    check_plain,
    fallbacks,
    in_loading_order,
    verify,
)
from resilience.deepspeed import light_load, powers
from resilience.deepspeed.checkpoint_setting import Setting
from resilience.deepspeed.universal_batch import keep_batch
from resilience.deepspeed.universal_load import load_universally, seed_new_rank
from resilience.errors import CheckpointError
from resilience.events import CheckpointKind

__all__ = ["Loader"]

_log = logging.getLogger(__name__)

_NEW_WORLD = (
    "{source} was saved by another number of ranks and converted for {ranks}: masters, moments, weights and counters "
    "equal what was saved, bit for bit. From here on each rank has other data and random numbers, and sums are taken "
    "in another order: training goes on from the same state, but not bit for bit as it would have"
)


class Loader:
    """The wrapper around one engine's load_checkpoint."""

    def __init__(self, setting: Setting, original: Callable[..., Any]) -> None:
        self._setting = setting
        self._original = original
        self._signature = inspect.signature(original)
        # As the last load left it: if it has moved on, training has begun, and a load does not resume it.
        self._position = _position(setting.engine)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """`DeepSpeedEngine.load_checkpoint` of the newest checkpoint that can be trusted, or of `tag` if that can.

        Raises:
            CheckpointError: there are checkpoints and none can be trusted, or the one to load was saved by another
                number of ranks and cannot be converted. On all ranks alike.
        """
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        setting, engine = self._setting, self._setting.engine
        if engine.load_universal_checkpoint():
            self._look_at_universal(Path(options["load_dir"]), options["tag"])
            return self._original(*args, **kwargs)
        started = setting.clock.monotonic()
        load_dir = Path(options["load_dir"])
        full = bool(options["load_optimizer_states"] and not options["load_module_only"])
        is_untrained = _position(engine) == self._position
        chosen, is_light = self._choose(load_dir, options, full)
        if chosen is None:
            result = self._original(*args, **kwargs)
            powers.loaded(engine)
            return result
        tag_dir = load_dir / chosen.tag

        def load_tag(tag: str) -> Any:
            options["tag"] = tag
            with _weights_of(tag), light_load.without_shards(engine) if is_light else contextlib.nullcontext():
                return self._original(*call.args, **call.kwargs)

        if full and self._has_other_world_size(tag_dir, chosen):
            tag, strict = f"{chosen.tag}{SUFFIX}", bool(options["load_module_strict"])
            result = load_universally(setting, tag_dir, load_tag, suffixed_tag=tag, strict=strict)
            setting.note("elastic", _NEW_WORLD.format(source=tag_dir, ranks=setting.world_size))
        else:
            result = load_tag(chosen.tag)
        if result[0] is None:
            return result
        powers.loaded(engine)
        self._settle(tag_dir, is_light, full)
        if full and is_untrained and chosen.state is State.PUBLISHED:
            self._keep_batch(tag_dir)
        resumes = full and is_untrained and chosen.state is State.PUBLISHED and chosen.at < setting.started_at
        if broadcast(resumes, setting.device):  # by the clock of rank 0, which saved it
            what = f"restoring random states from {tag_dir}"
            attempt(what, lambda: self._restore_random_states(tag_dir), setting.device)
        self._position = _position(engine)
        setting.guard_state.loaded_step = engine.global_steps
        setting.report(
            CheckpointKind.LOADED,
            str(load_dir.absolute()),
            chosen.tag,
            engine.global_steps,
            generation=chosen.generation,
            last_verified_step=chosen.last_verified_step,
            seconds=setting.clock.monotonic() - started,
        )
        return result

    def _look_at_universal(self, load_dir: Path, tag: str | None) -> None:
        """The script asks for a universal checkpoint itself: one that this package made can be verified."""
        setting = self._setting
        named = tag if tag is not None else broadcast(read_latest(load_dir, LATEST_UNIVERSAL), setting.device)
        if named is None or not broadcast((load_dir / str(named) / MANIFEST).exists(), setting.device):
            self._say("a universal checkpoint without a manifest is loaded without being verified")
            return
        everyone = gather(self._verify(load_dir / str(named), False)[0], setting.device)
        problems = [detail for details in everyone for detail in details]
        if problems and setting.enforce:
            raise CheckpointError(f"{load_dir / str(named)}: {problems[0]}; convert it anew")

    def _choose(self, load_dir: Path, options: Mapping[str, Any], full: bool) -> tuple[Candidate | None, bool]:
        """The checkpoint to load, and whether lightly (`light_load.py`); None leaves everything to DeepSpeed."""
        tag: str | None = options["tag"]
        refused: list[tuple[Candidate, str]] = []
        for candidate in self._candidates(load_dir, tag):
            is_light = full and self._loads_lightly(load_dir / candidate.tag, candidate, options)
            reason = self._refusal(load_dir / candidate.tag, candidate, full, is_light)
            if reason is None:
                if refused:
                    self._say(f"{load_dir}: falls back to checkpoint {candidate.tag}")
                return candidate, is_light
            refused.append((candidate, reason))
            self._refuse(load_dir, candidate, reason)
            if not self._setting.enforce:
                return None, False
        if not refused:
            return None, False
        if tag is None and all(candidate.state is State.UNFINISHED for candidate, _ in refused):
            # The first save was cut short. Had it ever been complete, `latest` would name it.
            latest = broadcast(read_latest(load_dir), self._setting.device)
            if latest not in {candidate.tag for candidate, _ in refused}:
                self._say(f"{load_dir}: no checkpoint was ever finished; the script starts without one")
                return None, False
        listed = "; ".join(f"{candidate.tag}: {reason}" for candidate, reason in refused)
        raise CheckpointError(f"{load_dir}: no checkpoint can be trusted ({listed}); move them away to start afresh")

    def _loads_lightly(self, tag_dir: Path, candidate: Candidate, options: Mapping[str, Any]) -> bool:
        """Whether the script will be led past this checkpoint's step, and the optimizer's shards can be left out."""
        setting = self._setting
        if candidate.state is not State.PUBLISHED or candidate.reason:
            return False

        def is_possible() -> bool:
            if setting.led is None or not setting.led.goes_beyond(candidate.step):
                return False
            if _position(setting.engine) != self._position or not light_load.is_supported(setting.engine, options):
                return False
            manifest = read_manifest(tag_dir)
            if manifest is None or manifest.world_size != setting.world_size:
                return False
            content = json.loads((tag_dir / random_states_file(setting.rank)).read_text(encoding="utf-8"))
            return light_load.HYPERPARAMETERS in content

        try:
            mine = is_possible()
        except (OSError, ValueError, CheckpointError):
            mine = False  # whoever verifies its files says what is wrong with them
        return all(gather(mine, setting.device))

    def _candidates(self, load_dir: Path, tag: str | None) -> list[Candidate]:
        """What to try, best first, as rank 0 sees it."""

        def look() -> list[Candidate]:
            if self._setting.rank != 0:
                return []
            if tag is not None:
                wanted = PurePath(str(tag)).as_posix()
                return fallbacks(candidates(load_dir, wanted), wanted)
            latest = read_latest(load_dir)
            return in_loading_order(candidates(load_dir, latest), latest)

        order = attempt(f"looking for checkpoints in {load_dir}", look, self._setting.device)
        rows = broadcast([dataclasses.asdict(candidate) for candidate in order], self._setting.device)
        return [Candidate(**{**row, "state": State(row["state"])}) for row in rows]

    def _refusal(self, tag_dir: Path, candidate: Candidate, full: bool, is_light: bool) -> str | None:
        """Why a checkpoint must not be loaded, in the same words on all ranks; None if it may be."""
        if candidate.reason:
            return candidate.reason
        plain = candidate.state is State.PLAIN
        mine = (self._check_plain(tag_dir, full), "") if plain else self._verify(tag_dir, is_light)
        everyone = gather(mine, self._setting.device)
        found: list[str] = [detail for details, _ in everyone for detail in details]
        if not found and len({seen for _, seen in everyone}) > 1:
            found = ["the nodes' storages hold different saves of it"]
        if found:
            return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
        if plain:
            self._say(f"{tag_dir}: has no manifest; its files are whole, but that they belong together is not verified")
        return None

    def _verify(self, tag_dir: Path, is_light: bool) -> tuple[list[str], str]:
        """What this rank finds wrong with its share of a published checkpoint, and which save it sees."""
        share = self._setting.share
        try:
            manifest = read_manifest(tag_dir)
            if manifest is None:
                return [f"rank {self._setting.rank} does not see its manifest"], ""
            leave_out = light_load.is_shard if is_light else lambda _path: False
            problems = verify(
                tag_dir, manifest, index=share.index, count=share.count, node=share.node, leave_out=leave_out
            )
        except (OSError, CheckpointError) as error:
            return [str(error)], ""
        return [problem.detail for problem in problems if problem.fatal], fingerprint(manifest)

    def _check_plain(self, tag_dir: Path, full: bool) -> list[str]:
        """What this rank finds wrong with files that were saved without this package."""
        setting, engine = self._setting, self._setting.engine
        try:
            sizes = {path.name: path.stat().st_size for path in tag_dir.iterdir() if is_loaded(path.name)}
            mine = set(assign(sizes, setting.share.index, setting.share.count))
            mine.add(Path(engine._get_ckpt_name(str(tag_dir.parent), tag_dir.name)).name)
            if full and engine.save_zero_checkpoint and _num_shards(tag_dir) == _num_shards_here(engine):
                mine.add(self._optimizer_file(tag_dir, sizes))
            return [problem.detail for problem in check_plain(tag_dir, mine)]
        except OSError as error:
            return [str(error)]

    def _optimizer_file(self, tag_dir: Path, present: dict[str, int]) -> str:
        name = Path(self._setting.engine._get_zero_ckpt_name(str(tag_dir.parent), tag_dir.name)).name
        other = name.removeprefix("bf16_") if name.startswith("bf16_") else f"bf16_{name}"
        return other if other in present and name not in present else name

    def _has_other_world_size(self, tag_dir: Path, chosen: Candidate) -> bool:
        """Whether it has shards, and they are for another number of ranks than this run has."""
        setting, engine = self._setting, self._setting.engine

        def differs() -> bool:
            if not engine.save_zero_checkpoint:
                return False
            manifest = read_manifest(tag_dir) if chosen.state is State.PUBLISHED else None
            if manifest is not None:
                return manifest.world_size != setting.world_size
            return _num_shards(tag_dir) != _num_shards_here(engine)

        found = attempt(f"loading {tag_dir}", differs, setting.device)
        return bool(broadcast(found, setting.device))

    def _keep_batch(self, tag_dir: Path) -> None:
        """As many samples in an optimizer step as when it was saved, on whatever number of ranks."""
        setting = self._setting

        def keep() -> str:
            manifest = read_manifest(tag_dir)
            assert manifest is not None
            name = random_states_file(setting.rank if setting.rank < manifest.world_size else 0)
            saved = parse_batch(json.loads(_verified_text(tag_dir, manifest, name, setting.share.node)).get("batch"))
            return "" if saved is None else keep_batch(setting.engine, saved)

        done = attempt(f"keeping the batch size of {tag_dir}", keep, setting.device)
        if done:
            setting.note("elastic", done)

    def _settle(self, tag_dir: Path, is_light: bool, full: bool) -> None:
        """After a light load, what the script can see of the optimizer comes back; and who brings the rest is noted."""
        setting = self._setting
        if setting.led is None:
            return
        if not is_light:
            setting.led.relies_on_snapshot &= not full
            return
        setting.led.relies_on_snapshot = True

        def restore() -> None:
            manifest = read_manifest(tag_dir)
            assert manifest is not None
            text = _verified_text(tag_dir, manifest, random_states_file(setting.rank), setting.share.node)
            light_load.restore(setting.engine, json.loads(text)[light_load.HYPERPARAMETERS])

        attempt(f"restoring hyperparameters from {tag_dir}", restore, setting.device)
        self._say(f"{tag_dir}: loaded without its optimizer's shards; the memory snapshot brings newer ones")

    def _restore_random_states(self, tag_dir: Path) -> None:
        """Install this rank's random states and counters, if this run wrote them.

        Only for a load that resumes: before training, of what was saved before this process began. DeepSpeed keeps
        none, so any other load leaves them alone, as it would without this package. A rank that was not there when
        they were saved gets states that follow from the checkpoint and its rank.
        """
        setting, engine = self._setting, self._setting.engine
        manifest = read_manifest(tag_dir)
        assert manifest is not None
        if manifest.run_id != setting.run_id:
            return
        is_new = setting.rank >= manifest.world_size
        name = random_states_file(0 if is_new else setting.rank)
        content = json.loads(_verified_text(tag_dir, manifest, name, setting.share.node))
        if is_new:
            seed_new_rank(f"{manifest.run_id}\n{manifest.step}", setting.rank)
        else:
            tracked = randomness.restore(content["random"], source=str(tag_dir))
            if tracked:
                get_cuda_rng_tracker().set_states(tracked)
        # An unfinished accumulation is not in a checkpoint: the step begins anew with its first micro-batch.
        micro_steps = int(content["counters"]["micro_steps"])
        engine.micro_steps = micro_steps - micro_steps % engine.gradient_accumulation_steps()
        powers.bring_back(engine, int(content["counters"][powers.NAME]))

    def _refuse(self, load_dir: Path, candidate: Candidate, reason: str) -> None:
        self._say(f"{load_dir}: checkpoint {candidate.tag} refused: {reason}")
        self._setting.report(
            CheckpointKind.REFUSED,
            str(load_dir.absolute()),
            candidate.tag,
            candidate.step,
            generation=candidate.generation,
            last_verified_step=candidate.last_verified_step,
            reason=reason,
        )

    def _say(self, line: str) -> None:
        if self._setting.rank == 0:
            _log.warning("resilience: %s", line)


def _position(engine: Any) -> tuple[int, int]:
    return int(engine.global_steps), int(engine.micro_steps)


@contextlib.contextmanager
def _weights_of(tag: str) -> Iterator[None]:
    """With ZeRO-3 and load_optimizer_states=False DeepSpeed reads the weights of what `latest` names, whichever tag it
    was told: have it read those of the checkpoint that was verified."""
    original = deepspeed.runtime.engine.get_fp32_state_dict_from_zero_checkpoint
    deepspeed.runtime.engine.get_fp32_state_dict_from_zero_checkpoint = functools.partial(original, tag=tag)
    try:
        yield
    finally:
        deepspeed.runtime.engine.get_fp32_state_dict_from_zero_checkpoint = original


def _num_shards_here(engine: Any) -> int:
    return torch.distributed.get_world_size(engine.optimizer.dp_process_group)


def _num_shards(tag_dir: Path) -> int:
    """Those of the first model-parallel rank: one for each data-parallel rank."""
    return sum(1 for _ in tag_dir.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))


def _verified_text(tag_dir: Path, manifest: Manifest, name: str, node: str | None) -> str:
    """A small file's content, if its checksum is that of the manifest."""
    path = tag_dir / name
    entry = manifest.files.get(name if node is None else f"{node}:{name}")
    if entry is None or hash_file(path).digest != entry.digest:
        raise CheckpointError(f"{path}: is not what the manifest says; the checkpoint changed while it was loaded")
    return path.read_text(encoding="utf-8")
