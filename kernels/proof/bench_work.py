"""What the GPU bench times: one operation at one shape and one number of tokens, with its truth and its least traffic.

Up to 64 tokens are 64 sequences with one new token each (a decode step of a batch); more are one prompt. Traffic is the
least that an operation can do: every input once, every output once; of experts those that a token is routed to, of a
cache the positions that are seen. Arithmetic is what the definition says: 2 M N K of a matmul, 4 D per query head and
seen position, 7 DK DV per token and value head of the delta rule (its recurrence, though prompts go in chunks).

Truth is the twin in float64 on the same inputs. The bound on a kernel's relative RMS error is that of the tests: 1.5
times that of the twin in the kernel's own dtype, or of torch's matmul with the matrix in that dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
DEPTHS = (4096, 32768)
MOST_SEQUENCES = 64
EPS = 1e-6
TIMES_STANDARD = 1.5
UNIT = 2.0**-24  # where both errors are that small, their ratio is chance


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and in what the bench runs. copies_for: bytes of a call -> how many copies keep the cache cold."""

    device: torch.device
    dtype: torch.dtype
    copies_for: Callable[[int], int]
    tokens: tuple[int, ...] = TOKENS
    depths: tuple[int, ...] = DEPTHS
    bits: tuple[int, ...] = (4, 8)
    group_size: int = 128

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(self.dtype)

    def int32(self, numbers: Any) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32, device=self.device)

    def sequences(self, tokens: int) -> int:
        """How many sequences that many new tokens belong to."""
        return tokens if tokens <= MOST_SEQUENCES else 1


def as_it_is(returned: Any) -> Tensor:
    return returned


@dataclass(frozen=True, slots=True, eq=False)
class Rival:
    """Somebody else's kernel for the same work: run(i) works on copy i of its own data."""

    run: Callable[[int], Any]
    copies: int
    bytes: int
    result: Callable[[Any], Tensor] = as_it_is


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """run(i) works on copy i, `bytes` of it; result: what it returned -> what is compared with the truth.

    twin(dtype): the same from copy 0's inputs as they were at the start, computed in float64 or rounded to a dtype.
    standard(): what the error is measured by, where that is not the twin in the kernel's dtype.
    rivals: name -> what makes one ready, or raises whatever keeps it from that.
    """

    operation: str
    shape: str
    models: tuple[str, ...]
    tokens: int
    bytes: int
    flops: int
    copies: int
    run: Callable[[int], Any]
    twin: Callable[[torch.dtype], Tensor]
    standard: Callable[[], Tensor] | None = None
    result: Callable[[Any], Tensor] = as_it_is
    rivals: Mapping[str, Callable[[], Rival]] = field(default_factory=dict)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Relative RMS error; infinite where something is not a number."""
    off = ((result.reshape(truth.shape).double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()
    return off if off == off else float("inf")


def dtype_of(result: Tensor) -> torch.dtype:
    """The dtype that a result is measured in: what was compared in float64 has none of its own."""
    return torch.float32 if result.dtype == torch.float64 else result.dtype
