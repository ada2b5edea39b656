"""The options that `--resilience` adds to DeepSpeed's runner, and how they become one configuration.

Explicit options beat the file, the file beats the `"resilience"` block of the DeepSpeed config, that beats the
environment. Nothing here has side effects beyond reading files.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from resilience.abft.calibration import load_profile
from resilience.config import Config, load_config
from resilience.errors import ConfigError, UsageError
from resilience.faults.plan import load_plan

__all__ = ["Options", "add_options", "load", "refuse_unsupported"]

_DEEPSPEED_CONFIG_OPTIONS = ("--deepspeed_config", "--deepspeed")
_LAUNCHERS = ("pdsh",)


class Options(pydantic.BaseModel):
    """What was given on the command line."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    resilience: bool = False
    config: Path | None = None
    faults: Path | None = None
    dir: Path | None = None

    @classmethod
    def of(cls, namespace: argparse.Namespace) -> Options:
        """Take ours out of what the extended parser returned.

        Raises:
            UsageError: one of our options was given without `--resilience`.
        """
        options = cls(
            resilience=namespace.resilience,
            config=namespace.resilience_config,
            faults=namespace.resilience_faults,
            dir=namespace.resilience_dir,
        )
        if not options.resilience:
            for name in ("config", "faults", "dir"):
                if (value := getattr(options, name)) is not None:
                    raise UsageError(
                        f"--resilience-{name} {value}: needs --resilience, which is missing; "
                        f"add --resilience, or drop --resilience-{name}"
                    )
        return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add our options to DeepSpeed's parser."""
    group = parser.add_argument_group("resilience", "detect and survive faults; see `resilience --help`")
    # SUPPRESS keeps "(default: None)" out of DeepSpeed's help, which would read as if None could be given.
    parser.set_defaults(resilience=False, resilience_config=None, resilience_faults=None, resilience_dir=None)
    default: Any = argparse.SUPPRESS
    group.add_argument(
        "--resilience",
        action="store_true",
        default=default,
        help="Supervise this launch: detect silent corruption, crashes and hangs, and recover from them.",
    )
    group.add_argument(
        "--resilience-config",
        metavar="FILE",
        type=Path,
        default=default,
        help="Configuration (TOML, YAML or JSON); `resilience policy show` explains the limits.",
    )
    group.add_argument(
        "--resilience-faults",
        metavar="FILE",
        type=Path,
        default=default,
        help="Fault plan (TOML), for drills and tests.",
    )
    group.add_argument(
        "--resilience-dir",
        metavar="DIR",
        type=Path,
        default=default,
        help="Directory of the run (default: ./resilience-runs/<run id>).",
    )


def refuse_unsupported(namespace: argparse.Namespace) -> None:
    """Refuse by name what cannot be supervised.

    Raises:
        UsageError: names the option and the way out.
    """
    launcher = namespace.launcher.lower()
    if launcher not in _LAUNCHERS:
        raise UsageError(
            f"--launcher {namespace.launcher}: not supported with --resilience, because it starts ranks, not one "
            "agent per node; use pdsh, or start `deepspeed --resilience --no_ssh --node_rank N …` on every node"
        )
    if namespace.autotuning:
        raise UsageError(
            f"--autotuning {namespace.autotuning}: not supported with --resilience; tune first, then launch with it"
        )
    if namespace.no_python and namespace.module:
        raise UsageError("--no_python and --module exclude each other; drop one of them")


def load(options: Options, user_args: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Merge all sources into the run's configuration, and check the fault plan and the profile of thresholds.

    Raises:
        ConfigError, FaultPlanError: one line that names the source and the fix.
    """
    overrides = {"launch": {"dir": options.dir}} if options.dir is not None else {}
    config = load_config(
        options.config, deepspeed_config=_deepspeed_config(user_args), overrides=overrides, environ=environ
    )
    if options.faults is not None:
        load_plan(options.faults)
    profile = config.detection.profile
    if profile is None:
        return config
    load_profile(profile)
    return config.model_copy(update={"detection": config.detection.model_copy(update={"profile": profile.absolute()})})


def _deepspeed_config(user_args: Sequence[str]) -> Mapping[str, Any] | None:
    """The DeepSpeed JSON that the script is going to be given, where one can be found among its arguments."""
    for name in _DEEPSPEED_CONFIG_OPTIONS:
        for value in _values(user_args, name):
            if (content := _read_deepspeed_config(value)) is not None:
                return content
    return None


def _values(words: Sequence[str], option: str) -> list[str]:
    """Values of `--option value` and `--option=value`."""
    found = [following for word, following in itertools.pairwise(words) if word == option]
    return found + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def _read_deepspeed_config(value: str) -> Mapping[str, Any] | None:
    """Parse a file, or the base64 that DeepSpeed takes as well. What is neither is the script's own business."""
    path, is_file = Path(value), os.path.isfile(value)  # unlike Path.is_file, it takes any length
    if value.startswith("-"):
        return None
    try:
        text = path.read_text(encoding="utf-8") if is_file else base64.urlsafe_b64decode(value).decode()
        content = json.loads(text)
    except (binascii.Error, UnicodeDecodeError, OSError):
        return None
    except json.JSONDecodeError as error:
        if not is_file:
            return None
        raise ConfigError(f"{value}: not JSON ({error}); DeepSpeed could not read it either") from None
    return content if isinstance(content, Mapping) else None
