"""Loading what another number of ranks saved, in the same call: convert, load universally, complete, compare.

Collective. Whatever one rank finds wrong is raised on all, before the script trains a step on it. What was converted
lies beside the checkpoint and is used again, after its files were held against its manifest.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from resilience.checkpoint.convert import SUFFIX, convert, identify, is_made_of, universal_of
from resilience.checkpoint.exchange import agree, attempt, broadcast, gather
from resilience.checkpoint.publish import read_manifest
from resilience.checkpoint.verify import verify
from resilience.deepspeed.checkpoint_setting import Setting
from resilience.deepspeed.sharded import Sharded
from resilience.deepspeed.universal import complete, differences, loading_universally, run_conversion, unsupported
from resilience.errors import CheckpointError

__all__ = ["load_universally", "seed_new_rank"]

_PATIENCE_S = 2.0
"""While rank 0 converts, the others hear from it this often, so that no collective waits for long."""


def load_universally(
    setting: Setting, tag_dir: Path, load: Callable[[str], Any], *, suffixed_tag: str, strict: bool
) -> Any:
    """Load a checkpoint of another number of ranks into the engine.

    Args:
        setting: the engine and the run.
        tag_dir: the checkpoint; all ranks have just verified its files.
        load: DeepSpeed's load of the tag that it is given.
        suffixed_tag: the tag of its universal form, as `load` wants it.
        strict: `load_module_strict` of the script's call.

    Returns:
        What `load` returned.

    Raises:
        CheckpointError: it cannot be converted, or what the engine holds afterwards is not what was saved.
    """
    assert suffixed_tag.endswith(SUFFIX)
    what = f"loading {tag_dir} on {setting.world_size} ranks"
    attempt(what, lambda: _refuse_unsupported(setting.engine, tag_dir), setting.device)
    _provide(setting, tag_dir, what)
    with loading_universally(setting.engine):
        result = load(suffixed_tag)
    if result[0] is None:
        raise CheckpointError(f"{what}: DeepSpeed found nothing to load in {universal_of(tag_dir)}")
    sharded = attempt(what, lambda: Sharded(tag_dir), setting.device)
    attempt(what, lambda: complete(setting.engine, sharded, strict=strict), setting.device)
    found = [each for rank in gather(differences(setting.engine, sharded)[:8], setting.device) for each in rank]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(
            f"{what}: {found[0]}{more}. DeepSpeed's universal checkpoint did not bring back what was saved; start with "
            f"{sharded.num_shards} ranks"
        )
    return result


def _refuse_unsupported(engine: Any, tag_dir: Path) -> None:
    reason = unsupported(engine)
    if reason:
        raise CheckpointError(f"with {reason} only as many ranks can load it as saved it; start with as many")
    saved, here = Sharded(tag_dir).stage, int(engine.zero_optimization_stage())
    if (saved == 3) != (here == 3):
        raise CheckpointError(f"it was saved with ZeRO stage {saved} and this run has {here}: set stage {saved}")


def _provide(setting: Setting, tag_dir: Path, what: str) -> None:
    """See to it that the universal form is there and good: what is damaged is made anew, once."""
    universal = universal_of(tag_dir)
    origin = attempt(what, lambda: identify(tag_dir, verified=True) if setting.rank == 0 else None, setting.device)
    is_there = setting.rank == 0 and origin is not None and is_made_of(universal, origin)
    for is_last in (False, True):
        if broadcast(is_there, setting.device):
            problems = [each for found in gather(_problems(setting, universal), setting.device) for each in found]
            if not problems:
                return
            if is_last:
                raise CheckpointError(f"{universal}: {problems[0]}")
        work = _Conversion(lambda: convert(tag_dir, _known(origin), run_conversion, now=setting.clock.wall()))
        work.run(what, setting)
        is_there = True
    raise AssertionError("the second round returns or raises")


def _known(origin: Any) -> Any:
    assert origin is not None
    return origin


def _problems(setting: Setting, universal: Path) -> list[str]:
    share = setting.share
    try:
        manifest = read_manifest(universal)
        if manifest is None:
            return [f"rank {setting.rank} does not see its manifest: save to storage that all nodes share"]
        found = verify(universal, manifest, index=share.index, count=share.count)
    except (OSError, CheckpointError) as error:
        return [str(error)]
    return [problem.detail for problem in found if problem.fatal]


class _Conversion:
    """Work of rank 0 for which the others wait, a little at a time."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work

    def run(self, what: str, setting: Setting) -> None:
        if setting.rank != 0:
            while not broadcast(True, setting.device):
                pass
            agree(what, None, setting.device)
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._work)
            while True:
                is_done = bool(concurrent.futures.wait([future], timeout=_PATIENCE_S).done)
                if broadcast(is_done, setting.device):
                    break
        failure = future.exception()
        if failure is not None and not isinstance(failure, (OSError, CheckpointError)):
            raise failure
        agree(what, failure, setting.device)


def seed_new_rank(source: str, rank: int) -> None:
    """Random states for a rank that the checkpoint has none of: they follow from what is loaded and from the rank."""
    digest = hashlib.sha256(f"{source}\n{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    numpy.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(digest[16:])
