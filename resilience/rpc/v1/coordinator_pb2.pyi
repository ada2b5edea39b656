from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_UNSPECIFIED: _ClassVar[Action]
    ACTION_CONTINUE: _ClassVar[Action]
    ACTION_CORRECTED: _ClassVar[Action]
    ACTION_REPLAY: _ClassVar[Action]
    ACTION_REWIND: _ClassVar[Action]
    ACTION_RESTART: _ClassVar[Action]
    ACTION_RESTORE: _ClassVar[Action]
    ACTION_QUARANTINE: _ClassVar[Action]
    ACTION_STOP: _ClassVar[Action]

class Check(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECK_UNSPECIFIED: _ClassVar[Check]
    CHECK_CHECKSUM: _ClassVar[Check]
    CHECK_INVARIANT: _ClassVar[Check]
    CHECK_SCREEN: _ClassVar[Check]
    CHECK_NORM: _ClassVar[Check]
    CHECK_PROCESS: _ClassVar[Check]
    CHECK_AT_REST: _ClassVar[Check]
    CHECK_REPLICA: _ClassVar[Check]
    CHECK_LOSS: _ClassVar[Check]
    CHECK_OPERATOR: _ClassVar[Check]

class DetectionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DETECTION_KIND_UNSPECIFIED: _ClassVar[DetectionKind]
    DETECTION_KIND_INF: _ClassVar[DetectionKind]
    DETECTION_KIND_NAN: _ClassVar[DetectionKind]
    DETECTION_KIND_NEAR_INF: _ClassVar[DetectionKind]
    DETECTION_KIND_MISMATCH: _ClassVar[DetectionKind]
    DETECTION_KIND_NORM_SPIKE: _ClassVar[DetectionKind]
    DETECTION_KIND_EXIT: _ClassVar[DetectionKind]
    DETECTION_KIND_HANG: _ClassVar[DetectionKind]
    DETECTION_KIND_LOSS_SPIKE: _ClassVar[DetectionKind]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_PENDING: _ClassVar[Verdict]
    VERDICT_TRANSIENT: _ClassVar[Verdict]
    VERDICT_PERSISTENT: _ClassVar[Verdict]
    VERDICT_DETERMINISTIC: _ClassVar[Verdict]
    VERDICT_PROPAGATED: _ClassVar[Verdict]
    VERDICT_FALSE_POSITIVE: _ClassVar[Verdict]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_UNSPECIFIED: _ClassVar[Origin]
    ORIGIN_COORDINATOR: _ClassVar[Origin]
    ORIGIN_RANK: _ClassVar[Origin]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_PENDING: _ClassVar[Outcome]
    OUTCOME_SUCCEEDED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]
    OUTCOME_SUPERSEDED: _ClassVar[Outcome]
    OUTCOME_SHADOWED: _ClassVar[Outcome]
ACTION_UNSPECIFIED: Action
ACTION_CONTINUE: Action
ACTION_CORRECTED: Action
ACTION_REPLAY: Action
ACTION_REWIND: Action
ACTION_RESTART: Action
ACTION_RESTORE: Action
ACTION_QUARANTINE: Action
ACTION_STOP: Action
CHECK_UNSPECIFIED: Check
CHECK_CHECKSUM: Check
CHECK_INVARIANT: Check
CHECK_SCREEN: Check
CHECK_NORM: Check
CHECK_PROCESS: Check
CHECK_AT_REST: Check
CHECK_REPLICA: Check
CHECK_LOSS: Check
CHECK_OPERATOR: Check
DETECTION_KIND_UNSPECIFIED: DetectionKind
DETECTION_KIND_INF: DetectionKind
DETECTION_KIND_NAN: DetectionKind
DETECTION_KIND_NEAR_INF: DetectionKind
DETECTION_KIND_MISMATCH: DetectionKind
DETECTION_KIND_NORM_SPIKE: DetectionKind
DETECTION_KIND_EXIT: DetectionKind
DETECTION_KIND_HANG: DetectionKind
DETECTION_KIND_LOSS_SPIKE: DetectionKind
VERDICT_UNSPECIFIED: Verdict
VERDICT_PENDING: Verdict
VERDICT_TRANSIENT: Verdict
VERDICT_PERSISTENT: Verdict
VERDICT_DETERMINISTIC: Verdict
VERDICT_PROPAGATED: Verdict
VERDICT_FALSE_POSITIVE: Verdict
ORIGIN_UNSPECIFIED: Origin
ORIGIN_COORDINATOR: Origin
ORIGIN_RANK: Origin
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_PENDING: Outcome
OUTCOME_SUCCEEDED: Outcome
OUTCOME_FAILED: Outcome
OUTCOME_SUPERSEDED: Outcome
OUTCOME_SHADOWED: Outcome

