"""The shapes of the family that the GPU bench goes through, each once, with the models that have it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from ...profiles.model_catalog import model
from ..runtime.configuration import Configuration, configuration_of
from .bench_attention import attention_work, rope_work, store_work
from .bench_layers import conv_work, delta_work, gated_norm_work, norm_work
from .bench_matmul import expert_work, matmul_work
from .bench_work import MOST_SEQUENCES, Setting, Work

MODELS = ("qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b")

KINDS = ("matmul", "experts", "delta", "norm", "attention")

Shape = tuple[int, ...]
Works = Iterator[Callable[[], Work]]
Family = Mapping[str, Configuration]


def family(names: Iterable[str] = MODELS) -> dict[str, Configuration]:
    """The configurations of models of the catalog; its error where a name is unknown."""
    return {name: configuration_of(model(name)) for name in names}


def works(models: Family, setting: Setting, kinds: Collection[str] = KINDS) -> Iterator[Callable[[], Work]]:
    """What makes each piece of work ready, so that one at a time is in memory; `kinds` is a choice of KINDS."""
    for tokens in setting.tokens:
        for kind in KINDS:
            if kind in kinds:
                yield from _WORKS[kind](models, setting, tokens)


def _matmul_works(models: Family, setting: Setting, tokens: int) -> Works:
    for bits in setting.bits:
        for shape, names in _shared(models, _matrices).items():
            yield partial(matmul_work, setting, names, tokens, *shape, bits)


def _expert_works(models: Family, setting: Setting, tokens: int) -> Works:
    for bits in setting.bits:
        for shape, names in _shared(models, _stacks).items():
            yield partial(expert_work, setting, names, tokens, *shape, bits)


def _delta_works(models: Family, setting: Setting, tokens: int) -> Works:
    for shape, names in _shared(models, _delta).items():
        yield partial(delta_work, setting, names, tokens, *shape)
    for shape, names in _shared(models, _conv).items():
        yield partial(conv_work, setting, names, tokens, *shape)


def _norm_works(models: Family, setting: Setting, tokens: int) -> Works:
    for shape, names in _shared(models, _hidden).items():
        for kind in ("rms_norm", "add_rms_norm"):
            yield partial(norm_work, setting, names, tokens, *shape, kind)
    for shape, names in _shared(models, _gated_norm).items():
        yield partial(gated_norm_work, setting, names, tokens, *shape)


def _attention_works(models: Family, setting: Setting, tokens: int) -> Works:
    depths = setting.depths if tokens <= MOST_SEQUENCES else (0, *setting.depths)
    for shape, names in _shared(models, _query_heads).items():
        yield partial(rope_work, setting, names, tokens, *shape)
    for int8 in (False, True):
        for shape, names in _shared(models, _key_heads).items():
            yield partial(store_work, setting, names, tokens, *shape, int8)
        for shape, names in _shared(models, _heads).items():
            for depth in depths:
                yield partial(attention_work, setting, names, tokens, *shape, depth, int8)


_WORKS = {
    "matmul": _matmul_works,
    "experts": _expert_works,
    "delta": _delta_works,
    "norm": _norm_works,
    "attention": _attention_works,
}


def _shared(models: Family, shapes: Callable[[Configuration], Iterable[Shape]]) -> dict[Shape, tuple[str, ...]]:
    """Shape -> names of the models that have it."""
    found: dict[Shape, tuple[str, ...]] = {}
    for name, configuration in models.items():
        for shape in dict.fromkeys(shapes(configuration)):
            found[shape] = (*found.get(shape, ()), name)
    return found


def _matrices(c: Configuration) -> Iterator[Shape]:
    """Rows and columns of the linears of a layer, as the runtime stacks them (`runtime/layers.py`)."""
    yield c.conv_dim + c.value_dim, c.hidden_size
    yield c.hidden_size, c.value_dim
    yield 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim, c.hidden_size
    yield c.hidden_size, c.num_attention_heads * c.head_dim
    inner = c.shared_expert_intermediate_size if c.is_moe else c.intermediate_size
    yield 2 * inner, c.hidden_size
    yield c.hidden_size, inner


def _stacks(c: Configuration) -> Iterator[Shape]:
    """Experts, how many of them a token goes to, rows and columns of each."""
    if c.is_moe:
        yield c.num_experts, c.num_experts_per_tok, 2 * c.moe_intermediate_size, c.hidden_size
        yield c.num_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size


def _delta(c: Configuration) -> Iterator[Shape]:
    yield c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim


def _conv(c: Configuration) -> Iterator[Shape]:
    yield c.conv_dim, c.linear_conv_kernel_dim


def _hidden(c: Configuration) -> Iterator[Shape]:
    yield (c.hidden_size,)


def _gated_norm(c: Configuration) -> Iterator[Shape]:
    yield c.linear_num_value_heads, c.linear_value_head_dim


def _query_heads(c: Configuration) -> Iterator[Shape]:
    yield c.num_attention_heads, c.head_dim


def _key_heads(c: Configuration) -> Iterator[Shape]:
    yield c.num_key_value_heads, c.head_dim


def _heads(c: Configuration) -> Iterator[Shape]:
    yield c.num_attention_heads, c.num_key_value_heads, c.head_dim


def tiny(c: Configuration) -> Configuration:
    """The same architecture with the smallest sizes that every kernel takes: for a run through the interpreter."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    sizes |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    sizes |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    if c.is_moe:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    else:
        sizes |= {"intermediate_size": 256}
    return replace(c, **sizes)
