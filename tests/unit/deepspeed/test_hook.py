"""The hook on `deepspeed.initialize`: put in, taken out, and refused outside of the tested versions."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import pytest

from resilience.config import Config
from resilience.context import RunContext
from resilience.deepspeed import hook
from resilience.deepspeed.versions import TESTED_VERSIONS, require_tested_version
from resilience.errors import UnsupportedVersionError


def context(tmp_path: Path, mode: str = "enforce") -> RunContext:
    config = Config.model_validate({"mode": mode})
    return RunContext(run_id="run", run_dir=tmp_path, coordinator_address="127.0.0.1:1", config=config)


def test_a_tested_version_is_accepted_with_and_without_a_local_part() -> None:
    require_tested_version(TESTED_VERSIONS[0])
    require_tested_version(f"{TESTED_VERSIONS[0]}+cu128")


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "unknown"])
def test_another_version_is_refused_with_the_fix(version: str) -> None:
    with pytest.raises(
        UnsupportedVersionError, match=f"deepspeed {version} was not tested.*install deepspeed=="
    ) as info:
        require_tested_version(version)
    assert info.value.exit_code == 64


def test_a_launch_with_another_version_ends_with_64_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "9.9.9")
    with pytest.raises(SystemExit) as info:
        hook.install(context(tmp_path))
    assert info.value.code == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_initialize_is_wrapped_and_put_back(tmp_path: Path) -> None:
    stock = deepspeed.initialize
    uninstall = hook.install(context(tmp_path))
    assert deepspeed.initialize is not stock
    assert deepspeed.initialize.__doc__ == stock.__doc__
    uninstall()
    assert deepspeed.initialize is stock


def test_mode_off_wraps_nothing(tmp_path: Path) -> None:
    stock = deepspeed.initialize
    hook.install(context(tmp_path, "off"))
    assert deepspeed.initialize is stock
