from resilience.rpc.v1 import coordinator_pb2 as _coordinator_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetRunRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Run(_message.Message):
    __slots__ = ("run_id", "state", "mode", "generation", "world_size", "step", "loss", "tokens_per_s", "goodput_ratio", "started_at", "now", "last_verified_step", "num_detections", "num_decisions", "last_event", "deterministic", "exit_code", "restarts_left", "pid")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_RATIO_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    LAST_VERIFIED_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECISIONS_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_LEFT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    state: str
    mode: str
    generation: int
    world_size: int
    step: int
    loss: float
    tokens_per_s: float
    goodput_ratio: float
    started_at: float
    now: float
    last_verified_step: int
    num_detections: int
    num_decisions: int
    last_event: str
    deterministic: bool
    exit_code: int
    restarts_left: int
    pid: int
    def __init__(self, run_id: _Optional[str] = ..., state: _Optional[str] = ..., mode: _Optional[str] = ..., generation: _Optional[int] = ..., world_size: _Optional[int] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., goodput_ratio: _Optional[float] = ..., started_at: _Optional[float] = ..., now: _Optional[float] = ..., last_verified_step: _Optional[int] = ..., num_detections: _Optional[int] = ..., num_decisions: _Optional[int] = ..., last_event: _Optional[str] = ..., deterministic: _Optional[bool] = ..., exit_code: _Optional[int] = ..., restarts_left: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class ListRanksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankState(_message.Message):
    __slots__ = ("rank", "node", "device", "pid", "state", "step", "heartbeat_age_s", "loss", "step_seconds")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    device: str
    pid: int
    state: str
    step: int
    heartbeat_age_s: float
    loss: float
    step_seconds: float
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., heartbeat_age_s: _Optional[float] = ..., loss: _Optional[float] = ..., step_seconds: _Optional[float] = ...) -> None: ...

class ListRanksResponse(_message.Message):
    __slots__ = ("ranks",)
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[RankState]
    def __init__(self, ranks: _Optional[_Iterable[_Union[RankState, _Mapping]]] = ...) -> None: ...

class ListDetectionsRequest(_message.Message):
    __slots__ = ("include_propagated", "limit")
    INCLUDE_PROPAGATED_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    include_propagated: bool
    limit: int
    def __init__(self, include_propagated: _Optional[bool] = ..., limit: _Optional[int] = ...) -> None: ...

class ListDetectionsResponse(_message.Message):
    __slots__ = ("detections",)
    DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    detections: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.Detection]
    def __init__(self, detections: _Optional[_Iterable[_Union[_coordinator_pb2.Detection, _Mapping]]] = ...) -> None: ...

class ListDecisionsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListDecisionsResponse(_message.Message):
    __slots__ = ("decisions",)
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.Decision]
    def __init__(self, decisions: _Optional[_Iterable[_Union[_coordinator_pb2.Decision, _Mapping]]] = ...) -> None: ...

class ExplainDecisionRequest(_message.Message):
    __slots__ = ("decision_id",)
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    def __init__(self, decision_id: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("decision", "detections", "rule", "rule_text", "considered")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    RULE_TEXT_FIELD_NUMBER: _ClassVar[int]
    CONSIDERED_FIELD_NUMBER: _ClassVar[int]
    decision: _coordinator_pb2.Decision
    detections: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.Detection]
    rule: str
    rule_text: str
    considered: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, decision: _Optional[_Union[_coordinator_pb2.Decision, _Mapping]] = ..., detections: _Optional[_Iterable[_Union[_coordinator_pb2.Detection, _Mapping]]] = ..., rule: _Optional[str] = ..., rule_text: _Optional[str] = ..., considered: _Optional[_Iterable[str]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.CheckpointFact]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[_coordinator_pb2.CheckpointFact, _Mapping]]] = ...) -> None: ...

class StreamEventsRequest(_message.Message):
    __slots__ = ("after_sequence", "follow")
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    after_sequence: int
    follow: bool
    def __init__(self, after_sequence: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequence", "at", "kind", "text", "generation", "step")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at: float
    kind: str
    text: str
    generation: int
    step: int
    def __init__(self, sequence: _Optional[int] = ..., at: _Optional[float] = ..., kind: _Optional[str] = ..., text: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeviceState(_message.Message):
    __slots__ = ("device", "node", "cordoned", "reason", "num_transient", "num_persistent", "last_fault_at")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CORDONED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSIENT_FIELD_NUMBER: _ClassVar[int]
    NUM_PERSISTENT_FIELD_NUMBER: _ClassVar[int]
    LAST_FAULT_AT_FIELD_NUMBER: _ClassVar[int]
    device: str
    node: str
    cordoned: bool
    reason: str
    num_transient: int
    num_persistent: int
    last_fault_at: float
    def __init__(self, device: _Optional[str] = ..., node: _Optional[str] = ..., cordoned: _Optional[bool] = ..., reason: _Optional[str] = ..., num_transient: _Optional[int] = ..., num_persistent: _Optional[int] = ..., last_fault_at: _Optional[float] = ...) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceState]
    def __init__(self, devices: _Optional[_Iterable[_Union[DeviceState, _Mapping]]] = ...) -> None: ...

class SetCordonRequest(_message.Message):
    __slots__ = ("target", "cordoned", "reason")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CORDONED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    target: str
    cordoned: bool
    reason: str
    def __init__(self, target: _Optional[str] = ..., cordoned: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class SetCordonResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, devices: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRunRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class DrainRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotState(_message.Message):
    __slots__ = ("step", "generation", "tier", "num_bytes", "clean_through", "redundancy", "complete", "at", "seconds", "node")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLEAN_THROUGH_FIELD_NUMBER: _ClassVar[int]
    REDUNDANCY_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    step: int
    generation: int
    tier: str
    num_bytes: int
    clean_through: int
    redundancy: int
    complete: bool
    at: float
    seconds: float
    node: str
    def __init__(self, step: _Optional[int] = ..., generation: _Optional[int] = ..., tier: _Optional[str] = ..., num_bytes: _Optional[int] = ..., clean_through: _Optional[int] = ..., redundancy: _Optional[int] = ..., complete: _Optional[bool] = ..., at: _Optional[float] = ..., seconds: _Optional[float] = ..., node: _Optional[str] = ...) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("snapshots",)
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotState]
    def __init__(self, snapshots: _Optional[_Iterable[_Union[SnapshotState, _Mapping]]] = ...) -> None: ...

class TakeSnapshotNowRequest(_message.Message):
    __slots__ = ("reason", "wait_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    wait_s: float
    def __init__(self, reason: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class TakeSnapshotNowResponse(_message.Message):
    __slots__ = ("answer", "step", "generation", "reason")
    class Answer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OPEN: _ClassVar[TakeSnapshotNowResponse.Answer]
        TAKEN: _ClassVar[TakeSnapshotNowResponse.Answer]
        NOT_TAKEN: _ClassVar[TakeSnapshotNowResponse.Answer]
    OPEN: TakeSnapshotNowResponse.Answer
    TAKEN: TakeSnapshotNowResponse.Answer
    NOT_TAKEN: TakeSnapshotNowResponse.Answer
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    answer: TakeSnapshotNowResponse.Answer
    step: int
    generation: int
    reason: str
    def __init__(self, answer: _Optional[_Union[TakeSnapshotNowResponse.Answer, str]] = ..., step: _Optional[int] = ..., generation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RewindRunRequest(_message.Message):
    __slots__ = ("reason", "step")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    reason: str
    step: int
    def __init__(self, reason: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class RewindRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
