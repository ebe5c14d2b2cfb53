"""A device as the planner sees it: how much memory an allocator gets, and how fast it moves and multiplies."""

from collections.abc import Mapping

from .frozen import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """One accelerator or CPU box. Compared by identity: look-ups return one object per name.

    Vendor figures only; what somebody measured lies in `measured`. FLOPS are dense; sparse ones are apart.
    """

    name: str  # lower case, no spaces: rtx3060, a100-80gb, m1-16gb
    title: str  # as the vendor writes it
    vendor: str  # nvidia, amd, intel, apple, cpu
    architecture: str  # turing, ampere, ada, hopper, blackwell, rdna3, cdna3, alchemist, m1, zen4, ...
    kind: str  # "discrete" (own memory), "unified" (memory shared with the host), "cpu"
    memory_bytes: int  # what is sold
    usable_bytes: int  # what an allocator can reach: CUDA's total, Metal's working set, RAM less the system
    memory_bandwidth_bytes_per_s: int
    flops_per_s: Mapping[str, int]  # dense: fp32, fp16, bf16, fp8, int8, fp4, int4
    source: str
    checked: str  # ISO date on which the source was read
    sparse_flops_per_s: Mapping[str, int] = field(default_factory=dict)
    compute_capability: str | None = None  # "8.6" or "gfx1100"
    shared_memory_per_sm_bytes: int | None = None
    interconnect: str | None = None  # nvlink4, infinity-fabric-4, pcie4-x16
    interconnect_bytes_per_s: int | None = None  # per device, both directions
    host_link_bytes_per_s: int | None = None  # to host memory, one direction
    power_w: int | None = None
    measured: Mapping[str, object] = field(default_factory=dict)  # {what: {value, by, on, source}}
    usable_source: str | None = None  # where usable_bytes comes from; "rule: ..." where it is not an observation
    flops_source: str | None = None  # of flops_per_s, where `source` does not give them all
    safe_fraction: float | None = (
        None  # of usable_bytes that was filled without trouble, where more is known to make some
    )
    note: str | None = None  # what a reader of a plan should know about this device
    path: str | None = None  # the user's file that it was read from
