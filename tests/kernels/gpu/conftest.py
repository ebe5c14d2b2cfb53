"""Walls around every tensor that a kernel's host function allocates."""

import math
from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="the kernels need torch: pip install 'qwenfit[quant]'")
import torch


@pytest.fixture
def walls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch.empty gives is full of NaN and stands between walls of 256 bytes that are whole in the end."""
    allocated: list[tuple[torch.Tensor, int]] = []

    def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        size_bytes = math.prod(shape) * dtype.itemsize
        allocated.append((torch.full((size_bytes + 512,), 255, dtype=torch.uint8, device=device), size_bytes))
        return allocated[-1][0][256 : 256 + size_bytes].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for whole, size_bytes in allocated:
        assert (whole[:256] == 255).all() and (whole[256 + size_bytes :] == 255).all()
