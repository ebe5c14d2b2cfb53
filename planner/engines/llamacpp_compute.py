"""llama.cpp's compute buffer: what ggml reserves for the largest batch of tokens, found by doing what ggml does.

The engine builds the graph of one full ubatch against a full cache (`llama_context::sched_reserve`), walks it in
order, and takes and gives back every intermediate tensor from one growing buffer, best fit first (`ggml-alloc.c`). The
high-water mark is what it allocates. Fragmentation counts: the largest sum of live tensors is 14 % too low at 4k tokens
of context.

Here the walk is data: words of which `+q` takes a buffer, `-q` gives it back, and `x=out` lets a name stand for another
buffer (an operation that works in place). They follow `src/models/qwen35.cpp`, `qwen35moe.cpp`, `delta-net-base.cpp`
and `src/llama-graph.cpp` at b11434. A layer of each kind stands for all: further ones find the same holes. On every
size of the family the result is the engine's own figure to the byte (tests/data/llamacpp_alloc.jsonl).

N tokens of a ubatch, E hidden size, H query heads, KV key-value heads, D head dim.
"""

from functools import lru_cache

from ...profiles.frozen import dataclass
from ...profiles.model import Model

HOST_ALIGNMENT = 32  # ggml's TENSOR_ALIGNMENT
DEVICE_ALIGNMENT = 128  # ggml-cuda.cu `ggml_backend_cuda_buffer_type_get_alignment`
PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES
VALUE_ROTATION = 64  # quantized V is rotated by Hadamard matrices of 64, K by the largest that divides the head dim

# A word that ends in ? is there for quantized K (k_, q_) or V (v_, flash_) only; `*` marks inputs of which a pipeline
# keeps copies.
INPUTS = "+k_rot*? +pos* +v_rot*? +k_idx* +v_idx* +mask* +out_ids*"
BEGIN = {
    # one backend holds everything: token rows, and the path for batches that mix tokens with image embeddings
    "whole": f"+tokens +embd +mixed_tokens +mixed_slots +mixed_embd +s_copy {INPUTS} +x -tokens +mixed_rows "
    "-mixed_tokens +mixed -mixed_embd -mixed_rows -mixed_slots",
    # token_embd lies on the host: the device gets copies of what its part of the graph reads
    "first": f"+mixed_rows* +mixed_slots* +mixed_embd* +x* +s_copy* {INPUTS} +mixed -mixed_embd -mixed_rows "
    "-mixed_slots",
    # a further device: the first norm, without its weight, was computed on the device before
    "next": f"+norm* +s_copy* +x* {INPUTS}",
    "draft": "+k_rot? +tokens +h +pos +v_rot? +k_idx +v_idx +mask +out_ids +rows -tokens +pair -rows -h +x -pair",
    "draft on device": "+k_rot*? +rows* +h* +pos* +v_rot*? +k_idx* +v_idx* +mask* +out_ids* +pair -rows -h +x -pair",
}
LINEAR = (
    "+norm +conv_rows +qkv +conv_in -conv_rows -qkv +state -s_copy +conv_out -conv_in +q_norm +k_norm +alpha +decay "
    "-alpha +beta_in +beta -beta_in +delta -q_norm -k_norm -conv_out -decay -beta -state +heads -delta +z -norm "
    "+z_gate -z -z_gate +out -heads -out"
)
ATTENTION = (
    "+norm +qg +q +q_turned? +v +v_turned? +k_in -norm +k -k_in -pos +k_turned? -k -k_idx -v -v_idx "
    "+flash -q -mask +flash_turned? +gate -qg -flash +out -gate -x x=out"
)
ATTENTION_WITHOUT_FLASH = (
    "+norm +qg +q +q_turned? +v +k_in -norm +k -k_in -pos +k_turned? -k -k_idx -v -v_idx "
    "+scores -q -mask +kqv -scores +joined -kqv +gate -qg -gate +out -joined -x x=out"
)
TURNS = {
    "+q_turned?": "+q_turned -q q=q_turned",
    "+k_turned?": "+k_turned -k_rot -k k=k_turned",
    "+v_turned?": "+v_turned -v v=v_turned",
    "+flash_turned?": "+flash_turned -v_rot -flash flash=flash_turned",
}
DENSE = "+norm +ffn_gate +ffn_up -norm +ffn_act -ffn_gate -ffn_up +ffn_out -ffn_act -x x=ffn_out"
EXPERTS = (
    "+norm +router +order +weights -router +sum +share -weights -sum +gate_e +up_e +act_e -gate_e -up_e +experts "
    "-act_e -order -share +ffn_out -experts +gate_s +up_s +act_s -gate_s -up_s +shared -act_s +switch -norm -switch "
    "-shared -x x=ffn_out"
)
END = "+rows_out -x -out_ids +logits -rows_out"

