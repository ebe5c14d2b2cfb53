"""What every engine file answers, and in which words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ...profiles.device import Device
from ...profiles.formats import WeightFormat
from ...profiles.frozen import dataclass, field
from ...profiles.model import Model
from ..memory import Memory
from ..request import Options

if TYPE_CHECKING:
    from ...profiles.interconnect import Interconnect


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
    spans_boxes: bool = False  # can run over several boxes
    replicates: bool = False  # has data parallelism of its own
    released: bool = True  # False: planned for, not ranked unless asked for by name
    pool: str = "layers"  # layers: each rank keeps its own layers' cache; fullest: as the fullest stage of each kind;
    # blocks: groups of layers share blocks (`vllm_pool.py`)
    copies_cache: bool = False  # flash attention of CUDA and ROCm has room for a layer's cache in f16, where it is not
    kept_states: int = 0  # recurrent states per sequence beside its own, where prefixes are cached
    loads_as_stored: bool = True  # weights take no less than in the files; False: they have a layout of their own


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """Everything that decides memory apart from the context length and the number of sequences.

    `len(devices) == tp * pp * dp`; rank r of stage s of replica d is `devices[(d * pp + s) * tp + r]`, and boxes are
    equal runs of them. An engine that splits by layers gets tp = 1 and pp = the number of devices.
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
    dp: int = 1  # replicas; those of a mixture of experts share the experts
    ep: int = 1  # ranks that whole experts are dealt out to; 1: each expert is cut over tp x dp ranks
    nodes: int = 1
    interconnect: "Interconnect | None" = None  # None: one box

    @property
    def box_ranks(self) -> int:
        """Ranks in one box."""
        return len(self.devices) // self.nodes

    @property
    def replica_nodes(self) -> int:
        """Boxes that one replica reaches over."""
        return max(1, self.tp * self.pp // self.box_ranks)

    @property
    def tp_nodes(self) -> int:
        """Boxes that one tensor-parallel group reaches over."""
        return max(1, self.tp // self.box_ranks)

    @property
    def expert_dp(self) -> int:
        """Replicas that share the routed experts: all of a mixture, none of a dense model."""
        return self.dp if self.model.is_moe else 1


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
