"""What every engine file answers, and in which words."""

from collections.abc import Mapping
from typing import Protocol

from ...profiles.device import Device
from ...profiles.formats import WeightFormat
from ...profiles.frozen import dataclass, field
from ...profiles.model import Model
from ..memory import Memory
from ..request import Options


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine and the versions whose rules were read."""

    name: str
    default_version: str
    versions: tuple[str, ...]  # known ones, oldest first; a version between two follows the older
    source: str
    parallelism: str = "tensor"  # tensor: tp x pp ranks; layers: whole layers per device (tp 1, pp devices); single
    offloads: bool = False  # can keep routed experts in host memory
    serves: bool = True  # built to serve requests; False: a library or a runner
    released: bool = True  # False: planned for, not ranked unless asked for by name


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """Everything that decides memory apart from the context length and the number of sequences.

    `len(devices) == tp * pp`; rank r of stage s is `devices[s * tp + r]`. An engine that splits by layers gets tp = 1
    and pp = the number of devices.
    """

    model: Model
    weights: WeightFormat
    devices: tuple[Device, ...]
    version: str
    kv_dtype: str  # in the engine's own words
    state_dtype: str  # float32 or bfloat16
    tp: int
    pp: int
    mtp: int  # draft tokens
    vision: bool
    options: Options


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device would hold, and how much of it the engine can reach."""

    device: Device
    usable_bytes: int
    memory: Memory

    @property
    def free_bytes(self) -> int:
        return self.usable_bytes - self.memory.total.mid


@dataclass(frozen=True, slots=True)
class Allocation:
    """The answer of one engine for one context length and number of sequences."""

    devices: tuple[DeviceShare, ...]
    host: Memory = field(default_factory=Memory)
    reasons: tuple[str, ...] = ()  # why it does not fit; empty where it does
    warnings: tuple[str, ...] = ()
    detail: Mapping[str, object] = field(default_factory=dict)  # the engine's own words
    offloads: bool = False  # routed experts are read from host memory

    @property
    def fits(self) -> bool:
        return not self.reasons

    @property
    def is_sure(self) -> bool:
        return all(share.memory.total.high <= share.usable_bytes for share in self.devices)


class Estimate(Protocol):
    """An engine's arithmetic for one `Setup`."""

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """Bytes missing on the tightest device, 0 or less where it fits. Never falls as either argument grows."""
        ...

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        """Of what fits: whether no device of `allocate` holds more than it can at the upper end of every interval."""
        ...

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation: ...

    def command(self, ctx_tokens: int, seqs: int) -> str:
        """The launch line, with every flag that the arithmetic assumed, quoted for a POSIX shell."""
        ...