_COPIED = {word.strip("+*?") for begin in BEGIN.values() for word in begin.split() if "*" in word}
_CACHED = 8192
_NO_HOLE = 1 << 62
_BEYOND = 1 << 50  # larger than everything else together, and a multiple of every alignment

Walk = tuple[tuple[int, str], ...]
"""(slot, name of its size) takes a buffer, (-slot, its name) gives it back."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch that the engine reserves for: `sched_reserve`, `graph_reserve`."""

    tokens: int  # N, a multiple of seqs
    seqs: int
    streams: int  # 1 where the cache is unified
    outputs: int  # rows of logits
    cells: int  # of the cache, per stream
    flash_attn: bool = True
    rotate_k: bool = False  # quantized K
    rotate_v: bool = False
    drafts: int = 0  # snapshots of the state beside the last one


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of the graph a device holds, and how its backend allocates."""

    begin: str  # a key of BEGIN
    output: bool = True  # it has the last layers and the logits
    copies: int = 1  # of every input: more where layers are pipelined over several devices
    alignment: int = DEVICE_ALIGNMENT
    f16_cache: bool = False  # flash attention has room for K and V of a whole layer in f16
    partial_rows: bool = False  # flash attention keeps 32 partial results for up to 32 tokens (Metal)


WHOLE = Place("whole", alignment=HOST_ALIGNMENT)
DRAFT = Place("draft", alignment=HOST_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class Reserve:
    """The buffer as a function of the cells of one stream, everything else fixed.

    The mask lies below everything else until the last attention layer has read it: the mark is the mask plus what
    stands on it then, or what comes later where the mask is small.
    """

    mask_bytes_per_cell: int
    with_mask: int
    without_mask: int
    flash: int  # what stands on the mask when flash attention runs, its own result included
    flash_bytes_per_cell: int  # its scratch, taken at the end of the buffer

    def buffer_bytes(self, cells: int) -> int:
        mask = self.mask_bytes_per_cell * cells
        high = mask + self.with_mask
        if self.flash_bytes_per_cell:
            high = max(high, mask + self.flash + self.flash_bytes_per_cell * cells)
        return high if high > self.without_mask else self.without_mask


def batch_tokens(n_ctx: int, ubatch: int, seqs: int) -> int:
    """N: a ubatch, no longer than the context, rounded up to whole tokens per sequence."""
    tokens = min(n_ctx, ubatch)
    return -(-tokens // seqs) * seqs


@lru_cache(maxsize=_CACHED)
def compute_bytes(model: Model, batch: Batch, place: Place) -> int:
    """The compute buffer, byte for byte."""
    return _marks(_walk_of(model, batch, place), _sizes(model, batch, place), place)[0]


@lru_cache(maxsize=_CACHED)
def reserve(model: Model, batch: Batch, place: Place) -> Reserve:
    """The compute buffer for any number of cells; `batch.cells` is not looked at. With flash attention only.

    `compute_bytes` exactly for the model's own graph as llama-server asks for it; for a draft's, whose one layer gives
    the mask back early, within 15 % up to eight sequences."""
    sizes = _sizes(model, batch, place)
    sizes["mask"] = sizes["mask*"] = 0
    walk = _walk_of(model, batch, place)
    mark, mark_with_mask = _marks(walk, sizes, place)
    flash = 0
    if place.f16_cache:
        sizes["flash"] += _BEYOND
        flash = _marks(walk, sizes, place)[0] - _BEYOND
    return Reserve(
        mask_bytes_per_cell=2 * batch.tokens * place.copies,
        with_mask=mark if place.copies > 1 else mark_with_mask,
        without_mask=mark,
        flash=flash,
        flash_bytes_per_cell=flash_scratch_bytes(model, 1, batch.streams) if place.f16_cache else 0,
    )


def host_bytes(model: Model, batch: Batch, copies: int = 1) -> int:
    """The host's part of the graph where the layers lie on devices: the inputs, the mask among them, and token rows."""
    n, rows = batch.tokens, 4 * model.hidden_size * batch.tokens
    small = 2 * _padded(4 * n, HOST_ALIGNMENT) + 3 * _padded(8 * n, HOST_ALIGNMENT) + _padded(16 * n, HOST_ALIGNMENT)
    small += _padded(4 * batch.seqs, HOST_ALIGNMENT) + _padded(4 * batch.outputs, HOST_ALIGNMENT)
    small += 4 * _key_rotation(model.head_dim) ** 2 * batch.rotate_k + 4 * VALUE_ROTATION**2 * batch.rotate_v
    return copies * (small + 2 * rows + 2 * batch.cells * n) + 2 * rows


