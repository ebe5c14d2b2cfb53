"""What to change when a plan does not fit, or only just does: one change at a time, each with its effect in bytes."""

from collections.abc import Iterator

from ..profiles.device import Device
from ..profiles.device_names import devices
from ..profiles.errors import QwenfitError
from .candidates import engine_module
from .plan import Advice, EnginePlan, Plan
from .request import Request
from .search import search, variant

GIB = 1 << 30
MAX_WEIGHT_CHANGES = 3
NUMBERS_OF_BOXES = (2, 3, 4, 8, 16)


def advise(answer: Plan) -> tuple[Advice, ...]:
    """Changes to the best plan, those that are enough first. Empty where it fits with room."""
    best = answer.best
    if best.fits and not best.tight:
        return ()
    found: dict[str, Advice] = {}
    for change, request in _changes(answer):
        try:
            changed = search(request).best
        except QwenfitError:
            continue
        saves = best.shortfall_bytes - changed.shortfall_bytes
        if saves > 0:
            found.setdefault(change, Advice(change, changed.fits, _effect(best, changed, saves), saves))
    by_saving = sorted(found.values(), key=lambda one: -one.saves_bytes)
    enough = [one for one in by_saving if one.fits] + _smaller_asks(best)
    larger = _smallest_device(answer) or _fewest_boxes(answer)
    if larger:
        enough.append(larger)
    return tuple(enough + [one for one in by_saving if not one.fits])


def pinned(answer: Plan, best: EnginePlan) -> Request:
    """The request that leads to this plan and no other."""
    return variant(
        answer.request,
        engine=f"{best.engine}@{best.engine_version}",
        weights=best.weights,
        kv_dtype=best.kv_dtype,
        state_dtype=best.state_dtype,
    )


def _changes(answer: Plan) -> Iterator[tuple[str, Request]]:
    best = answer.best
    setup, module = best.setup, engine_module(best.engine)
    request = pinned(answer, best)
    device = setup.devices[0]
    kv_dtypes = module.kv_dtypes(device, setup.version)
    later = kv_dtypes[kv_dtypes.index(best.kv_dtype) + 1 :] if best.kv_dtype in kv_dtypes else kv_dtypes
    for kv_dtype in later:
        yield f"KV cache in {kv_dtype}", variant(request, kv_dtype=kv_dtype)
    if best.state_dtype == "float32":
        yield "recurrent state in bfloat16", variant(request, state_dtype="bfloat16")
    if best.vision:
        yield "text only (no vision tower)", variant(request, vision=False)
    if best.mtp:
        yield "no multi-token prediction", variant(request, mtp=0)
    if answer.model.is_moe and setup.options.offload_experts is None:
        yield "routed experts in host memory", variant(request, offload_experts=True)
    yield from _smaller_batches(request)
    yield from _other_weights(answer, request)


def _smaller_batches(request: Request) -> Iterator[tuple[str, Request]]:
    if request.options.max_num_batched_tokens is None or request.options.max_num_batched_tokens > 2048:
        yield "prefill in chunks of 2,048 tokens", variant(request, max_num_batched_tokens=2048)
    if request.options.ubatch_tokens is None or request.options.ubatch_tokens > 256:
        yield "prefill in micro-batches of 256 tokens", variant(request, ubatch_tokens=256)
    if request.options.cuda_graphs:
        yield "no captured graphs (slower decode)", variant(request, cuda_graphs=False)


def _other_weights(answer: Plan, request: Request) -> Iterator[tuple[str, Request]]:
    """The next formats down in size, and the large matrices outside the layers at 8 bit."""
    best = answer.best
    from ..profiles.formats import checkpoint_bytes, weight_format

    if best.weights.startswith(("int4", "int8")) and "head" not in best.weights:
        for what, suffix in (("lm_head and embeddings", "-head8-embed8"), ("lm_head", "-head8")):
            yield f"{what} at 8 bit ({best.weights}{suffix})", variant(request, weights=best.weights + suffix)
    if answer.model.stored or not answer.request.weights:
        return  # the bytes are what they are, or the search has already been through every format
    module = engine_module(best.engine)
    smaller = sorted(
        (
            fmt
            for fmt in map(weight_format, module.weight_formats(answer.model, best.setup.devices[0]))
            if checkpoint_bytes(answer.model, fmt) < checkpoint_bytes(answer.model, best.setup.weights)
            and module.loads(answer.model, fmt, best.setup.devices[0], best.setup.version) is None
        ),
        key=lambda fmt: fmt.divergence,
    )
    for fmt in smaller[:MAX_WEIGHT_CHANGES]:
        yield f"weights in {fmt.name}", variant(request, weights=fmt.name)


