from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromTrainer(_message.Message):
    __slots__ = ("hello", "layout", "copied", "discarded", "grow", "report", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_FIELD_NUMBER: _ClassVar[int]
    GROW_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    layout: LayoutText
    copied: Copied
    discarded: Discarded
    grow: Grow
    report: Report
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., layout: _Optional[_Union[LayoutText, _Mapping]] = ..., copied: _Optional[_Union[Copied, _Mapping]] = ..., discarded: _Optional[_Union[Discarded, _Mapping]] = ..., grow: _Optional[_Union[Grow, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class FromAgent(_message.Message):
    __slots__ = ("welcome", "prepared", "grown", "failed")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    GROWN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    prepared: Prepared
    grown: Grown
    failed: Failed
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., grown: _Optional[_Union[Grown, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "job", "rank", "world", "pid", "slots", "image_bytes", "table_bytes", "life", "pid_namespace")
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
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., job: _Optional[str] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., pid: _Optional[int] = ..., slots: _Optional[int] = ..., image_bytes: _Optional[int] = ..., table_bytes: _Optional[int] = ..., life: _Optional[str] = ..., pid_namespace: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("agent", "slots", "alone")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    agent: str
    slots: _containers.RepeatedCompositeFieldContainer[SlotPlace]
    alone: bool
    def __init__(self, agent: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[SlotPlace, _Mapping]]] = ..., alone: bool = ...) -> None: ...

class LayoutText(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: bytes
    def __init__(self, number: _Optional[int] = ..., text: _Optional[bytes] = ...) -> None: ...

class Copied(_message.Message):
    __slots__ = ("slot", "nonce", "run", "generation", "step", "watermark", "layout", "image_bytes")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    slot: int
    nonce: int
    run: str
    generation: int
    step: int
    watermark: int
    layout: int
    image_bytes: int
    def __init__(self, slot: _Optional[int] = ..., nonce: _Optional[int] = ..., run: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., watermark: _Optional[int] = ..., layout: _Optional[int] = ..., image_bytes: _Optional[int] = ...) -> None: ...

class Discarded(_message.Message):
    __slots__ = ("slot", "nonce", "reason")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    slot: int
    nonce: int
    reason: str
    def __init__(self, slot: _Optional[int] = ..., nonce: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("step", "watermark", "taken", "skipped", "last_stall_s", "last_copy_s")
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
    step: int
    watermark: int
    taken: int
    skipped: _containers.ScalarMap[str, int]
    last_stall_s: float
    last_copy_s: float
    def __init__(self, step: _Optional[int] = ..., watermark: _Optional[int] = ..., taken: _Optional[int] = ..., skipped: _Optional[_Mapping[str, int]] = ..., last_stall_s: _Optional[float] = ..., last_copy_s: _Optional[float] = ...) -> None: ...

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
    __slots__ = ("agent", "images", "spoiled")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SPOILED_FIELD_NUMBER: _ClassVar[int]
    agent: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    spoiled: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., spoiled: _Optional[_Iterable[str]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("run", "generation", "step", "rank", "world", "watermark", "path", "image_bytes", "trainer_alive")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINER_ALIVE_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    step: int
    rank: int
    world: int
    watermark: int
    path: str
    image_bytes: int
    trainer_alive: bool
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., watermark: _Optional[int] = ..., path: _Optional[str] = ..., image_bytes: _Optional[int] = ..., trainer_alive: bool = ...) -> None: ...

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
    __slots__ = ("agent", "version", "job", "pid", "uptime_s", "shm", "listen", "alone", "reserved_bytes", "limit_bytes", "trainers", "slots", "foreign", "idle_s")
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
    def __init__(self, agent: _Optional[str] = ..., version: _Optional[str] = ..., job: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., shm: _Optional[str] = ..., listen: _Optional[str] = ..., alone: bool = ..., reserved_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., trainers: _Optional[_Iterable[_Union[TrainerStatus, _Mapping]]] = ..., slots: _Optional[_Iterable[_Union[SlotStatus, _Mapping]]] = ..., foreign: _Optional[_Iterable[str]] = ..., idle_s: _Optional[float] = ...) -> None: ...

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
