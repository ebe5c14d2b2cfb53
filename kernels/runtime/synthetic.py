"""Models of random weights at the shapes of a real one: for benches and for memory, where no checkpoint is at hand.

    model = synthetic("qwen3.5-9b", bits=4, drafts=0)

The linears of the layers are quantized, routed experts too, symmetrically; the rest is in the model's dtype, the
prediction layer too, as the formats int4-sym and int8 of `profiles/formats.py` have it. Values are drawn once, a
megabyte of them, and repeated: drawing nine billion takes minutes, repeating seconds. Scales are such that activations
stay as large as they came in: text that such a model writes means nothing, and nothing in it is inf or NaN.
"""

from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor

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

KEPT = ("embed_tokens", "lm_head", "in_proj_a", "in_proj_b")


def synthetic(
    name: str,
    bits: int = 4,
    group_size: int = 128,
    drafts: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    operations: Operations | None = None,
) -> Model:
    """The model of the catalog (or of a config.json) with random weights; bits 16: not quantized.

    Not copied from device to device: it is made on the CPU, one matrix at a time, and moved.
    """
    configuration = configuration_of(catalog_model(name))
    return random_model(configuration, bits, group_size, drafts, dtype, torch.device(device), operations)


def random_model(
    configuration: Configuration,
    bits: int = 16,
    group_size: int = 128,
    drafts: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    operations: Operations | None = None,
) -> Model:
    """The same from a configuration."""
    if bits not in (4, 8, 16):
        raise ValueError(f"random weights of {bits} bits: give 4, 8 or 16")
    device = torch.device(device)
    operations = operations or operations_for(device)
    with weights_in_pages():
        source = RandomSource(configuration, bits, group_size, dtype)
        return assemble(source, configuration, dtype, device, operations, with_prediction=drafts > 0)


@dataclass(frozen=True, slots=True, eq=False)
class RandomSource:
    """A `Source` that has every module, in the way that Qwen3.5 names and Qwen3.5-MoE stacks them."""

    configuration: Configuration
    bits: int
    group_size: int
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
        if self.bits == 16 or module.startswith("mtp.") or module.rpartition(".")[2] in KEPT:
            return self._normal(module, (rows, columns), columns)
        return self._quantized(module, (), rows, columns)

    def stack(self, module: str, count: int, rows: int, columns: int) -> Weight:
        if self.bits == 16 or module.startswith("mtp."):
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
        weight = empty(rows, columns, self.bits, self.group_size, torch.bfloat16, False, stack=stack)
        _repeat(name, self.codes, weight.codes.view(torch.int16).view(-1))
        # Codes are spread evenly over 2^bits values, whose standard deviation is 2^bits / sqrt(12).
        weight.scales[..., : -(-columns // weight.group_size), :rows] = 12**0.5 / (2**self.bits * columns**0.5)
        return weight


def _repeat(name: str, pattern: Tensor, target: Tensor) -> None:
    """Fill `target` with the pattern, over and over, beginning at another place for every name."""
    pattern = pattern.roll(crc32(name.encode()))
    whole = target.numel() // pattern.numel() * pattern.numel()
    target[:whole].view(-1, pattern.numel()).copy_(pattern)
    target[whole:] = pattern[: target.numel() - whole]