class Detection(_message.Message):
    __slots__ = ("detection_id", "generation", "step", "micro_step", "attempt", "rank", "node", "device", "site", "layer", "check", "kind", "residual_ratio", "verdict", "mended", "bit_exact", "caused_by", "param", "detected_at", "latency_ms")
    DETECTION_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_RATIO_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MENDED_FIELD_NUMBER: _ClassVar[int]
    BIT_EXACT_FIELD_NUMBER: _ClassVar[int]
    CAUSED_BY_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    DETECTED_AT_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    detection_id: str
    generation: int
    step: int
    micro_step: int
    attempt: int
    rank: int
    node: str
    device: str
    site: str
    layer: int
    check: Check
    kind: DetectionKind
    residual_ratio: float
    verdict: Verdict
    mended: bool
    bit_exact: bool
    caused_by: str
    param: str
    detected_at: float
    latency_ms: float
    def __init__(self, detection_id: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., micro_step: _Optional[int] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., site: _Optional[str] = ..., layer: _Optional[int] = ..., check: _Optional[_Union[Check, str]] = ..., kind: _Optional[_Union[DetectionKind, str]] = ..., residual_ratio: _Optional[float] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., mended: _Optional[bool] = ..., bit_exact: _Optional[bool] = ..., caused_by: _Optional[str] = ..., param: _Optional[str] = ..., detected_at: _Optional[float] = ..., latency_ms: _Optional[float] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("run_id", "generation", "step", "attempt", "world_size", "detections", "previous", "deterministic", "replay_available", "replay_reason", "bit_equal", "loss_scale_search", "consecutive_skips", "rewind_step", "rewind_reason", "rewound_to", "num_rewinds")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    REPLAY_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    REPLAY_REASON_FIELD_NUMBER: _ClassVar[int]
    BIT_EQUAL_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_SEARCH_FIELD_NUMBER: _ClassVar[int]
    CONSECUTIVE_SKIPS_FIELD_NUMBER: _ClassVar[int]
    REWIND_STEP_FIELD_NUMBER: _ClassVar[int]
    REWIND_REASON_FIELD_NUMBER: _ClassVar[int]
    REWOUND_TO_FIELD_NUMBER: _ClassVar[int]
    NUM_REWINDS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    generation: int
    step: int
    attempt: int
    world_size: int
    detections: _containers.RepeatedCompositeFieldContainer[Detection]
    previous: _containers.RepeatedCompositeFieldContainer[Detection]
    deterministic: bool
    replay_available: bool
    replay_reason: str
    bit_equal: bool
    loss_scale_search: bool
    consecutive_skips: int
    rewind_step: int
    rewind_reason: str
    rewound_to: int
    num_rewinds: int
    def __init__(self, run_id: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., world_size: _Optional[int] = ..., detections: _Optional[_Iterable[_Union[Detection, _Mapping]]] = ..., previous: _Optional[_Iterable[_Union[Detection, _Mapping]]] = ..., deterministic: _Optional[bool] = ..., replay_available: _Optional[bool] = ..., replay_reason: _Optional[str] = ..., bit_equal: _Optional[bool] = ..., loss_scale_search: _Optional[bool] = ..., consecutive_skips: _Optional[int] = ..., rewind_step: _Optional[int] = ..., rewind_reason: _Optional[str] = ..., rewound_to: _Optional[int] = ..., num_rewinds: _Optional[int] = ...) -> None: ...

class SettledVerdict(_message.Message):
    __slots__ = ("detection_id", "verdict")
    DETECTION_ID_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    detection_id: str
    verdict: Verdict
    def __init__(self, detection_id: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, str]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("decision_id", "generation", "step", "attempt", "action", "reason", "verdicts", "evidence", "cordon", "exit_code", "origin", "outcome", "latency_ms", "lost_s", "decided_at", "rule")
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    CORDON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    LOST_S_FIELD_NUMBER: _ClassVar[int]
    DECIDED_AT_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    generation: int
    step: int
    attempt: int
    action: Action
    reason: str
    verdicts: _containers.RepeatedCompositeFieldContainer[SettledVerdict]
    evidence: _containers.RepeatedScalarFieldContainer[str]
    cordon: _containers.RepeatedScalarFieldContainer[str]
    exit_code: int
    origin: Origin
    outcome: Outcome
    latency_ms: float
    lost_s: float
    decided_at: float
    rule: str
    def __init__(self, decision_id: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., action: _Optional[_Union[Action, str]] = ..., reason: _Optional[str] = ..., verdicts: _Optional[_Iterable[_Union[SettledVerdict, _Mapping]]] = ..., evidence: _Optional[_Iterable[str]] = ..., cordon: _Optional[_Iterable[str]] = ..., exit_code: _Optional[int] = ..., origin: _Optional[_Union[Origin, str]] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., latency_ms: _Optional[float] = ..., lost_s: _Optional[float] = ..., decided_at: _Optional[float] = ..., rule: _Optional[str] = ...) -> None: ...

class Strike(_message.Message):
    __slots__ = ("strike_id", "step", "micro_step", "rank", "site", "layer", "kind", "struck_at", "attempt", "no_effect", "relative_change")
    STRIKE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STRUCK_AT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NO_EFFECT_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    strike_id: str
    step: int
    micro_step: int
    rank: int
    site: str
    layer: int
    kind: str
    struck_at: float
    attempt: int
    no_effect: bool
    relative_change: float
    def __init__(self, strike_id: _Optional[str] = ..., step: _Optional[int] = ..., micro_step: _Optional[int] = ..., rank: _Optional[int] = ..., site: _Optional[str] = ..., layer: _Optional[int] = ..., kind: _Optional[str] = ..., struck_at: _Optional[float] = ..., attempt: _Optional[int] = ..., no_effect: _Optional[bool] = ..., relative_change: _Optional[float] = ...) -> None: ...

class RankExit(_message.Message):
    __slots__ = ("generation", "rank", "node", "device", "exit_code", "message", "exited_at", "step")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EXITED_AT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    rank: int
    node: str
    device: str
    exit_code: int
    message: str
    exited_at: float
    step: int
    def __init__(self, generation: _Optional[int] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., exit_code: _Optional[int] = ..., message: _Optional[str] = ..., exited_at: _Optional[float] = ..., step: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("slot", "device", "name")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    slot: int
    device: str
    name: str
    def __init__(self, slot: _Optional[int] = ..., device: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class AgentInfo(_message.Message):
    __slots__ = ("node", "node_rank", "num_nodes", "address", "devices", "pid", "last_generation", "exits", "reason", "master_port", "snapshots", "guardian_address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LAST_GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    GUARDIAN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: str
    node_rank: int
    num_nodes: int
    address: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    pid: int
    last_generation: int
    exits: _containers.RepeatedCompositeFieldContainer[RankExit]
    reason: str
    master_port: int
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotCopy]
    guardian_address: str
    def __init__(self, node: _Optional[str] = ..., node_rank: _Optional[int] = ..., num_nodes: _Optional[int] = ..., address: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., pid: _Optional[int] = ..., last_generation: _Optional[int] = ..., exits: _Optional[_Iterable[_Union[RankExit, _Mapping]]] = ..., reason: _Optional[str] = ..., master_port: _Optional[int] = ..., snapshots: _Optional[_Iterable[_Union[SnapshotCopy, _Mapping]]] = ..., guardian_address: _Optional[str] = ...) -> None: ...

class RankInfo(_message.Message):
    __slots__ = ("generation", "rank", "local_rank", "world_size", "node", "device", "pid", "versions")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    rank: int
    local_rank: int
    world_size: int
    node: str
    device: Device
    pid: int
    versions: _containers.ScalarMap[str, str]
    def __init__(self, generation: _Optional[int] = ..., rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., world_size: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., pid: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("run_id", "agent", "rank", "wait_s")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    agent: AgentInfo
    rank: RankInfo
    wait_s: float
    def __init__(self, run_id: _Optional[str] = ..., agent: _Optional[_Union[AgentInfo, _Mapping]] = ..., rank: _Optional[_Union[RankInfo, _Mapping]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class SnapshotCopy(_message.Message):
    __slots__ = ("step", "generation", "world_size", "ranks", "clean_through", "parity_nodes", "parity_losses", "num_bytes", "at")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CLEAN_THROUGH_FIELD_NUMBER: _ClassVar[int]
    PARITY_NODES_FIELD_NUMBER: _ClassVar[int]
    PARITY_LOSSES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    step: int
    generation: int
    world_size: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    clean_through: int
    parity_nodes: _containers.RepeatedScalarFieldContainer[str]
    parity_losses: int
    num_bytes: int
    at: float
    def __init__(self, step: _Optional[int] = ..., generation: _Optional[int] = ..., world_size: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., clean_through: _Optional[int] = ..., parity_nodes: _Optional[_Iterable[str]] = ..., parity_losses: _Optional[int] = ..., num_bytes: _Optional[int] = ..., at: _Optional[float] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("step", "generation", "peers")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    step: int
    generation: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    def __init__(self, step: _Optional[int] = ..., generation: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("node", "guardian_address", "ranks")
    NODE_FIELD_NUMBER: _ClassVar[int]
    GUARDIAN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    node: str
    guardian_address: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, node: _Optional[str] = ..., guardian_address: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("generation", "node_index", "num_nodes", "world_size", "first_rank", "slots", "master_addr", "reason", "master_port", "restore", "peers")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODE_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    node_index: int
    num_nodes: int
    world_size: int
    first_rank: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    master_addr: str
    reason: str
    master_port: int
    restore: Restore
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    def __init__(self, generation: _Optional[int] = ..., node_index: _Optional[int] = ..., num_nodes: _Optional[int] = ..., world_size: _Optional[int] = ..., first_rank: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., master_addr: _Optional[str] = ..., reason: _Optional[str] = ..., master_port: _Optional[int] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("status", "assignment", "exit_code", "reason", "last_verified_step", "consecutive_skips", "deterministic")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[JoinResponse.Status]
        READY: _ClassVar[JoinResponse.Status]
        PENDING: _ClassVar[JoinResponse.Status]
        STOP: _ClassVar[JoinResponse.Status]
    STATUS_UNSPECIFIED: JoinResponse.Status
    READY: JoinResponse.Status
    PENDING: JoinResponse.Status
    STOP: JoinResponse.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LAST_VERIFIED_STEP_FIELD_NUMBER: _ClassVar[int]
    CONSECUTIVE_SKIPS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    status: JoinResponse.Status
    assignment: Assignment
    exit_code: int
    reason: str
    last_verified_step: int
    consecutive_skips: int
    deterministic: bool
    def __init__(self, status: _Optional[_Union[JoinResponse.Status, str]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., exit_code: _Optional[int] = ..., reason: _Optional[str] = ..., last_verified_step: _Optional[int] = ..., consecutive_skips: _Optional[int] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class CheckCount(_message.Message):
    __slots__ = ("site", "count")
    SITE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    site: str
    count: int
    def __init__(self, site: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("step", "micro_step", "loss", "tokens_per_s", "step_seconds", "last_verified_step", "checks", "abft_overhead_ratio", "state", "step_seconds_since", "residual_ratios", "snapshot_seconds_since", "snapshot_interval_steps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_VERIFIED_STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ABFT_OVERHEAD_RATIO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_SINCE_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_RATIOS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_SECONDS_SINCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro_step: int
    loss: float
    tokens_per_s: float
    step_seconds: float
    last_verified_step: int
    checks: _containers.RepeatedCompositeFieldContainer[CheckCount]
    abft_overhead_ratio: float
    state: str
    step_seconds_since: _containers.RepeatedScalarFieldContainer[float]
    residual_ratios: _containers.RepeatedScalarFieldContainer[float]
    snapshot_seconds_since: _containers.RepeatedScalarFieldContainer[float]
    snapshot_interval_steps: int
    def __init__(self, step: _Optional[int] = ..., micro_step: _Optional[int] = ..., loss: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., step_seconds: _Optional[float] = ..., last_verified_step: _Optional[int] = ..., checks: _Optional[_Iterable[_Union[CheckCount, _Mapping]]] = ..., abft_overhead_ratio: _Optional[float] = ..., state: _Optional[str] = ..., step_seconds_since: _Optional[_Iterable[float]] = ..., residual_ratios: _Optional[_Iterable[float]] = ..., snapshot_seconds_since: _Optional[_Iterable[float]] = ..., snapshot_interval_steps: _Optional[int] = ...) -> None: ...

class CheckpointFact(_message.Message):
    __slots__ = ("kind", "directory", "tag", "step", "generation", "last_verified_step", "reason", "seconds", "at")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[CheckpointFact.Kind]
        PUBLISHED: _ClassVar[CheckpointFact.Kind]
        LOADED: _ClassVar[CheckpointFact.Kind]
        REFUSED: _ClassVar[CheckpointFact.Kind]
        DOUBTED: _ClassVar[CheckpointFact.Kind]
    KIND_UNSPECIFIED: CheckpointFact.Kind
    PUBLISHED: CheckpointFact.Kind
    LOADED: CheckpointFact.Kind
    REFUSED: CheckpointFact.Kind
    DOUBTED: CheckpointFact.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LAST_VERIFIED_STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    kind: CheckpointFact.Kind
    directory: str
    tag: str
    step: int
    generation: int
    last_verified_step: int
    reason: str
    seconds: float
    at: float
    def __init__(self, kind: _Optional[_Union[CheckpointFact.Kind, str]] = ..., directory: _Optional[str] = ..., tag: _Optional[str] = ..., step: _Optional[int] = ..., generation: _Optional[int] = ..., last_verified_step: _Optional[int] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ..., at: _Optional[float] = ...) -> None: ...

class SnapshotFact(_message.Message):
    __slots__ = ("kind", "step", "generation", "node", "tier", "world_size", "num_bytes", "clean_through", "redundancy", "reason", "seconds", "at")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[SnapshotFact.Kind]
        TAKEN: _ClassVar[SnapshotFact.Kind]
        PROTECTED: _ClassVar[SnapshotFact.Kind]
        FLUSHED: _ClassVar[SnapshotFact.Kind]
        LOADED: _ClassVar[SnapshotFact.Kind]
        REFUSED: _ClassVar[SnapshotFact.Kind]
    KIND_UNSPECIFIED: SnapshotFact.Kind
    TAKEN: SnapshotFact.Kind
    PROTECTED: SnapshotFact.Kind
    FLUSHED: SnapshotFact.Kind
    LOADED: SnapshotFact.Kind
    REFUSED: SnapshotFact.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLEAN_THROUGH_FIELD_NUMBER: _ClassVar[int]
    REDUNDANCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    kind: SnapshotFact.Kind
    step: int
    generation: int
    node: str
    tier: str
    world_size: int
    num_bytes: int
    clean_through: int
    redundancy: int
    reason: str
    seconds: float
    at: float
    def __init__(self, kind: _Optional[_Union[SnapshotFact.Kind, str]] = ..., step: _Optional[int] = ..., generation: _Optional[int] = ..., node: _Optional[str] = ..., tier: _Optional[str] = ..., world_size: _Optional[int] = ..., num_bytes: _Optional[int] = ..., clean_through: _Optional[int] = ..., redundancy: _Optional[int] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ..., at: _Optional[float] = ...) -> None: ...

class Note(_message.Message):
    __slots__ = ("kind", "message", "step", "at")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    step: int
    at: float
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., step: _Optional[int] = ..., at: _Optional[float] = ...) -> None: ...

class OrderAnswer(_message.Message):
    __slots__ = ("directive_id", "step", "problem", "at")
    DIRECTIVE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    directive_id: str
    step: int
    problem: str
    at: float
    def __init__(self, directive_id: _Optional[str] = ..., step: _Optional[int] = ..., problem: _Optional[str] = ..., at: _Optional[float] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("run_id", "generation", "member", "sequence", "heartbeat", "detections", "decisions", "strikes", "exits", "checkpoints", "notes", "deterministic", "badput_seconds", "snapshots", "answers", "num_skipped_steps")
    class BadputSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    STRIKES_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    BADPUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    NUM_SKIPPED_STEPS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    generation: int
    member: str
    sequence: int
    heartbeat: Heartbeat
    detections: _containers.RepeatedCompositeFieldContainer[Detection]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    strikes: _containers.RepeatedCompositeFieldContainer[Strike]
    exits: _containers.RepeatedCompositeFieldContainer[RankExit]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointFact]
    notes: _containers.RepeatedCompositeFieldContainer[Note]
    deterministic: bool
    badput_seconds: _containers.ScalarMap[str, float]
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotFact]
    answers: _containers.RepeatedCompositeFieldContainer[OrderAnswer]
    num_skipped_steps: int
    def __init__(self, run_id: _Optional[str] = ..., generation: _Optional[int] = ..., member: _Optional[str] = ..., sequence: _Optional[int] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., detections: _Optional[_Iterable[_Union[Detection, _Mapping]]] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., strikes: _Optional[_Iterable[_Union[Strike, _Mapping]]] = ..., exits: _Optional[_Iterable[_Union[RankExit, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointFact, _Mapping]]] = ..., notes: _Optional[_Iterable[_Union[Note, _Mapping]]] = ..., deterministic: _Optional[bool] = ..., badput_seconds: _Optional[_Mapping[str, float]] = ..., snapshots: _Optional[_Iterable[_Union[SnapshotFact, _Mapping]]] = ..., answers: _Optional[_Iterable[_Union[OrderAnswer, _Mapping]]] = ..., num_skipped_steps: _Optional[int] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("directive_id", "expires_at", "restart", "stop", "drain", "rewind", "take_snapshot")
    DIRECTIVE_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    TAKE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    directive_id: str
    expires_at: float
    restart: Restart
    stop: Stop
    drain: Drain
    rewind: Rewind
    take_snapshot: TakeSnapshot
    def __init__(self, directive_id: _Optional[str] = ..., expires_at: _Optional[float] = ..., restart: _Optional[_Union[Restart, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., rewind: _Optional[_Union[Rewind, _Mapping]] = ..., take_snapshot: _Optional[_Union[TakeSnapshot, _Mapping]] = ...) -> None: ...

class Restart(_message.Message):
    __slots__ = ("ended_generation", "reason")
    ENDED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ended_generation: int
    reason: str
    def __init__(self, ended_generation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("exit_code", "reason")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    reason: str
    def __init__(self, exit_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Rewind(_message.Message):
    __slots__ = ("reason", "step")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    reason: str
    step: int
    def __init__(self, reason: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class TakeSnapshot(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("acknowledged", "directives")
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVES_FIELD_NUMBER: _ClassVar[int]
    acknowledged: int
    directives: _containers.RepeatedCompositeFieldContainer[Directive]
    def __init__(self, acknowledged: _Optional[int] = ..., directives: _Optional[_Iterable[_Union[Directive, _Mapping]]] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("evidence",)
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    evidence: Evidence
    def __init__(self, evidence: _Optional[_Union[Evidence, _Mapping]] = ...) -> None: ...

class DecideResponse(_message.Message):
    __slots__ = ("decision",)
    DECISION_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    def __init__(self, decision: _Optional[_Union[Decision, _Mapping]] = ...) -> None: ...

class ConcludeRequest(_message.Message):
    __slots__ = ("run_id", "rank", "decision")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    rank: int
    decision: Decision
    def __init__(self, run_id: _Optional[str] = ..., rank: _Optional[int] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ...) -> None: ...

class ConcludeResponse(_message.Message):
    __slots__ = ("superseded",)
    SUPERSEDED_FIELD_NUMBER: _ClassVar[int]
    superseded: bool
    def __init__(self, superseded: _Optional[bool] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("run_id", "generation", "member", "exit_code", "reason")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    generation: int
    member: str
    exit_code: int
    reason: str
    def __init__(self, run_id: _Optional[str] = ..., generation: _Optional[int] = ..., member: _Optional[str] = ..., exit_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