def flash_scratch_bytes(model: Model, cells: int, streams: int) -> int:
    """K and V of one layer in f16, as flash attention on CUDA, HIP and Metal makes room for them."""
    return 2 * 2 * model.num_key_value_heads * model.head_dim * cells * streams


def _sizes(model: Model, batch: Batch, place: Place) -> dict[str, int]:
    """Bytes of every buffer that a walk may take."""
    n, used, embd = batch.tokens, model.num_experts_per_tok, 4 * model.hidden_size * batch.tokens
    heads = 4 * model.num_attention_heads * model.head_dim * n
    cache_rows = 4 * model.num_key_value_heads * model.head_dim * n
    keys = 4 * model.linear_num_key_heads * model.linear_key_head_dim * n
    values = 4 * model.linear_num_value_heads * model.linear_value_head_dim * n
    conv, past = 4 * model.conv_dim, model.linear_conv_kernel_dim - 1
    state, decay = 4 * model.state_elements * batch.seqs, 4 * model.linear_num_value_heads * n
    ffn, routed = 4 * model.intermediate_size * n, 4 * used * model.moe_intermediate_size * n
    shared = 4 * model.shared_expert_intermediate_size * n
    flash = heads
    if place.f16_cache:
        flash += flash_scratch_bytes(model, batch.cells, batch.streams)
    if place.partial_rows:
        rows = min(-(-n // batch.streams), 32) * batch.streams * model.num_attention_heads
        flash += 4 * rows * 32 * (model.head_dim + 2)
    sizes = {
        "tokens": 4 * n,
        "mixed_tokens": 4 * n,
        "mixed_slots": 8 * n,
        "s_copy": 4 * batch.seqs,
        "pos": 16 * n,
        "k_idx": 8 * n,
        "v_idx": 8 * n if batch.flash_attn else 2 * cache_rows,
        "mask": (2 if batch.flash_attn else 4) * batch.cells * n,
        "out_ids": 4 * batch.outputs,
        "k_rot": 4 * _key_rotation(model.head_dim) ** 2,
        "v_rot": 4 * VALUE_ROTATION**2,
        "rows": embd,
        "rows_out": 4 * model.hidden_size * batch.outputs,
        "logits": 4 * model.vocab_size * batch.outputs,
        "x": embd,
        "embd": embd,
        "h": embd,
        "pair": 2 * embd,
        "mixed": embd,
        "mixed_embd": embd,
        "mixed_rows": embd,
        "norm": embd,
        "out": embd,
        "residual": embd,
        "conv_rows": conv * past * batch.seqs,
        "qkv": conv * n,
        "conv_in": conv * (n + past * batch.seqs),
        "state": state,
        "conv_out": conv * n,
        "q_norm": keys,
        "k_norm": keys,
        "alpha": decay,
        "decay": decay,
        "beta_in": decay,
        "beta": decay,
        "delta": values + (1 + batch.drafts) * state,
        "heads": values,
        "z": values,
        "z_gate": values,
        "qg": 2 * heads,
        "q": heads,
        "q_turned": heads,
        "v": cache_rows,
        "v_turned": cache_rows,
        "k_in": cache_rows,
        "k": cache_rows,
        "k_turned": cache_rows,
        "flash": flash,
        "flash_turned": heads,
        "gate": heads,
        "scores": 4 * batch.cells * n * model.num_attention_heads,
        "kqv": heads,
        "joined": heads,
        "ffn_gate": ffn,
        "ffn_up": ffn,
        "ffn_act": ffn,
        "ffn_out": embd,
        "router": 4 * model.num_experts * n,
        "order": 4 * model.num_experts * n,
        "weights": 4 * used * n,
        "sum": 4 * n,
        "share": 4 * used * n,
        "gate_e": routed,
        "up_e": routed,
        "act_e": routed,
        "experts": used * embd,
        "gate_s": shared,
        "up_s": shared,
        "act_s": shared,
        "shared": embd,
        "switch": 4 * n,
    }
    for name in _COPIED:
        sizes[name + "*"] = place.copies * _padded(sizes[name], place.alignment)
    return sizes


def _key_rotation(head_dim: int) -> int:
    size = VALUE_ROTATION
    while head_dim % (2 * size) == 0:
        size *= 2
    return size


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _walk_of(model: Model, batch: Batch, place: Place) -> Walk:
    pipelined = place.copies > 1
    return _walk(place.begin, place.output, pipelined, model.is_moe, batch.flash_attn, batch.rotate_k, batch.rotate_v)


@lru_cache(maxsize=256)
def _walk(
    begin: str, output: bool, pipelined: bool, is_moe: bool, flash_attn: bool, rotate_k: bool, rotate_v: bool
) -> Walk:
    """A Gated DeltaNet layer (two in a pipeline), an attention layer and the logits as steps. The block of multi-token
    prediction has attention only."""
    words = BEGIN[begin].split()
    feed_forward = (EXPERTS if is_moe else DENSE).split()
    if not begin.startswith("draft"):
        linear = LINEAR.split()
        if pipelined:
            # a copied input is not computed into: the first layer's sum is a buffer more, the second is like the rest
            words += [*linear[:-1], "+residual", "-out", "x=residual", *feed_forward]
        elif begin == "next":
            linear.remove("+norm")  # multiplied by its weight in place
        words += linear + feed_forward
    words += (ATTENTION if flash_attn else ATTENTION_WITHOUT_FLASH).split() + feed_forward
    if output:
        words += END.split()
    else:
        words.remove("+out_ids*")
    wanted = {"k": rotate_k, "q": rotate_k, "v": rotate_v, "f": rotate_v}
    steps: list[str] = []
    for word in words:
        if word[-1] != "?":
            steps.append(word)
        elif wanted[word[1]]:
            steps += TURNS.get(word, word[:-1]).split()
    return _resolved(steps, pipelined)


def _resolved(words: list[str], pipelined: bool) -> Walk:
    """Names to slots: a slot is one buffer from its taking to its giving back. Copies in a pipeline are kept."""
    slots: dict[str, int] = {}
    steps: list[tuple[int, str]] = []
    kept: set[int] = set()
    taken = 0
    for word in words:
        if word[0] == "+":
            taken += 1
            name = word[1:].rstrip("*")
            slots[name] = taken
            steps.append((taken, word[1:]))
            if pipelined and word[-1] == "*":
                kept.add(taken)
        elif word[0] == "-":
            if word[1:] in slots and slots[word[1:]] not in kept:
                steps.append((-slots[word[1:]], word[1:]))
        else:
            name, _, other = word.partition("=")
            slots[name] = slots[other]
    return tuple(steps)


def _marks(walk: Walk, sizes: dict[str, int], place: Place) -> tuple[int, int]:
    """`ggml_dyn_tallocr`: a buffer goes into the smallest hole that is large enough, the last of equals; where there is
    none it goes to the open end.

    The high-water mark, and what it was when the mask was given back.
    """
    alignment = place.alignment
    starts: list[int] = []  # of the holes, by address; no two touch
    stops: list[int] = []
    taken: dict[int, tuple[int, int]] = {}
    end = high = high_with_mask = 0
    for slot, name in walk:
        if slot > 0:
            size = -(-sizes[name] // alignment) * alignment
            best, best_size = -1, _NO_HOLE
            for hole, stop in enumerate(stops):
                if size <= stop - starts[hole] <= best_size:
                    best, best_size = hole, stop - starts[hole]
            if best < 0:
                taken[slot] = end, size
                end += size
                if end > high:
                    high = end
                continue
            taken[slot] = starts[best], size
            starts[best] += size
            if best_size == size:
                del starts[best], stops[best]
            continue
        start, size = taken.pop(-slot)
        if name == "mask":
            high_with_mask = high
        stop = start + size
        hole = 0
        while hole < len(stops) and stops[hole] < start:
            hole += 1
        if hole < len(stops) and stops[hole] == start:
            start = starts[hole]
            del starts[hole], stops[hole]
        if hole < len(stops) and starts[hole] == stop:
            stop = stops[hole]
            del starts[hole], stops[hole]
        if stop == end:
            end = start
        elif stop > start:
            starts.insert(hole, start)
            stops.insert(hole, stop)
    return high, high_with_mask or high
