"""Weight formats: under which names people ask for weights, how each tensor is stored then, and how many bytes that
takes.

Names. Published: `bf16`, `fp8`, `gptq-int4-official`, `nvfp4`. Ours, compressed-tensors: `int4` (groups of 128,
asymmetric), `int8` (128, symmetric), all linears of the text and nothing else; after a dash come a dialect (`awq`,
`gptq`, `w8a8`), a group size (`g32`, `g64`, `g128`, `g256`, `channel`), `sym` or `asym`, and pieces to quantize too
(`head8`, `embed8`, `mtp8`, `vision8`, or 4): `int4-g64-head8`. GGUF: llama-quantize's file types (`q4_k_m`), `-mtp`
where the file keeps the block of multi-token prediction. MLX: `mlx-4bit`. `checkpoint`: what the headers of a model
read from disk say. What is a rule of which publisher stands beside it below; the fixed rows are `format_catalog.py`.

Never quantized, whatever the name: norms, conv1d, A_log, dt_bias; and in_proj_a, in_proj_b, routers and
shared_expert_gate except in MLX (which quantizes every Linear) and GGUF (which quantizes in_proj_a and in_proj_b).
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

from . import storage as stores
from .errors import UnknownName, Unsupported
from .format_catalog import ALIASES, FIXED, INTEGER_DIVERGENCE, PIECE_DIVERGENCE, SYMMETRIC_INT4_PENALTY, Fixed
from .frozen import dataclass, field
from .gguf_mixture import gguf_tensors
from .model import Model, Tensor
from .storage import Storage, plain, storage_bytes

__all__ = [
    "Piece",
    "Storage",
    "WeightFormat",
    "checkpoint_bytes",
    "formats",
    "pieces",
    "storage_bytes",
    "storage_of",
    "tensor_bytes",
    "weight_format",
]

GGUF_METADATA_BYTES_PER_TOKEN = 44
"""Vocabulary, merges and scores in the head of a GGUF: about 11 MB at 248,320 tokens (measured on converted files)."""

PLACES: dict[str, str] = {
    "embedding": "embedding",
    "lm_head": "lm_head",
    "mlp.gate": "router",
    "shared_expert_gate": "router",
}
"""Role -> the place of a tensor in a rule; roles that are not here are never quantized."""
for _name in ("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj"):
    PLACES[f"linear_attn.{_name}"] = "attention"
for _name in ("in_proj_a", "in_proj_b", "in_proj_ba"):
    PLACES[f"linear_attn.{_name}"] = "decay"
for _name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"):
    PLACES[f"self_attn.{_name}"] = "attention"
for _block, _place in (("mlp", "feed_forward"), ("experts", "experts"), ("shared_expert", "shared_expert")):
    for _name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
        PLACES[f"{_block}.{_name}"] = _place
for _name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "merger.fc1", "merger.fc2"):
    PLACES[f"vision.{_name}"] = "vision"

TEXT_LINEARS = ("attention", "feed_forward", "experts", "shared_expert")

Rule = Mapping[str, Storage]
"""Place -> how it is stored; a place that is missing stays as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightFormat:
    """A name under which people ask for weights, and its rules. Compared by identity."""

    name: str
    family: str  # safetensors, gguf, mlx, checkpoint
    bits: int  # nominal bits of the text linears
    group_size: int | None  # None: none, or one scale per channel or tensor
    symmetric: bool
    divergence: float  # expected mean KL divergence from bf16, for ranking
    source: str
    title: str
    dialect: str | None = (
        None  # compressed-tensors, gptq, awq, fp8, modelopt, mlx: what a loader has to know; None: nothing
    )
    lm_head_bits: int = 16  # nominal, as the next three; of a GGUF those of the file type
    embedding_bits: int = 16
    vision_bits: int = 16
    mtp_bits: int = 16
    parts: tuple[str, ...] = ("text", "vision", "mtp")  # what its files hold
    releases: tuple[str, ...] = ()  # models that its publisher released so; empty: anyone makes it
    rule: Rule = field(default_factory=dict, repr=False)
    file_type: str | None = None  # GGUF: llama-quantize's name of the mixture
    float_dtype: str | None = None  # dtype of what is not quantized, where it is not the model's own

    def is_released(self, model: Model) -> bool:
        """False: nobody published this model so, and its size is what the publisher's rule would give (estimated)."""
        return not self.releases or model.name in self.releases or model.stored == self.name


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tensors of one shape and storage that a format makes from one tensor of the model."""

    tensor: Tensor
    role: str
    shape: tuple[int, ...]
    layers: tuple[int, ...]  # empty: it occurs once
    storage: Storage

    @property
    def part(self) -> str:
        return self.tensor.part

    @property
    def per_layer(self) -> int:
        """Tensors per layer: more than one where experts are stored one by one."""
        return self.tensor.experts or 1

    @property
    def bytes(self) -> int:
        """All of them together."""
        return storage_bytes(self.shape, self.storage) * max(1, len(self.layers)) * self.per_layer


def formats() -> tuple[WeightFormat, ...]:
    """The catalog: one format per name that stands for itself, the most faithful first. Modifiers make more."""
    names = ["int8", "int8-gptq", "int4", "int4-sym", "int4-g32", "int4-head8-embed8", "int4-gptq", "int4-awq"]
    names += [name for name in FIXED if name != "checkpoint"]
    return tuple(sorted(map(weight_format, names), key=lambda fmt: fmt.divergence))


@lru_cache(maxsize=4096)
def weight_format(name: str) -> WeightFormat:
    """The format of that name, one object per format however the name is spelled. `UnknownName` with the nearest names,
    `Unsupported` where the words are known and do not go together."""
    words = name.strip().lower()
    words = ALIASES.get(words, words)
    for key in (words, words.replace("-", "_"), words.removeprefix("gguf-").replace("-", "_")):
        if key in FIXED:
            return _fixed(key)
        if key.endswith("_mtp") and FIXED.get(key[:-4], FIXED["bf16"]).family == "gguf":
            return _fixed(key[:-4], mtp=True)
    if words.removesuffix("-mtp") in ("gguf-bf16", "gguf-f16"):
        return _fixed(words.removesuffix("-mtp"), mtp=True)
    if words.startswith("ud-"):
        raise Unsupported(
            f"weight format {name!r:.80} is one uploader's recipe, whose types differ from file to file; "
            f"give the .gguf itself as --model, or llama.cpp's own type such as q4_k_m"
        )
    first, *rest = words.split("-")
    if first in ("int4", "int8"):
        return _integers(int(first[3:]), rest, name)
    from difflib import get_close_matches

    known = [*FIXED, *ALIASES, "int4", "int8"]
    near = get_close_matches(words[:60], known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownName(
        f"no weight format is called {name!r:.80}; {hint}"
        "there are bf16, fp8, int8, int4 (int4-g64-head8), nvfp4, gptq-int4-official, mlx-4bit and GGUF types (q4_k_m)"
    )


@lru_cache(maxsize=128)
def _fixed(name: str, mtp: bool = False) -> WeightFormat:
    row = FIXED[name]
    if row.family == "gguf":
        return _gguf(name, row, mtp)
    rule, dialect, nominal, dtype = _FIXED_RULES[name]
    return WeightFormat(
        name,
        row.family,
        row.bits,
        row.group_size,
        row.symmetric,
        row.divergence,
        row.source,
        row.title,
        dialect=dialect,
        parts=("text",) if row.family == "mlx" else ("text", "vision", "mtp"),
        releases=row.releases,
        lm_head_bits=row.bits if "lm_head" in nominal else 16,
        embedding_bits=row.bits if "embedding" in nominal else 16,
        mtp_bits=row.bits if "mtp" in nominal else 16,
        rule=rule,
        float_dtype=dtype,
    )


def _gguf(name: str, row: Fixed, mtp: bool) -> WeightFormat:
    bits = row.bits
    return WeightFormat(
        f"{name}-mtp" if mtp else name,
        "gguf",
        bits,
        row.group_size,
        row.symmetric,
        row.divergence,
        row.source,
        row.title + (" with multi-token prediction" if mtp else ""),
        lm_head_bits=8 if bits == 8 else 16 if bits == 16 else 6,
        embedding_bits=bits,
        mtp_bits=bits,
        parts=("text", "mtp") if mtp else ("text",),
        file_type=name.removeprefix("gguf-").upper(),
    )


def _everywhere(storage: Storage, *places: str) -> Rule:
    return dict.fromkeys(places, storage)


_NVFP4_W4A4 = stores.nvfp4(scalars=2)  # weight_scale_2 and input_scale
_NVFP4_W4A16 = stores.nvfp4(scalars=1)  # no activations quantized: weight_scale_2 alone

NVFP4_EXPERTS: Rule = _everywhere(_NVFP4_W4A4, "experts")
"""nvidia/Qwen3.5-122B-A10B-NVFP4 and -397B-A17B-NVFP4: hf_quant_config.json excludes all but the routed experts."""

NVFP4_MIXED: Rule = {
    **_everywhere(_NVFP4_W4A16, "feed_forward", "experts", "shared_expert", "lm_head"),
    "attention": stores.fp8_per_tensor(),
}
"""nvidia/Qwen3.6-27B-NVFP4 and -35B-A3B-NVFP4: hf_quant_config.json, MIXED_PRECISION."""

_NVFP4_EXPERTS_ONLY = ("qwen3.5-122b-a10b", "qwen3.5-397b-a17b")

# name -> rule, dialect, pieces beside the text linears whose nominal bits are the format's, dtype of the rest
_FIXED_RULES: dict[str, tuple[Rule, str | None, tuple[str, ...], str | None]] = {
    "bf16": ({}, None, (), None),
    "checkpoint": ({}, None, (), None),
    # modules_to_not_convert of Qwen/*-FP8: lm_head, embed_tokens, in_proj_a, in_proj_b, conv1d, visual, mtp.fc.
    # Shared experts and the MTP layer are converted: 64,196 tensors in Qwen3.6-35B-A3B-FP8 (0xBakeer/inference-atlas
    # pull request 145).
    "fp8": (_everywhere(stores.fp8_blocks(), *TEXT_LINEARS, "mtp"), "fp8", ("mtp",), None),
    # `dynamic` of Qwen/*-GPTQ-Int4 leaves out attn, shared_expert, mtp, visual; lm_head and embed_tokens are not
    # linears of a block.
    "gptq-int4-official": (_everywhere(stores.gptq(4, 128), "feed_forward", "experts"), "gptq", (), None),
    # ModelOpt exports the whole model in bf16, A_log and the gated norm too: 122B's file has no F32 but the scalars.
    "nvfp4": (NVFP4_MIXED, "modelopt", ("lm_head",), "BF16"),
    "int8-w8a8": (_everywhere(stores.int8_per_channel(), *TEXT_LINEARS), "compressed-tensors", (), None),
}
for _bits in (4, 5, 6, 8):
    _affine = stores.mlx_affine(_bits, 64)
    # mlx-lm 0.32.2 `quantize_model`: every Linear and Embedding, routers at 8 bit (`models/qwen3_5.py` quant_predicate)
    _FIXED_RULES[f"mlx-{_bits}bit"] = (
        {**_everywhere(_affine, *TEXT_LINEARS, "decay", "embedding", "lm_head"), "router": stores.mlx_affine(8, 64)},
        "mlx",
        ("lm_head", "embedding"),
        None,
    )

_GROUPS = tuple(size for size in INTEGER_DIVERGENCE[4] if size > 0)
_PIECES = {"head": "lm_head", "embed": "embedding", "mtp": "mtp", "vision": "vision"}


def _integers(bits: int, words: list[str], name: str) -> WeightFormat:
    dialect, group_size, symmetric, pieces = "compressed-tensors", 128, bits == 8, {}
    for word in words:
        piece, piece_bits = word.rstrip("0123456789"), word.lstrip("abcdefghijklmnopqrstuvwxyz")
        if word in ("awq", "gptq"):
            dialect, symmetric = word, word == "gptq"
        elif word == "channel":
            group_size = -1
        elif word in ("sym", "asym"):
            symmetric = word == "sym"
        elif piece == "g" and piece_bits in map(str, _GROUPS):
            group_size = int(piece_bits)
        elif piece in _PIECES and piece_bits in ("4", "8", "16"):
            pieces[piece] = int(piece_bits)
        else:
            sizes = ", ".join(f"g{size}" for size in _GROUPS)
            raise UnknownName(
                f"weight format {name!r:.80}: {word!r:.40} is none of awq, gptq, {sizes}, channel, sym, asym, head, "
                "embed, mtp or vision (those with 4, 8 or 16); int4-g64-head8-embed8 is an example"
            )
    quantized = {piece: piece_bits for piece, piece_bits in pieces.items() if piece_bits != 16}
    if dialect != "compressed-tensors" and quantized:
        raise Unsupported(
            f"weight format {name!r:.80}: {dialect} files keep {', '.join(quantized)} in bf16; leave that out"
        )
    if dialect == "awq" and (symmetric or group_size < 0 or bits == 8):
        raise Unsupported(f"weight format {name!r:.80}: AWQ is 4 bit, asymmetric and in groups; int{bits} alone is not")
    return _integer_format(bits, dialect, group_size, symmetric, tuple(sorted(quantized.items())))


@lru_cache(maxsize=512)
def _integer_format(
    bits: int, dialect: str, group_size: int, symmetric: bool, pieces: tuple[tuple[str, int], ...]
) -> WeightFormat:
    words = [f"int{bits}"]
    if dialect != "compressed-tensors":
        words.append(dialect)
    if group_size != 128:
        words.append(f"g{group_size}" if group_size > 0 else "channel")
    if symmetric != (bits == 8 if dialect == "compressed-tensors" else dialect == "gptq"):
        words.append("sym" if symmetric else "asym")
    quantized = dict(pieces)
    words += [f"{piece}{quantized[piece]}" for piece in _PIECES if piece in quantized]

    divergence = INTEGER_DIVERGENCE[bits][group_size] * (SYMMETRIC_INT4_PENALTY if symmetric and bits == 4 else 1)
    divergence += sum(PIECE_DIVERGENCE[piece][piece_bits] for piece, piece_bits in pieces)
    group = group_size if group_size > 0 else stores.WHOLE_ROW
    if dialect == "compressed-tensors":
        rule = dict(_everywhere(stores.packed_integers(bits, group, symmetric), *TEXT_LINEARS))
        for piece, piece_bits in pieces:
            rule[_PIECES[piece]] = stores.packed_integers(piece_bits, group, symmetric or piece_bits == 8)
    else:
        rule = dict(_everywhere((stores.gptq if dialect == "gptq" else stores.awq)(bits, group), *TEXT_LINEARS))
    scales = f"groups of {group_size}" if group_size > 0 else "one scale per channel"
    also = "".join(f", {_PIECES[piece]} {piece_bits} bit" for piece, piece_bits in pieces)
    return WeightFormat(
        "-".join(words),
        "safetensors",
        bits,
        group_size if group_size > 0 else None,
        symmetric,
        round(divergence, 6),
        "calibrated integers between the GGUF types of the same bits (estimated)",
        f"int{bits}, {scales}, {'' if symmetric else 'a'}symmetric{also} ({dialect})",
        dialect=dialect,
        lm_head_bits=quantized.get("head", 16),
        embedding_bits=quantized.get("embed", 16),
        vision_bits=quantized.get("vision", 16),
        mtp_bits=quantized.get("mtp", 16),
        rule=rule,
    )


@lru_cache(maxsize=4096)
def pieces(model: Model, fmt: WeightFormat) -> tuple[Piece, ...]:
    """Every tensor of the model as that format stores it, parts that its files leave out included where an engine
    loads them from elsewhere (a GGUF's vision tower is the mmproj file, its block of multi-token prediction comes
    with `-mtp`)."""
    if fmt.file_type:
        found = gguf_tensors(model, fmt.file_type, mtp="mtp" in fmt.parts)
        return tuple(Piece(item.source, item.role, item.shape, item.layers, plain(item.type)) for item in found)
    tensors = model.tensors if fmt.family == "checkpoint" else model.unquantized
    return tuple(_stored(tensors, _rule_of(fmt, model), fmt))


def _stored(tensors: tuple[Tensor, ...], rule: Rule, fmt: WeightFormat) -> Iterator[Piece]:
    for tensor in tensors:
        if tensor.part not in fmt.parts:
            continue
        kept = plain(fmt.float_dtype or tensor.dtype)
        place = PLACES.get(tensor.role)
        if tensor.part == "mtp" and place in TEXT_LINEARS:
            place = "mtp"
        storage = rule.get(place) if place else None
        if storage is not None:
            fused = 2 if tensor.role.endswith(".gate_up_proj") else 1
            storage = stores.fitted(storage, tensor.shape[-1], fused, kept)
        yield Piece(tensor, tensor.role, tensor.shape, tensor.layers, storage or kept)


def _rule_of(fmt: WeightFormat, model: Model) -> Rule:
    if fmt.name != "nvfp4":
        return fmt.rule
    algorithm = (model.quantization or {}).get("algorithm")
    experts_only = model.name in _NVFP4_EXPERTS_ONLY or algorithm == "NVFP4"
    return NVFP4_EXPERTS if experts_only and model.is_moe else NVFP4_MIXED


def storage_of(tensor: Tensor, fmt: WeightFormat, model: Model, layer: int | None = None) -> Storage:
    """How that tensor of the model is stored (in that layer, or the first of its layers).

    The first piece counts where a format splits a tensor. `Unsupported` where its files leave the tensor out.
    """
    for piece in pieces(model, fmt):
        if piece.tensor is tensor and (layer is None or not piece.layers or layer in piece.layers):
            return piece.storage
    raise Unsupported(f"{fmt.name} files hold no {tensor.name}; they are made of {' and '.join(fmt.parts)}")


def tensor_bytes(tensor: Tensor, fmt: WeightFormat, model: Model) -> int:
    """Bytes of all `count` of them, 0 where the format leaves the tensor out."""
    return sum(piece.bytes for piece in pieces(model, fmt) if piece.tensor is tensor)


@lru_cache(maxsize=4096)
def checkpoint_bytes(model: Model, fmt: WeightFormat) -> int:
    """Bytes of the release: for safetensors `metadata.total_size` (tensors, without headers); for a GGUF the main
    file with its metadata, without the mmproj; for MLX the text alone, as mlx-lm writes it."""
    total = sum(piece.bytes for piece in pieces(model, fmt) if piece.part in fmt.parts)
    return total + (model.vocab_size * GGUF_METADATA_BYTES_PER_TOKEN if fmt.family == "gguf" else 0)
