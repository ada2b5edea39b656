"""The configuration: what can be set, its default, its unit, and what combinations make no sense.

Sources, strongest first: explicit options, a file (TOML, YAML or JSON) or the `"resilience"` block of the DeepSpeed
JSON, environment variables `RESILIENCE_<SECTION>__<KEY>`, the defaults here. Unknown keys are refused with the nearest
valid name. `Config` is frozen: a run has one, its digest stands in the report.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import Field

from resilience.errors import ConfigError
from resilience.events import Mode

__all__ = [
    "CheckpointConfig",
    "Config",
    "CoordinatorConfig",
    "DetectionConfig",
    "GuardConfig",
    "LaunchConfig",
    "PolicyConfig",
    "SnapshotConfig",
    "load_config",
]

ENVIRONMENT_PREFIX = "RESILIENCE_"

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DetectionConfig(_Section):
    """What is checked, how strongly, how often."""

    strength: Literal["off", "screen", "invariants", "checksum", "kernel"] = "checksum"
    """Strongest check in use; a stronger one includes the weaker ones."""
    share: Annotated[float, Field(gt=0, le=1)] | Literal["adaptive"] = 1.0
    """Share of protected calls that are checked; `adaptive` sets it for each site, to reach `coverage_target`."""
    coverage_target: Annotated[float, Field(gt=0, le=1)] = 0.95
    """For `adaptive`: probability that no harmful fault is missed within `coverage_horizon_hours`."""
    coverage_horizon_hours: Positive = 1e6
    """For `adaptive`: device-hours of the job that `coverage_target` is for."""
    fault_rate_per_hour: Positive = 1e-6
    """For `adaptive`: silent faults a device-hour that are expected, while protected operations run."""
    overhead_budget_ratio: Positive | None = None
    """For `adaptive`: most seconds of checking per second of protected operations; beats `coverage_target`."""
    max_mends: Count = 2
    """How often a faulty operation is run again in place before the step is vetoed."""
    mend: Literal["repeat", "rebuild"] = "repeat"
    """How a faulty GEMM is mended: by the same call again, bit-exact, or from its checksums, within their round-off. A
    call that has overwritten what it reads is rebuilt in either case."""
    threshold_scale: Positive = 1.0
    """Factor on every threshold; above 1 is less sensitive."""
    profile: Path | None = None
    """Factors on the thresholds of single sites, a file that `resilience calibrate` wrote."""
    calibrate: bool = False
    """Keep a histogram of residual ÷ threshold by site, in the run directory; `resilience calibrate` sets it."""
    norm_factor: Annotated[float, Field(gt=1)] = 64.0
    """A local gradient this many times its own recent maximum, and √ of this times the whole one's, is an alarm."""
    norm_history_steps: Annotated[int, Field(ge=2)] = 16
    """Steps that the norm screen looks back; it is silent until it has seen 3."""
    at_rest_share: Annotated[float, Field(ge=0, le=1)] = 0.03125
    """Share of the bytes of weights, master weights and moments that is hashed after each step and again before it is
    used; every byte has its turn within ⌈1 ÷ share⌉ steps, 32 by default. 0 turns it off."""
    replica_interval_steps: Count = 50
    """Steps between two comparisons, among the ranks, of what should be equal on all of them; 0 turns them off."""


class GuardConfig(_Section):
    """The step transaction on every rank."""

    measure_determinism: bool = True
    """Replay the first clean step of a generation twice and compare: the basis of the verdict `deterministic`."""
    replay: bool = True
    """Record micro-steps so that an iteration can be run again."""
    decide_deadline_s: Positive = 5.0
    """How long rank 0 waits for the coordinator before it decides by the same policy itself."""


class PolicyConfig(_Section):
    """The limits that the decision table works with."""

    max_replays_per_step: Count = 2
    """Replays of one step before its fault counts as persistent."""
    max_restarts: Count = 3
    """Restarts of the processes within `restart_window_s`."""
    restart_window_s: Positive = 3600.0
    """Window of the restart budget, in seconds."""
    max_rewinds: Count = 3
    """Rewinds to a memory snapshot within `restart_window_s`."""
    loss_spike_factor: Annotated[float, Field(ge=0)] = 0.0
    """A loss this many robust deviations above the median of the last steps counts as committed corruption; 0, the
    default, does not look: losses of healthy runs do spike."""
    max_failures_without_progress: Annotated[int, Field(ge=1)] = 2
    """Failures in a row at the same step, with the same exit code, before the run is not requeued."""
    max_skips_in_a_row: Annotated[int, Field(ge=1)] = 5
    """Optimizer steps in a row that DeepSpeed may skip for non-finite gradients, outside the loss scaler's search."""
    hang_timeout_s: Positive = 600.0
    """Seconds without a finished micro-step on any rank before the run counts as hanging."""


