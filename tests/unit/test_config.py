"""The configuration: sources and their order, and one clear line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resilience.config import Config, load_config
from resilience.errors import ConfigError, ExitCode
from resilience.events import Mode


def test_defaults_need_no_source() -> None:
    assert load_config() == Config()


def test_stronger_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "resilience.toml"
    file.write_text('mode = "shadow"\n[policy]\nmax_restarts = 7\n')
    config = load_config(
        file,
        deepspeed_config={"resilience": {"policy": {"max_restarts": 5, "max_skips_in_a_row": 9}}},
        overrides={"policy": {"max_restarts": 8}, "launch": {"dir": None}},
        environ={"RESILIENCE_MODE": "off", "RESILIENCE_POLICY__MAX_REPLAYS_PER_STEP": "4", "RESILIENCE_CONTEXT": "/x"},
    )
    assert config.policy.max_restarts == 8
    assert config.policy.max_skips_in_a_row == 9
    assert config.policy.max_replays_per_step == 4
    assert config.mode is Mode.SHADOW


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.toml", "[policy]\nmax_restarts = 2\n"),
        ("r.yaml", "policy:\n  max_restarts: 2\n"),
        ("r.json", json.dumps({"policy": {"max_restarts": 2}})),
    ],
)
def test_file_formats(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_config(tmp_path / name).policy.max_restarts == 2


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("")
    assert load_config(tmp_path / "r.yaml") == Config()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"polcy": {}}, ["polcy", "did you mean 'policy'"]),
        ({"policy": {"max_replay": 1}}, ["policy.max_replay", "did you mean 'max_replays_per_step'"]),
        ({"policy": {"max_restarts": -1}}, ["policy.max_restarts = -1", "greater than or equal to 0"]),
        ({"detection": {"strength": "strong"}}, ["detection.strength = 'strong'", "'checksum'"]),
        ({"launch": {"run_id": "a/b"}}, ["launch.run_id = 'a/b'"]),
        ({"coordinator": {"address": "h:1", "port": 1}}, ["coordinator.address", "drop coordinator.port"]),
        ({"zzz": 1}, ["'zzz'", "valid names: checkpoint, coordinator"]),
    ],
)
def test_mistakes_name_key_value_and_fix(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.toml", None, ["missing.toml", "cannot be read"]),
        ("r.ini", b"", [".ini", ".toml, .yaml or .json"]),
        ("r.toml", b"policy = ", ["r.toml"]),
        ("r.json", b"[1]", ["r.json", "list"]),
        ("r.toml", b"\xff\xfe", ["UTF-8"]),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_wrong_block_in_the_deepspeed_config() -> None:
    with pytest.raises(ConfigError, match="must be an object"):
        load_config(deepspeed_config={"resilience": True})


def test_unknown_section_in_the_environment() -> None:
    with pytest.raises(ConfigError, match="did you mean 'policy'"):
        load_config(environ={"RESILIENCE_POLICI__MAX_RESTARTS": "1"})


def test_every_field_has_its_sentence() -> None:
    source = Path(load_config.__code__.co_filename).read_text().splitlines()
    sections = [section.annotation for section in Config.model_fields.values()]
    for section in [Config, *sections]:
        for name in getattr(section, "model_fields", {}):
            line = next(i for i, text in enumerate(source) if text.startswith(f"    {name}: "))
            assert source[line + 1].startswith('    """'), f"{section}.{name} lacks its sentence"
