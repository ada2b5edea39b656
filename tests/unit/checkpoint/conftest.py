"""A save_dir as a run leaves it, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from resilience.checkpoint.manifest import Manifest
from resilience.checkpoint.publish import Marker, begin, hash_and_flush, publish
from resilience.checkpoint.verify import list_files

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a checkpoint of three files as a run would; the tag's directory."""

    def save(tag: str, *, step: int = 1, generation: int = 1, run_id: str = "run", latest: bool = True) -> Path:
        save_dir, tag_dir = tmp_path / "ck", tmp_path / "ck" / tag
        begin(save_dir, tag, Marker(run_id=run_id, generation=generation, step=step, started_at=100.0 + step))
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "deep/er/file.bin"):
            (tag_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (tag_dir / name).write_bytes(f"{name} of {tag}".encode())
        manifest = Manifest(
            run_id=run_id,
            generation=generation,
            tag=tag,
            step=step,
            last_verified_step=step,
            world_size=1,
            zero_stage=2,
            latest=latest,
            created_at=100.0 + step,
            files={path: hash_and_flush(tag_dir / path) for path in list_files(tag_dir)},
        )
        publish(save_dir, manifest)
        return tag_dir

    return save