class SnapshotConfig(_Section):
    """Copies of the training state in memory, for rewinding and for fast restarts."""

    interval_steps: Count | Literal["auto"] = "auto"
    """Steps between two snapshots; `auto` takes them as often as `overhead_budget_ratio` allows, 0 never."""
    overhead_budget_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """For `auto`: most of a step's time that copying may take, on average."""
    mtbf_hours: Positive = 3.0
    """For `auto`: hours between two failures of the job on average; more failures, more snapshots, up to the budget."""
    dir: Path = Path("/dev/shm")
    """Folder on tmpfs, on every node, in which a run keeps its arena."""
    slots: Annotated[int, Field(ge=3)] | None = None
    """Copies of each rank's shard that the arena has room for, the one being written included; unset is 4, or 6 where
    nodes keep parity for each other."""
    verify_steps: Annotated[int, Field(ge=1)] = 2
    """Steps after a snapshot that must be verified before it counts as clean."""
    parity_losses: Count | None = None
    """Lost nodes of a group that the others can make up for; unset is 1 where there are several nodes."""
    parity_group_size: Annotated[int, Field(ge=2)] = 8
    """Most nodes that keep parity together."""
    parity_mib_per_s: Positive | None = None
    """Most that each node reads from others for parity, in MiB/s; unset is no bound."""
    failure_domains: Mapping[str, str] = {}
    """Node → what it fails with (a rack, a switch): nodes of a domain are spread over the groups."""
    flush_interval_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between two snapshots that are written to `flush_dir` as DeepSpeed checkpoints; 0 writes none."""
    flush_dir: Path | None = None
    """Folder for these, on storage that all nodes share; unset is `snapshots` in the run directory."""
    flush_mib_per_s: Positive = 256.0
    """Most that each node writes there, in MiB/s."""
    fast_forward: bool = True
    """After a restart, lead the script through the steps that a snapshot already holds."""
    trail_max_mib: Positive = 256.0
    """Most memory a rank spends on what that needs: hashes of inputs, losses, random states."""
    history_max_mib: Positive = 1024.0
    """Most memory a rank spends on the inputs of the steps since the oldest snapshot, for rewinding."""


class CheckpointConfig(_Section):
    """What is done around the script's own save_checkpoint and load_checkpoint."""

    verify: bool = True
    """Write a manifest with each checkpoint, publish `latest` only for complete ones, verify before loading."""


class CoordinatorConfig(_Section):
    """Where the coordinator listens and what it requires."""

    address: str | None = None
    """`host:port` of an external coordinator; the launcher starts an embedded one where this is not set."""
    bind: str = "127.0.0.1"
    """Address that an embedded coordinator listens on; anything but loopback needs a token or mTLS."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """gRPC port; unset takes a free one. An explicit port that is busy ends the launch with 64."""
    metrics_bind: str = "127.0.0.1"
    """Address of the Prometheus endpoint."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Prometheus port; unset takes 9464, or a free one if that is busy."""
    token_file: Path | None = None
    """File (mode 0600) that holds the shared token; an embedded coordinator creates its own."""
    tls_ca: Path | None = None
    """Authority (PEM) that signed all certificates of the job; with it all parties show theirs to each other (mTLS)."""
    tls_cert: Path | None = None
    """Certificate (PEM) of whoever reads this."""
    tls_key: Path | None = None
    """Its key (PEM, mode 0600)."""
    tls_name: str | None = None
    """Name that the certificate of whoever is called must carry; unset is the host of its address."""
    log: Literal["text", "json"] = "text"
    """How the coordinator writes each event of the run to its log: a line for people, or one of JSON."""
    traces: Literal["off", "otlp"] = "off"
    """Whether a span for the run and for each recovery goes to an OpenTelemetry collector, over OTLP."""
    heartbeat_interval_s: Positive = 0.5
    """Seconds between two heartbeats of a rank or an agent."""
    lease_s: Positive = 15.0
    """Seconds of silence before a member counts as lost, or before an agent ends whose launcher is silent."""


