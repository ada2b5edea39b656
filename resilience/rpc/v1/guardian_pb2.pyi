from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Caller(_message.Message):
    __slots__ = ("run_id", "generation", "node")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    generation: int
    node: str
    def __init__(self, run_id: _Optional[str] = ..., generation: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class SnapshotKey(_message.Message):
    __slots__ = ("step", "generation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    generation: int
    def __init__(self, step: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("caller",)
    CALLER_FIELD_NUMBER: _ClassVar[int]
    caller: Caller
    def __init__(self, caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class ParitySet(_message.Message):
    __slots__ = ("snapshot", "members", "losses", "complete")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotKey
    members: _containers.RepeatedScalarFieldContainer[str]
    losses: int
    complete: bool
    def __init__(self, snapshot: _Optional[_Union[SnapshotKey, _Mapping]] = ..., members: _Optional[_Iterable[str]] = ..., losses: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("generation", "snapshots", "parity")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotKey]
    parity: _containers.RepeatedCompositeFieldContainer[ParitySet]
    def __init__(self, generation: _Optional[int] = ..., snapshots: _Optional[_Iterable[_Union[SnapshotKey, _Mapping]]] = ..., parity: _Optional[_Iterable[_Union[ParitySet, _Mapping]]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("caller", "snapshot", "data", "manifest_of", "parity", "sums", "layout", "start", "end")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_OF_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    caller: Caller
    snapshot: SnapshotKey
    data: bool
    manifest_of: str
    parity: int
    sums: int
    layout: bool
    start: int
    end: int
    def __init__(self, caller: _Optional[_Union[Caller, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotKey, _Mapping]] = ..., data: _Optional[bool] = ..., manifest_of: _Optional[str] = ..., parity: _Optional[int] = ..., sums: _Optional[int] = ..., layout: _Optional[bool] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "content", "digest")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    offset: int
    content: bytes
    digest: int
    def __init__(self, offset: _Optional[int] = ..., content: _Optional[bytes] = ..., digest: _Optional[int] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("caller", "snapshot", "phase", "members", "losses")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[ExchangeRequest.Phase]
        HOLD: _ClassVar[ExchangeRequest.Phase]
        ENCODE: _ClassVar[ExchangeRequest.Phase]
        COMPLETE: _ClassVar[ExchangeRequest.Phase]
        FORGET: _ClassVar[ExchangeRequest.Phase]
    PHASE_UNSPECIFIED: ExchangeRequest.Phase
    HOLD: ExchangeRequest.Phase
    ENCODE: ExchangeRequest.Phase
    COMPLETE: ExchangeRequest.Phase
    FORGET: ExchangeRequest.Phase
    CALLER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    caller: Caller
    snapshot: SnapshotKey
    phase: ExchangeRequest.Phase
    members: _containers.RepeatedScalarFieldContainer[str]
    losses: int
    def __init__(self, caller: _Optional[_Union[Caller, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotKey, _Mapping]] = ..., phase: _Optional[_Union[ExchangeRequest.Phase, str]] = ..., members: _Optional[_Iterable[str]] = ..., losses: _Optional[int] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("state", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[ExchangeResponse.State]
        DONE: _ClassVar[ExchangeResponse.State]
        WORKING: _ClassVar[ExchangeResponse.State]
        REFUSED: _ClassVar[ExchangeResponse.State]
    STATE_UNSPECIFIED: ExchangeResponse.State
    DONE: ExchangeResponse.State
    WORKING: ExchangeResponse.State
    REFUSED: ExchangeResponse.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: ExchangeResponse.State
    reason: str
    def __init__(self, state: _Optional[_Union[ExchangeResponse.State, str]] = ..., reason: _Optional[str] = ...) -> None: ...