def _smaller_asks(best: EnginePlan) -> list[Advice]:
    """Less context, or fewer sequences, where that alone is enough."""
    if best.fits:
        return []
    asks = []
    for change, ctx_tokens, seqs in (
        (f"a context of {best.limits.max_ctx_tokens:,} tokens", best.limits.max_ctx_tokens, best.seqs),
        (f"{best.limits.max_seqs} sequences", best.ctx_tokens, best.limits.max_seqs),
    ):
        if ctx_tokens and seqs and (ctx_tokens, seqs) != (best.ctx_tokens, best.seqs):
            saves = best.shortfall_bytes - best.estimate.shortfall_bytes(ctx_tokens, seqs)
            asks.append(Advice(change, True, f"saves {_gib(saves)}: the largest that fits", saves))
    return asks


def _smallest_device(answer: Plan) -> Advice | None:
    """The device with the least memory on which the same engine, weights and cache do fit."""
    best = answer.best
    request = pinned(answer, best)
    have = sum(device.usable_bytes for device in answer.devices)
    for device in sorted(devices(), key=_size):
        if device.usable_bytes <= have or not _same_class(device, answer.devices[0]):
            continue
        try:
            changed = search(variant(request, devices=(device.name,), tp=None, pp=None)).best
        except QwenfitError:
            continue
        if changed.fits and not changed.tight:
            saves = best.shortfall_bytes - changed.shortfall_bytes
            room = f"{_gib(device.usable_bytes)} usable, {_gib(-changed.shortfall_bytes)} to spare"
            return Advice(f"on {device.title} ({device.name})", True, room, saves)
    return None


def _fewest_boxes(answer: Plan) -> Advice | None:
    """The fewest boxes of the same kind on which the same weights and cache fit, where one device alone never would."""
    best, asked = answer.best, answer.request
    request = pinned(answer, best)
    if not engine_module(best.engine).ENGINE.spans_boxes:
        request = variant(request, engine=None)
    for nodes in NUMBERS_OF_BOXES:
        if nodes <= asked.nodes:
            continue
        try:
            changed = search(variant(request, nodes=nodes, tp=None, pp=None, dp=None, ep=None)).best
        except QwenfitError:
            continue
        if changed.fits and not changed.tight:
            saves = best.shortfall_bytes - changed.shortfall_bytes
            sizes = f"tp {changed.tp}, pp {changed.pp}" + (f", dp {changed.dp}" if changed.dp > 1 else "")
            link = changed.setup.interconnect
            over = f" over {link.name}" if link else ""
            effect = f"{changed.engine}, {sizes}{over}: {_gib(-changed.shortfall_bytes)} to spare"
            return Advice(f"on {nodes} such boxes (--nodes {nodes})", True, effect, saves)
    return None


def _size(device: Device) -> tuple[int, int]:
    return device.usable_bytes, device.memory_bandwidth_bytes_per_s


def _same_class(device: Device, asked: Device) -> bool:
    """A person with a graphics card is not told to buy a CPU box, and one with a Mac is told of a larger Mac."""
    return device.vendor == asked.vendor and device.kind == asked.kind


def _effect(best: EnginePlan, changed: EnginePlan, saves_bytes: int) -> str:
    after = changed.shortfall_bytes
    verdict = f"{_gib(-after)} to spare" if after <= 0 else f"still {_gib(after)} short"
    longest = f", up to {changed.limits.max_ctx_tokens:,} tokens" if changed.fits else ""
    return f"saves {_gib(saves_bytes)}: {verdict}{longest}"


def _gib(amount_bytes: int) -> str:
    return f"{amount_bytes / GIB:.2f} GiB"