class LaunchConfig(_Section):
    """The run, its directory, its processes."""

    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """Name of the run; unset makes one from the time and the launcher's pid."""
    dir: Path | None = None
    """Directory of the run; unset is `./resilience-runs/<run id>`."""
    num_spare_nodes: Count = 0
    """Nodes of the launch that wait until another one is lost; the last ones of the hostfile."""
    node_wait_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a run waits for a lost node to come back, where no spare is left."""
    warm_standby: bool = True
    """Keep a process for each rank that has imported what the rank had, to take its place if it dies."""
    stop_grace_s: Positive = 5.0
    """Seconds between SIGTERM and SIGKILL for a rank."""
    live: Literal["auto", "always", "never"] = "auto"
    """Live progress: on a terminal only, always, or never."""


class Config(_Section):
    """Everything that can be set, in sections."""

    mode: Mode = Mode.ENFORCE
    """`enforce` acts; `shadow` records what it would have done; `off` loads nothing into the ranks."""
    detection: DetectionConfig = DetectionConfig()
    """What is checked."""
    guard: GuardConfig = GuardConfig()
    """The step transaction."""
    policy: PolicyConfig = PolicyConfig()
    """The limits of the decision table."""
    snapshot: SnapshotConfig = SnapshotConfig()
    """The memory tier."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Verified checkpoints."""
    coordinator: CoordinatorConfig = CoordinatorConfig()
    """The coordinator."""
    launch: LaunchConfig = LaunchConfig()
    """The run and its processes."""

    @pydantic.model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.coordinator.address is not None and self.coordinator.port is not None:
            raise ValueError(
                "coordinator.address names an external coordinator; drop coordinator.port, which is for an embedded one"
            )
        tls = {key: getattr(self.coordinator, key) for key in ("tls_ca", "tls_cert", "tls_key")}
        missing = [f"coordinator.{key}" for key, path in tls.items() if path is None]
        if missing and (len(missing) < len(tls) or self.coordinator.tls_name is not None):
            raise ValueError(f"{' and '.join(missing)} missing: mTLS needs coordinator.tls_ca, tls_cert and tls_key")
        return self


def load_config(
    path: Path | None = None,
    *,
    deepspeed_config: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Merge all sources into one `Config`.

    Args:
        path: a TOML, YAML or JSON file, by its ending.
        deepspeed_config: the parsed DeepSpeed JSON; its `"resilience"` block is used where `path` says nothing.
        overrides: explicit options as a nested mapping; None values are left out.
        environ: environment variables; only `RESILIENCE_<SECTION>__<KEY>` and `RESILIENCE_MODE` are read.

    Raises:
        ConfigError: one line that names the source, the key and the fix.
    """
    merged = _from_environment(environ or {})
    block = (deepspeed_config or {}).get("resilience")
    if block is not None:
        if not isinstance(block, Mapping):
            raise ConfigError('"resilience" in the DeepSpeed config must be an object such as {"mode": "shadow"}')
        merged = _merge(merged, block)
    if path is not None:
        merged = _merge(merged, _read(path))
    merged = _merge(merged, overrides or {})
    try:
        return Config.model_validate(merged)
    except pydantic.ValidationError as error:
        source = str(path) if path is not None else "configuration"
        raise ConfigError(f"{source}: {_explain(error)}") from None


def _read(path: Path) -> Mapping[str, Any]:
    parsers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".json": json.loads,
    }
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{path}: ending {path.suffix!r} is not known; name it .toml, .yaml or .json")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; it must hold sections such as [policy]")
    return content


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    sections = {name for name in Config.model_fields if name != "mode"}
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        section, separator, key = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        if section == "mode" and not separator:
            found["mode"] = text
        elif separator and section in sections:
            found.setdefault(section, {})[key] = text
        elif separator:
            raise ConfigError(f"{variable}: no section {section!r}; {_nearest(section, sections)}")
    return found


def _merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(weak)
    for key, value in strong.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = _merge(below if isinstance(below, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def _explain(error: pydantic.ValidationError) -> str:
    """The first complaint, as one line with the key, the value and the fix."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {_nearest(str(first['loc'][-1]), _valid_keys(first['loc'][:-1]))}"
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where} = {first['input']!r}: {message[:1].lower()}{message[1:]}"


def _valid_keys(location: tuple[int | str, ...]) -> set[str]:
    model: type[pydantic.BaseModel] = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if isinstance(annotation, types.UnionType):
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        assert isinstance(annotation, type)
        assert issubclass(annotation, pydantic.BaseModel)
        model = annotation
    return set(model.model_fields)


def _nearest(name: str, valid: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid names: {', '.join(sorted(valid))}"
