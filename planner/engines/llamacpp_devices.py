"""Which part of a model llama.cpp puts on which device, and what each device takes whatever the context.

- `llama-model.cpp` `load_tensors`: with every layer offloaded token_embd still stays in host memory; where it is also
  the output it is loaded a second time. The last device holds the output. `-ts` counts layers: a device gets as many
  as its number says, the output counting as one more layer, and the cache follows its layers.
- `tools/mtmd/clip.cpp`: the vision tower is a file of its own and goes to the first device, with a compute buffer that
  grows with the largest image; one of 46 x 46 tokens is reserved at boot, 4096 tokens are the most.
- `ggml-cuda/fattn.cu`, `ggml-metal-ops.cpp`: flash attention in prefill makes room for K and V of one layer in f16, on
  CUDA and HIP where the cache is no f16, on Metal always.
- `ggml-cpu/repack.cpp`: a CPU rearranges the matrices of some types into a second copy; the first stays in the page
  cache.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf
from operator import add, sub
from typing import TYPE_CHECKING

from ...profiles.device import Device
from ...profiles.formats import WeightFormat, pieces
from ...profiles.frozen import dataclass, replace
from ...profiles.model import Model, Vision
from ..memory import Amount, estimated, exactly
from ..weights import WeightTable, weight_table
from .engine import Setup
from .llamacpp_cache import cell_bytes, layer_state_bytes
from .llamacpp_compute import HOST_ALIGNMENT, PIPELINE_COPIES, Place

if TYPE_CHECKING:
    from ..calibration import Calibration

MIB = 1 << 20
REPACKED_TYPES = frozenset(("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"))  # x86 with AVX2, ARM with dot products
WARM_UP_IMAGE_TOKENS = 46 * 46
MAX_IMAGE_TOKENS = 4096
BALANCED_AT_TOKENS = 32768  # layers are dealt out with a cache of so many tokens on them


@dataclass(frozen=True, slots=True)
class Backend:
    """One of ggml's backends, and what it takes beside the buffers that the engine names."""

    name: str
    runtime: Amount  # driver context, kernels, memory pools
    f16_cache: str = "never"  # whether flash attention makes room for an f16 copy: never, quantized, always
    partial_rows: bool = False
    pipelines: bool = False  # asynchronous copies and events: layers on several devices run as a pipeline


# CUDA: what public measurements on RTX 3090 and L4 leave beside the engine's own buffers, 0.2 to 0.7 GiB. The others
# are estimated from their drivers' footprints.
BACKENDS = {
    "cuda": Backend("CUDA", estimated(230 * MIB, 420 * MIB, 720 * MIB), "quantized", pipelines=True),
    "hip": Backend("ROCm", estimated(250 * MIB, 500 * MIB, 900 * MIB), "quantized", pipelines=True),
    "vulkan": Backend("Vulkan", estimated(120 * MIB, 300 * MIB, 700 * MIB), pipelines=True),
    "metal": Backend("Metal", estimated(40 * MIB, 120 * MIB, 350 * MIB), "always", partial_rows=True),
    "cpu": Backend("CPU", estimated(40 * MIB, 90 * MIB, 250 * MIB)),
}
_BACKEND_OF_VENDOR = {"nvidia": "cuda", "amd": "hip", "intel": "vulkan", "apple": "metal", "cpu": "cpu"}


def backend_of(device: Device) -> Backend:
    """CUDA, ROCm, Metal, or Vulkan for the rest: what the vendor's own build would use."""
    return BACKENDS[_BACKEND_OF_VENDOR.get(device.vendor, "vulkan")]


