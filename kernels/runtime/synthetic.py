"""Models of random weights at the shapes of a real one: for benches and for memory, where no checkpoint is at hand.

    model = synthetic("qwen3.5-9b", weight_format("int4"), drafts=0)

What is quantized, to how many bits and in which groups, is what the formats of `profiles/formats.py` say: the linears
of the layers, routed experts too; embedding, lm_head and prediction layer where the format names them. Values are drawn
once, a megabyte of them, and repeated: drawing nine billion takes minutes, repeating seconds. Scales are such that
activations stay as large as they came in: text that such a model writes means nothing, and nothing in it is inf or NaN.
"""

from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor

from ...profiles.formats import WeightFormat
from ...profiles.model_catalog import model as catalog_model
from ..layout.packing import QuantizedWeight, empty
from ..layout.rows import Weight
from ..operations import Operations, operations_for
from .assembly import assemble
from .configuration import Configuration, configuration_of
from .heap import weights_in_pages
from .model import Model

PATTERN_ELEMENTS = 1_000_003
"""A prime: so no two rows of a matrix are alike."""

KEPT = ("in_proj_a", "in_proj_b")
"""Linears that no format quantizes: the gates of the delta rule. (Routers are no modules here, but tensors.)"""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits by place, 16 for what is not quantized; groups and symmetry are everyone's, but 8 bits are symmetric outside
    the linears of the layers."""

    bits: int = 16
    group_size: int = 128
    symmetric: bool = True
    embedding_bits: int = 16
    lm_head_bits: int = 16
    mtp_bits: int = 16

    def __post_init__(self) -> None:
        for bits in (self.bits, self.embedding_bits, self.lm_head_bits, self.mtp_bits):
            if bits not in (4, 8, 16):
                raise ValueError(f"random weights of {bits} bits: give 4, 8 or 16")

    def of(self, module: str) -> tuple[int, bool]:
        """(bits, whether it is symmetric) of a module by its name."""
        if module.endswith(KEPT):
            return 16, True
        if module in ("embed_tokens", "lm_head"):
            bits = self.lm_head_bits if module == "lm_head" else self.embedding_bits
        elif module.startswith("mtp."):
            bits = self.mtp_bits
        else:
            return self.bits, self.symmetric
        return bits, self.symmetric or bits == 8


def scheme_of(fmt: WeightFormat) -> Scheme:
    """The scheme of a format that the runtime loads: bf16, or integers of ours. ValueError for another."""
    if fmt.name == "bf16":
        return Scheme()
    if not fmt.name.startswith(("int4", "int8")) or fmt.name == "int8-w8a8":
        raise ValueError(f"random weights of {fmt.name}: the runtime has bf16, int8 and int4 (int4-g64-head8)")
    return Scheme(
        bits=fmt.bits,
        group_size=fmt.group_size or -1,
        symmetric=fmt.symmetric,
        embedding_bits=fmt.embedding_bits,
        lm_head_bits=fmt.lm_head_bits,
        mtp_bits=fmt.mtp_bits,
    )


def synthetic(
    name: str,
    fmt: WeightFormat,
    drafts: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    operations: Operations | None = None,
    layers: int | None = None,
) -> Model:
    """The model of the catalog (or of a config.json) with random weights in a format; `layers`: the first of them only.

    Not copied from device to device: it is made on the CPU, one matrix at a time, and moved.
    """
    configuration = configuration_of(catalog_model(name)).with_layers(layers)
    return _random(configuration, scheme_of(fmt), drafts, dtype, torch.device(device), operations)


def random_model(
    configuration: Configuration,
    bits: int = 16,
    group_size: int = 128,
    drafts: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    operations: Operations | None = None,
) -> Model:
    """The same from a configuration: symmetric linears of `bits` bits (16: not quantized), the rest in `dtype`."""
    return _random(configuration, Scheme(bits, group_size), drafts, dtype, torch.device(device), operations)


def _random(
    configuration: Configuration,
    scheme: Scheme,
    drafts: int,
    dtype: torch.dtype,
    device: torch.device,
    operations: Operations | None,
) -> Model:
    operations = operations or operations_for(device)
    with weights_in_pages():
        source = RandomSource(configuration, scheme, dtype)
        return assemble(source, configuration, dtype, device, operations, with_prediction=drafts > 0)


@dataclass(frozen=True, slots=True, eq=False)
class RandomSource:
    """A `Source` that has every module, in the way that Qwen3.5 names and Qwen3.5-MoE stacks them."""

    configuration: Configuration
    scheme: Scheme
    dtype: torch.dtype
    normal: Tensor = field(init=False)
    codes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        object.__setattr__(self, "normal", torch.randn(PATTERN_ELEMENTS, generator=draw).to(self.dtype))
        object.__setattr__(self, "codes", torch.randint(-(2**15), 2**15, (PATTERN_ELEMENTS,), generator=draw).short())

    def has(self, module: str) -> bool:
        if module.endswith((".mlp.gate", "experts.gate_up_proj")):
            return self.configuration.is_moe
        return not module.endswith("in_proj_qkvz")

    def matrix(self, module: str, rows: int, columns: int) -> Weight:
        if self.scheme.of(module)[0] == 16:
            return self._normal(module, (rows, columns), columns)
        return self._quantized(module, (), rows, columns)

    def stack(self, module: str, count: int, rows: int, columns: int) -> Weight:
        if self.scheme.of(module)[0] == 16:
            return self._normal(module, (count, rows, columns), columns)
        return self._quantized(module, (count,), rows, columns)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("A_log"):
            return torch.linspace(0, 2, shape[0])
        if name.endswith("dt_bias"):
            return torch.full(shape, -2.0)
        if name.endswith("linear_attn.norm.weight"):
            return torch.ones(shape)
        if name.endswith("conv1d.weight"):
            return self._normal(name, shape, shape[-1])
        if name.endswith("norm.weight"):
            return self._normal(name, shape, 100)
        return self._normal(name, shape, shape[-1])  # routers

    def _normal(self, name: str, shape: tuple[int, ...], columns: int) -> Tensor:
        weight = torch.empty(shape, dtype=self.dtype)
        _repeat(name, self.normal * columns**-0.5, weight.view(-1))
        return weight

    def _quantized(self, name: str, stack: tuple[int, ...], rows: int, columns: int) -> QuantizedWeight:
        bits, is_symmetric = self.scheme.of(name)
        group_size = self.scheme.group_size if self.scheme.group_size > 0 else columns
        weight = empty(rows, columns, bits, group_size, torch.bfloat16, not is_symmetric, stack=stack)
        _repeat(name, self.codes, weight.codes.view(torch.int16).view(-1))
        # Codes are spread evenly over 2^bits values, whose standard deviation is 2^bits / sqrt(12).
        weight.scales[..., : -(-columns // weight.group_size), :rows] = 12**0.5 / (2**bits * columns**0.5)
        return weight


def _repeat(name: str, pattern: Tensor, target: Tensor) -> None:
    """Fill `target` with the pattern, over and over, beginning at another place for every name."""
    pattern = pattern.roll(crc32(name.encode()))
    whole = target.numel() // pattern.numel() * pattern.numel()
    target[:whole].view(-1, pattern.numel()).copy_(pattern)
    target[whole:] = pattern[: target.numel() - whole]
