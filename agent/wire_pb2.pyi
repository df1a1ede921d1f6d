from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromTrainer(_message.Message):
    __slots__ = ("hello", "layout", "copied", "discarded", "grow", "report", "goodbye", "roster", "spill")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_FIELD_NUMBER: _ClassVar[int]
    GROW_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    SPILL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    layout: LayoutText
    copied: Copied
    discarded: Discarded
    grow: Grow
    report: Report
    goodbye: Goodbye
    roster: Roster
    spill: Spill
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., layout: _Optional[_Union[LayoutText, _Mapping]] = ..., copied: _Optional[_Union[Copied, _Mapping]] = ..., discarded: _Optional[_Union[Discarded, _Mapping]] = ..., grow: _Optional[_Union[Grow, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., spill: _Optional[_Union[Spill, _Mapping]] = ...) -> None: ...

class FromAgent(_message.Message):
    __slots__ = ("welcome", "prepared", "grown", "failed", "rostered", "guarded", "unguarded", "spilled", "due", "stop")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    GROWN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ROSTERED_FIELD_NUMBER: _ClassVar[int]
    GUARDED_FIELD_NUMBER: _ClassVar[int]
    UNGUARDED_FIELD_NUMBER: _ClassVar[int]
    SPILLED_FIELD_NUMBER: _ClassVar[int]
    DUE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    prepared: Prepared
    grown: Grown
    failed: Failed
    rostered: Rostered
    guarded: Guarded
    unguarded: Unguarded
    spilled: Spilled
    due: Due
    stop: Stop
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., grown: _Optional[_Union[Grown, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., rostered: _Optional[_Union[Rostered, _Mapping]] = ..., guarded: _Optional[_Union[Guarded, _Mapping]] = ..., unguarded: _Optional[_Union[Unguarded, _Mapping]] = ..., spilled: _Optional[_Union[Spilled, _Mapping]] = ..., due: _Optional[_Union[Due, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "job", "rank", "world", "pid", "slots", "image_bytes", "table_bytes", "life", "pid_namespace", "tiers", "grace_s", "again")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    PID_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    job: str
    rank: int
    world: int
    pid: int
    slots: int
    image_bytes: int
    table_bytes: int
    life: str
    pid_namespace: str
    tiers: _containers.RepeatedScalarFieldContainer[str]
    grace_s: float
    again: bool
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., job: _Optional[str] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., pid: _Optional[int] = ..., slots: _Optional[int] = ..., image_bytes: _Optional[int] = ..., table_bytes: _Optional[int] = ..., life: _Optional[str] = ..., pid_namespace: _Optional[str] = ..., tiers: _Optional[_Iterable[str]] = ..., grace_s: _Optional[float] = ..., again: bool = ...) -> None: ...

class SlotPlace(_message.Message):
    __slots__ = ("index", "path", "table_bytes", "image_bytes")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    TABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    index: int
    path: str
    table_bytes: int
    image_bytes: int
    def __init__(self, index: _Optional[int] = ..., path: _Optional[str] = ..., table_bytes: _Optional[int] = ..., image_bytes: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("agent", "slots", "listen", "domains", "machine")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    agent: str
    slots: _containers.RepeatedCompositeFieldContainer[SlotPlace]
    listen: str
    domains: _containers.RepeatedCompositeFieldContainer[Domain]
    machine: str
    def __init__(self, agent: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[SlotPlace, _Mapping]]] = ..., listen: _Optional[str] = ..., domains: _Optional[_Iterable[_Union[Domain, _Mapping]]] = ..., machine: _Optional[str] = ...) -> None: ...

class Id(_message.Message):
    __slots__ = ("run", "generation", "step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    step: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Domain(_message.Message):
    __slots__ = ("level", "name")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    level: str
    name: str
    def __init__(self, level: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("run", "protect", "timeout_s", "peers", "floor", "kept")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PROTECT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    run: str
    protect: str
    timeout_s: float
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    floor: Id
    kept: _containers.RepeatedCompositeFieldContainer[ParitySource]
    def __init__(self, run: _Optional[str] = ..., protect: _Optional[str] = ..., timeout_s: _Optional[float] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., floor: _Optional[_Union[Id, _Mapping]] = ..., kept: _Optional[_Iterable[_Union[ParitySource, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("agent", "address", "domains", "ranks", "slots", "image_bytes", "table_bytes")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    agent: str
    address: str
    domains: _containers.RepeatedCompositeFieldContainer[Domain]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    slots: int
    image_bytes: int
    table_bytes: int
    def __init__(self, agent: _Optional[str] = ..., address: _Optional[str] = ..., domains: _Optional[_Iterable[_Union[Domain, _Mapping]]] = ..., ranks: _Optional[_Iterable[int]] = ..., slots: _Optional[int] = ..., image_bytes: _Optional[int] = ..., table_bytes: _Optional[int] = ...) -> None: ...

class Rostered(_message.Message):
    __slots__ = ("alone", "error", "run", "floor")
    ALONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    alone: bool
    error: str
    run: str
    floor: int
    def __init__(self, alone: bool = ..., error: _Optional[str] = ..., run: _Optional[str] = ..., floor: _Optional[int] = ...) -> None: ...

class Guarded(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: Id
    def __init__(self, id: _Optional[_Union[Id, _Mapping]] = ...) -> None: ...

class Spill(_message.Message):
    __slots__ = ("id", "tiers")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    id: Id
    tiers: int
    def __init__(self, id: _Optional[_Union[Id, _Mapping]] = ..., tiers: _Optional[int] = ...) -> None: ...

class Spilled(_message.Message):
    __slots__ = ("id", "tier", "error", "seconds", "trying")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRYING_FIELD_NUMBER: _ClassVar[int]
    id: Id
    tier: int
    error: str
    seconds: float
    trying: bool
    def __init__(self, id: _Optional[_Union[Id, _Mapping]] = ..., tier: _Optional[int] = ..., error: _Optional[str] = ..., seconds: _Optional[float] = ..., trying: bool = ...) -> None: ...

class Due(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: int
    def __init__(self, tiers: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Unguarded(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: Id
    reason: str
    def __init__(self, id: _Optional[_Union[Id, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class LayoutText(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: bytes
    def __init__(self, number: _Optional[int] = ..., text: _Optional[bytes] = ...) -> None: ...

class Copied(_message.Message):
    __slots__ = ("slot", "nonce", "run", "generation", "step", "watermark", "layout", "image_bytes", "keep", "floor_stands", "persisted", "since", "unchanged")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    FLOOR_STANDS_FIELD_NUMBER: _ClassVar[int]
    PERSISTED_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    nonce: int
    run: str
    generation: int
    step: int
    watermark: int
    layout: int
    image_bytes: int
    keep: Id
    floor_stands: bool
    persisted: int
    since: int
    unchanged: _containers.RepeatedCompositeFieldContainer[Range]
    def __init__(self, slot: _Optional[int] = ..., nonce: _Optional[int] = ..., run: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., watermark: _Optional[int] = ..., layout: _Optional[int] = ..., image_bytes: _Optional[int] = ..., keep: _Optional[_Union[Id, _Mapping]] = ..., floor_stands: bool = ..., persisted: _Optional[int] = ..., since: _Optional[int] = ..., unchanged: _Optional[_Iterable[_Union[Range, _Mapping]]] = ...) -> None: ...

class Discarded(_message.Message):
    __slots__ = ("slot", "nonce", "reason", "id")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    slot: int
    nonce: int
    reason: str
    id: Id
    def __init__(self, slot: _Optional[int] = ..., nonce: _Optional[int] = ..., reason: _Optional[str] = ..., id: _Optional[_Union[Id, _Mapping]] = ...) -> None: ...

class Grow(_message.Message):
    __slots__ = ("slot", "image_bytes", "table_bytes")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    slot: int
    image_bytes: int
    table_bytes: int
    def __init__(self, slot: _Optional[int] = ..., image_bytes: _Optional[int] = ..., table_bytes: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("step", "watermark", "taken", "skipped", "last_stall_s", "last_copy_s", "image_bytes", "copied_bytes")
    class SkippedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    LAST_STALL_S_FIELD_NUMBER: _ClassVar[int]
    LAST_COPY_S_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    watermark: int
    taken: int
    skipped: _containers.ScalarMap[str, int]
    last_stall_s: float
    last_copy_s: float
    image_bytes: int
    copied_bytes: int
    def __init__(self, step: _Optional[int] = ..., watermark: _Optional[int] = ..., taken: _Optional[int] = ..., skipped: _Optional[_Mapping[str, int]] = ..., last_stall_s: _Optional[float] = ..., last_copy_s: _Optional[float] = ..., image_bytes: _Optional[int] = ..., copied_bytes: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("slot", "nonce")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    nonce: int
    def __init__(self, slot: _Optional[int] = ..., nonce: _Optional[int] = ...) -> None: ...

class Grown(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: SlotPlace
    def __init__(self, slot: _Optional[_Union[SlotPlace, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("slot", "nonce", "reason", "left")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    nonce: int
    reason: str
    left: SlotPlace
    def __init__(self, slot: _Optional[int] = ..., nonce: _Optional[int] = ..., reason: _Optional[str] = ..., left: _Optional[_Union[SlotPlace, _Mapping]] = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ImageList(_message.Message):
    __slots__ = ("agent", "images", "spoiled", "parities", "address", "job", "peers")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SPOILED_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    spoiled: _containers.RepeatedScalarFieldContainer[str]
    parities: _containers.RepeatedCompositeFieldContainer[Parity]
    address: str
    job: str
    peers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., spoiled: _Optional[_Iterable[str]] = ..., parities: _Optional[_Iterable[_Union[Parity, _Mapping]]] = ..., address: _Optional[str] = ..., job: _Optional[str] = ..., peers: _Optional[_Iterable[str]] = ...) -> None: ...

class AddressList(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class ImageLists(_message.Message):
    __slots__ = ("lists",)
    LISTS_FIELD_NUMBER: _ClassVar[int]
    lists: _containers.RepeatedCompositeFieldContainer[ImageList]
    def __init__(self, lists: _Optional[_Iterable[_Union[ImageList, _Mapping]]] = ...) -> None: ...

class Parity(_message.Message):
    __slots__ = ("id", "lane", "index", "tolerance", "ranks", "key")
    ID_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    id: Id
    lane: int
    index: int
    tolerance: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    key: int
    def __init__(self, id: _Optional[_Union[Id, _Mapping]] = ..., lane: _Optional[int] = ..., index: _Optional[int] = ..., tolerance: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., key: _Optional[int] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("run", "generation", "step", "rank", "world", "watermark", "path", "image_bytes", "trainer_alive", "complete", "checks_crc")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINER_ALIVE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    CHECKS_CRC_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    step: int
    rank: int
    world: int
    watermark: int
    path: str
    image_bytes: int
    trainer_alive: bool
    complete: bool
    checks_crc: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., watermark: _Optional[int] = ..., path: _Optional[str] = ..., image_bytes: _Optional[int] = ..., trainer_alive: bool = ..., complete: bool = ..., checks_crc: _Optional[int] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("run", "step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    step: int
    def __init__(self, run: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Inspection(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[ImageDetail]
    def __init__(self, images: _Optional[_Iterable[_Union[ImageDetail, _Mapping]]] = ...) -> None: ...

class ImageDetail(_message.Message):
    __slots__ = ("image", "layout", "slice_crc", "values_crc", "bad_blocks", "block_bytes")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SLICE_CRC_FIELD_NUMBER: _ClassVar[int]
    VALUES_CRC_FIELD_NUMBER: _ClassVar[int]
    BAD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    image: Image
    layout: bytes
    slice_crc: _containers.RepeatedScalarFieldContainer[int]
    values_crc: int
    bad_blocks: _containers.RepeatedScalarFieldContainer[int]
    block_bytes: int
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., layout: _Optional[bytes] = ..., slice_crc: _Optional[_Iterable[int]] = ..., values_crc: _Optional[int] = ..., bad_blocks: _Optional[_Iterable[int]] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class StatusReport(_message.Message):
    __slots__ = ("agent", "version", "job", "pid", "uptime_s", "shm", "listen", "alone", "reserved_bytes", "limit_bytes", "trainers", "slots", "foreign", "idle_s", "group", "peers", "tls", "tiers")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    version: str
    job: str
    pid: int
    uptime_s: float
    shm: str
    listen: str
    alone: bool
    reserved_bytes: int
    limit_bytes: int
    trainers: _containers.RepeatedCompositeFieldContainer[TrainerStatus]
    slots: _containers.RepeatedCompositeFieldContainer[SlotStatus]
    foreign: _containers.RepeatedScalarFieldContainer[str]
    idle_s: float
    group: GroupStatus
    peers: _containers.RepeatedScalarFieldContainer[str]
    tls: bool
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    def __init__(self, agent: _Optional[str] = ..., version: _Optional[str] = ..., job: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., shm: _Optional[str] = ..., listen: _Optional[str] = ..., alone: bool = ..., reserved_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., trainers: _Optional[_Iterable[_Union[TrainerStatus, _Mapping]]] = ..., slots: _Optional[_Iterable[_Union[SlotStatus, _Mapping]]] = ..., foreign: _Optional[_Iterable[str]] = ..., idle_s: _Optional[float] = ..., group: _Optional[_Union[GroupStatus, _Mapping]] = ..., peers: _Optional[_Iterable[str]] = ..., tls: bool = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("url", "newest", "spilled_bytes", "spill_s", "spills", "failures", "trouble", "queued", "pruned")
    URL_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    SPILLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILL_S_FIELD_NUMBER: _ClassVar[int]
    SPILLS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PRUNED_FIELD_NUMBER: _ClassVar[int]
    url: str
    newest: Id
    spilled_bytes: int
    spill_s: float
    spills: int
    failures: int
    trouble: str
    queued: int
    pruned: int
    def __init__(self, url: _Optional[str] = ..., newest: _Optional[_Union[Id, _Mapping]] = ..., spilled_bytes: _Optional[int] = ..., spill_s: _Optional[float] = ..., spills: _Optional[int] = ..., failures: _Optional[int] = ..., trouble: _Optional[str] = ..., queued: _Optional[int] = ..., pruned: _Optional[int] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("members", "tolerance", "protected", "parity_bytes", "pulled_bytes", "protect_s", "trouble", "damaged", "calls", "call_bytes")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    PARITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROTECT_S_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    CALL_BYTES_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    tolerance: int
    protected: Id
    parity_bytes: int
    pulled_bytes: int
    protect_s: float
    trouble: str
    damaged: int
    calls: int
    call_bytes: int
    def __init__(self, members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., tolerance: _Optional[int] = ..., protected: _Optional[_Union[Id, _Mapping]] = ..., parity_bytes: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., protect_s: _Optional[float] = ..., trouble: _Optional[str] = ..., damaged: _Optional[int] = ..., calls: _Optional[int] = ..., call_bytes: _Optional[int] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("agent", "address", "ranks", "reachable")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    agent: str
    address: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    reachable: bool
    def __init__(self, agent: _Optional[str] = ..., address: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., reachable: bool = ...) -> None: ...

class TrainerStatus(_message.Message):
    __slots__ = ("rank", "world", "pid", "alive", "ended", "report")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    world: int
    pid: int
    alive: bool
    ended: bool
    report: Report
    def __init__(self, rank: _Optional[int] = ..., world: _Optional[int] = ..., pid: _Optional[int] = ..., alive: bool = ..., ended: bool = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class SlotStatus(_message.Message):
    __slots__ = ("rank", "index", "state", "run", "generation", "step", "image_bytes", "capacity_bytes")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    index: int
    state: str
    run: str
    generation: int
    step: int
    image_bytes: int
    capacity_bytes: int
    def __init__(self, rank: _Optional[int] = ..., index: _Optional[int] = ..., state: _Optional[str] = ..., run: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., image_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ...) -> None: ...

class MaterialiseRequest(_message.Message):
    __slots__ = ("id", "rank", "world", "images", "parities", "tiers", "job", "agent")
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    id: Id
    rank: int
    world: int
    images: _containers.RepeatedCompositeFieldContainer[Source]
    parities: _containers.RepeatedCompositeFieldContainer[ParitySource]
    tiers: _containers.RepeatedCompositeFieldContainer[TierSource]
    job: str
    agent: str
    def __init__(self, id: _Optional[_Union[Id, _Mapping]] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., images: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., parities: _Optional[_Iterable[_Union[ParitySource, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierSource, _Mapping]]] = ..., job: _Optional[str] = ..., agent: _Optional[str] = ...) -> None: ...

class TierSource(_message.Message):
    __slots__ = ("tier", "agent", "address")
    TIER_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    tier: int
    agent: str
    address: str
    def __init__(self, tier: _Optional[int] = ..., agent: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("rank", "agent", "address", "checks_crc")
    RANK_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CHECKS_CRC_FIELD_NUMBER: _ClassVar[int]
    rank: int
    agent: str
    address: str
    checks_crc: int
    def __init__(self, rank: _Optional[int] = ..., agent: _Optional[str] = ..., address: _Optional[str] = ..., checks_crc: _Optional[int] = ...) -> None: ...

class ParitySource(_message.Message):
    __slots__ = ("parity", "agent", "address")
    PARITY_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    parity: Parity
    agent: str
    address: str
    def __init__(self, parity: _Optional[_Union[Parity, _Mapping]] = ..., agent: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class MaterialiseReply(_message.Message):
    __slots__ = ("path", "how", "checks_crc")
    PATH_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    CHECKS_CRC_FIELD_NUMBER: _ClassVar[int]
    path: str
    how: str
    checks_crc: int
    def __init__(self, path: _Optional[str] = ..., how: _Optional[str] = ..., checks_crc: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("layout", "image_bytes", "how")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    layout: bytes
    image_bytes: int
    how: str
    def __init__(self, layout: _Optional[bytes] = ..., image_bytes: _Optional[int] = ..., how: _Optional[str] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("image", "ranges", "window", "reader")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    image: MaterialiseRequest
    ranges: bytes
    window: int
    reader: int
    def __init__(self, image: _Optional[_Union[MaterialiseRequest, _Mapping]] = ..., ranges: _Optional[bytes] = ..., window: _Optional[int] = ..., reader: _Optional[int] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("path", "how", "pulled_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    how: str
    pulled_bytes: int
    def __init__(self, path: _Optional[str] = ..., how: _Optional[str] = ..., pulled_bytes: _Optional[int] = ...) -> None: ...

class TierList(_message.Message):
    __slots__ = ("agent", "address", "images", "errors", "others")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    address: str
    images: _containers.RepeatedCompositeFieldContainer[TierImages]
    errors: _containers.RepeatedScalarFieldContainer[str]
    others: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent: _Optional[str] = ..., address: _Optional[str] = ..., images: _Optional[_Iterable[_Union[TierImages, _Mapping]]] = ..., errors: _Optional[_Iterable[str]] = ..., others: _Optional[_Iterable[str]] = ...) -> None: ...

class TierImages(_message.Message):
    __slots__ = ("tier", "id", "world", "ranks", "whole")
    TIER_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    tier: int
    id: Id
    world: int
    ranks: _containers.RepeatedCompositeFieldContainer[Range]
    whole: bool
    def __init__(self, tier: _Optional[int] = ..., id: _Optional[_Union[Id, _Mapping]] = ..., world: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[Range, _Mapping]]] = ..., whole: bool = ...) -> None: ...

class SpillRequest(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: int
    def __init__(self, tiers: _Optional[int] = ...) -> None: ...

class SpillReply(_message.Message):
    __slots__ = ("accepted", "reason")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    def __init__(self, accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("job", "agent", "rank", "record", "checks", "layout", "since", "unchanged")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    rank: int
    record: bytes
    checks: bytes
    layout: bytes
    since: int
    unchanged: _containers.RepeatedCompositeFieldContainer[Range]
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ..., rank: _Optional[int] = ..., record: _Optional[bytes] = ..., checks: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., since: _Optional[int] = ..., unchanged: _Optional[_Iterable[_Union[Range, _Mapping]]] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("need_layout",)
    NEED_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    need_layout: bool
    def __init__(self, need_layout: bool = ...) -> None: ...

class OffersRequest(_message.Message):
    __slots__ = ("job", "agent")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ...) -> None: ...

class OfferList(_message.Message):
    __slots__ = ("offers",)
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    def __init__(self, offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("job", "agent", "id", "purpose", "image", "parity", "ranges")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    id: Id
    purpose: str
    image: ImageSource
    parity: ParityCell
    ranges: _containers.RepeatedCompositeFieldContainer[Range]
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ..., id: _Optional[_Union[Id, _Mapping]] = ..., purpose: _Optional[str] = ..., image: _Optional[_Union[ImageSource, _Mapping]] = ..., parity: _Optional[_Union[ParityCell, _Mapping]] = ..., ranges: _Optional[_Iterable[_Union[Range, _Mapping]]] = ...) -> None: ...

class ImageSource(_message.Message):
    __slots__ = ("rank", "checks_crc")
    RANK_FIELD_NUMBER: _ClassVar[int]
    CHECKS_CRC_FIELD_NUMBER: _ClassVar[int]
    rank: int
    checks_crc: int
    def __init__(self, rank: _Optional[int] = ..., checks_crc: _Optional[int] = ...) -> None: ...

class ParityCell(_message.Message):
    __slots__ = ("lane", "key", "index")
    LANE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    lane: int
    key: int
    index: int
    def __init__(self, lane: _Optional[int] = ..., key: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("offset", "nbytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    offset: int
    nbytes: int
    def __init__(self, offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class GrantReply(_message.Message):
    __slots__ = ("token", "port")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    port: int
    def __init__(self, token: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...

class ManifestRequest(_message.Message):
    __slots__ = ("job", "agent", "id", "image", "parity", "text_offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    TEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    agent: str
    id: Id
    image: ImageSource
    parity: ParityCell
    text_offset: int
    def __init__(self, job: _Optional[str] = ..., agent: _Optional[str] = ..., id: _Optional[_Union[Id, _Mapping]] = ..., image: _Optional[_Union[ImageSource, _Mapping]] = ..., parity: _Optional[_Union[ParityCell, _Mapping]] = ..., text_offset: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("record", "checks", "text", "text_bytes")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    checks: bytes
    text: bytes
    text_bytes: int
    def __init__(self, record: _Optional[bytes] = ..., checks: _Optional[bytes] = ..., text: _Optional[bytes] = ..., text_bytes: _Optional[int] = ...) -> None: ...