@lru_cache(maxsize=256)
def calibrated_backend(device: Device, calibration: "Calibration | None", version: str) -> Backend:
    """The same with what receipts say of its runtime: its buffers are exact as they are."""
    backend = backend_of(device)
    factor = calibration.factor("llama.cpp", version, (device,), "runtime") if calibration else None
    if factor is None:
        return backend
    runtime = backend.runtime
    return replace(backend, runtime=estimated(*factor.scaled((runtime.low, runtime.mid, runtime.high))))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one device holds of the model. Bytes that do not depend on context or sequences."""

    device: Device
    backend: Backend
    first_layer: int
    layers: int
    weights_bytes: int
    expert_copy_bytes: int  # room for experts that lie in host memory, one tensor at a time
    repacked_bytes: int  # second copy on a CPU
    cell_bytes: int  # one cell in all its attention layers, the draft's too
    state_bytes: int  # one state in all its Gated DeltaNet layers
    place: Place  # with inputs held once
    draft: Place | None  # of the context of multi-token prediction, where it is here
    vision: Amount  # compute buffer of the vision tower, where it is here

    @property
    def whole(self) -> bool:
        return self.place.begin == "whole"


@lru_cache(maxsize=512)
def shares(
    model: Model,
    fmt: WeightFormat,
    devices: tuple[Device, ...],
    k_type: str,
    v_type: str,
    mtp: bool,
    vision: bool,
    image_tokens: int | None,
    moved: int = 0,
    calibration: "Calibration | None" = None,
    version: str = "",
) -> tuple[Share, ...]:
    """One share per device, layers dealt out so that every device is filled to the same fraction. The first `moved`
    layers have their routed experts in host memory."""
    table = weight_table(model, fmt, 1)
    cell = cell_bytes(model, k_type, v_type)
    experts = (0,) * moved + table.experts[moved:]
    loads = tuple(map(add, table.layers, experts))
    counts = _layer_counts(model, table, loads, devices, cell, mtp, table.vision if vision else 0)
    quantized = k_type != "f16" or v_type != "f16"
    backends = {device: calibrated_backend(device, calibration, version) for device in dict.fromkeys(devices)}
    places: dict[tuple[str, bool, bool], Place] = {}  # devices that are alike share one
    state, no_vision = layer_state_bytes(model), exactly(0)
    found: list[Share] = []
    first = 0
    for index, device in enumerate(devices):
        last = index == len(devices) - 1
        if not last and index > 1 and counts[index] == 0 == found[-1].layers and device is found[-1].device:
            found.append(found[-1])  # without layers: of more devices than the model has layers, most are
            continue
        layers = range(first, first + counts[index])
        attention = model.layer_types[layers.start : layers.stop].count("full_attention")
        backend = backends[device]
        kind = backend.name, not index, last
        place = places.get(kind) or places.setdefault(kind, _place(backend, index, last, quantized))
        weights = sum(loads[layers.start : layers.stop])
        if last:
            weights += table.norm + (table.lm_head or table.embedding)
            weights += table.mtp + table.mtp_experts if mtp else 0
        if backend.name == "CPU":
            weights += table.embedding if table.lm_head else 0
        if vision and index == 0:
            weights += table.vision
        found.append(
            Share(
                device=device,
                backend=backend,
                first_layer=first,
                layers=len(layers),
                weights_bytes=weights,
                expert_copy_bytes=largest_expert_tensor_bytes(model, fmt) if moved and index == 0 else 0,
                repacked_bytes=_repacked_bytes(model, fmt, mtp) if backend.name == "CPU" else 0,
                cell_bytes=cell * (attention + (1 if mtp and last else 0)),
                state_bytes=state * (len(layers) - attention),
                place=place,
                draft=_draft_place(backend, quantized) if mtp and last else None,
                vision=_vision_scratch(model.vision, image_tokens) if vision and index == 0 else no_vision,
            )
        )
        first += counts[index]
    return tuple(found)


def pipelined(place: Place) -> Place:
    """The same place where inputs are kept once per batch in flight."""
    return Place(place.begin, place.output, PIPELINE_COPIES, place.alignment, place.f16_cache, place.partial_rows)


def _place(backend: Backend, index: int, last: bool, quantized: bool) -> Place:
    if backend.name == "CPU":
        return Place("whole", alignment=HOST_ALIGNMENT)
    begin = "first" if index == 0 else "next"
    return Place(begin, last, f16_cache=_copies_cache(backend, quantized), partial_rows=backend.partial_rows)


def _draft_place(backend: Backend, quantized: bool) -> Place:
    if backend.name == "CPU":
        return Place("draft", alignment=HOST_ALIGNMENT)
    copies_cache = _copies_cache(backend, quantized)
    return Place("draft on device", f16_cache=copies_cache, partial_rows=backend.partial_rows)


def _copies_cache(backend: Backend, quantized: bool) -> bool:
    return backend.f16_cache == "always" or (backend.f16_cache == "quantized" and quantized)


@lru_cache(maxsize=4096)
def _repacked_bytes(model: Model, fmt: WeightFormat, mtp: bool) -> int:
    parts = ("text", "mtp") if mtp else ("text",)
    return sum(
        piece.bytes
        for piece in pieces(model, fmt)
        if piece.part in parts and piece.role != "embedding" and piece.storage.name in REPACKED_TYPES
    )


@lru_cache(maxsize=1024)
def largest_expert_tensor_bytes(model: Model, fmt: WeightFormat) -> int:
    """What the first GPU copies at once of the experts that lie in host memory, for batches of 32 tokens and more
    (`op_offload`; ggml-backend.cpp starts a new split per weight, so the copies take turns)."""
    routed = [piece for piece in pieces(model, fmt) if piece.part == "text" and piece.role.startswith("experts.")]
    return max((piece.bytes // max(1, len(piece.layers)) for piece in routed), default=0)


def _vision_scratch(vision: Vision | None, image_tokens: int | None) -> Amount:
    """20/3 values of the tower's width per patch: 122,944 bytes per token of the 1152-wide tower, 79,936 of the
    768-wide one, as `mtmd_get_memory_usage` says (b11434)."""
    if vision is None:
        return exactly(0)
    per_token = 4 * vision.spatial_merge_size**2 * (20 * vision.hidden_size / 3 + 4)
    largest = max(WARM_UP_IMAGE_TOKENS, min(image_tokens or MAX_IMAGE_TOKENS, MAX_IMAGE_TOKENS))
    return estimated(WARM_UP_IMAGE_TOKENS * per_token, largest * per_token, 1.1 * largest * per_token)


def _layer_counts(
    model: Model,
    table: WeightTable,
    weights: tuple[int, ...],
    devices: tuple[Device, ...],
    cell: int,
    mtp: bool,
    vision_bytes: int,
) -> tuple[int, ...]:
    """Layers per device, in order: the fullest device is as empty as whole layers allow."""
    if len(devices) == 1:
        return (model.num_layers,)
    cache, state = cell * BALANCED_AT_TOKENS, layer_state_bytes(model)
    loads = [
        layer + (cache if kind == "full_attention" else state)
        for layer, kind in zip(weights, model.layer_types, strict=True)
    ]
    tail = table.lm_head or table.embedding
    tail += table.mtp + table.mtp_experts + cache if mtp else 0
    room_of = {device: device.usable_bytes - backend_of(device).runtime.mid for device in dict.fromkeys(devices)}
    rooms = [room_of[device] for device in devices]
    sums = list(accumulate(loads, initial=0))
    ends = [0, *_fewest_filled(sums, rooms, vision_bytes, tail)[:-1], len(loads)]
    return tuple(end - begin for begin, end in pairwise(ends))


def _fewest_filled(sums: list[int], rooms: list[int], head: int, tail: int) -> list[int]:
    """Where devices end at the smallest fraction of their rooms that holds every layer: halving, and from a fraction
    that is too small on to the next at which anything changes.

    A device that takes no more is filled up to less than one layer, so that every layer is held at the fraction which
    would hold one more per device."""
    layers, loads = len(sums) - 1, sums[-1]
    room, most = max(1, sum(rooms)), max(map(sub, sums[1:], sums))
    low = 0.999 * max(loads / room, most / max(1, max(rooms)))  # the largest layer is held by one of them
    high = (loads + head + tail) / max(1, min(rooms))
    high = min(high, 1.000001 * (loads + head + tail + len(rooms) * most) / room)
    for step in range(40):
        # With a layer or none for each device the answer is often the first change above `low`.
        middle = (low + high) / 2 if step or len(rooms) < layers else low
        ends, next_fraction = _dealt(sums, rooms, middle, head, tail)
        if ends[-1] == layers:
            high = middle
            continue
        low = next_fraction * (1 + 1e-13)
        ends, _ = _dealt(sums, rooms, low, head, tail)
        if ends[-1] == layers:
            return ends
    return _dealt(sums, rooms, high, head, tail)[0]


def _dealt(sums: list[int], rooms: list[int], fraction: float, head: int, tail: int) -> tuple[list[int], float]:
    """Behind which layer each device ends when none may be filled beyond a fraction of its room, and the next fraction
    at which one would take a layer more. `sums` are the bytes of the layers before each."""
    ends: list[int] = []
    end, last, layers, next_fraction = 0, len(rooms) - 1, len(sums) - 1, inf
    for index, room in enumerate(rooms):
        taken = (head if index == 0 else 0) + (tail if index == last else 0) - sums[end]
        end = bisect_right(sums, fraction * room - taken, end + 1) - 1
        ends.append(end)
        if end == layers:
            return ends + [layers] * (last - index), next_fraction
        if room > 0:
            at = (sums[end + 1] + taken) / room
            if at < next_fraction:
                next_fraction = at
    return ends, next_fraction


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Shares of the devices, and what they take whatever the context, for one number of layers without experts."""

    moved: int  # of the first layers, whose routed experts are in host memory
    shares: tuple[Share, ...]
    fixed_bytes: tuple[int, ...]
    seq_bytes: tuple[int, ...]
    doubt_bytes: tuple[int, ...]  # of what is fixed: from the expected figure to the upper end
    pipelines: bool  # several devices, and all of their backends can


def layout(setup: Setup, types: tuple[str, str], moved: int) -> Layout:
    options, mtp = setup.options, bool(setup.mtp)
    found = shares(
        setup.model,
        setup.weights,
        setup.devices,
        *types,
        mtp,
        setup.vision,
        options.image_tokens,
        moved,
        options.calibration,
        setup.version,
    )
    return _same_layout(found, setup.mtp, moved)


def without_experts(setup: Setup, whole: Layout, moved: int, moved_bytes: int) -> Layout:
    """The layout of one device, whose layers stay where they are when experts of `moved_bytes` leave it."""
    (share,) = whole.shares
    copy_bytes = largest_expert_tensor_bytes(setup.model, setup.weights)
    left = replace(share, weights_bytes=share.weights_bytes - moved_bytes, expert_copy_bytes=copy_bytes)
    return _layout((left,), setup.mtp, moved)


@lru_cache(maxsize=1024)
def _same_layout(found: tuple[Share, ...], mtp: int, moved: int) -> Layout:
    """Of shares that were dealt out before: batches of several sizes ask for them."""
    return _layout(found, mtp, moved)


def _layout(found: tuple[Share, ...], mtp: int, moved: int) -> Layout:
    return Layout(
        moved=moved,
        shares=found,
        fixed_bytes=tuple(
            share.weights_bytes + share.expert_copy_bytes + share.backend.runtime.mid + share.vision.mid
            for share in found
        ),
        seq_bytes=tuple(share.state_bytes * (1 + mtp) for share in found),
        doubt_bytes=tuple(
            share.backend.runtime.high - share.backend.runtime.mid + share.vision.high - share.vision.mid
            for share in found
        ),
        pipelines=len(found) > 1 and all(share.backend.pipelines for share in found),
    )
